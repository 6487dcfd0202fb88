"""Two experiments on what this library has beyond the paper, as data.

`beyond` takes TailorPO and TailorPO-G as the other experiments found them best, and changes one thing at a time; the
last rows put the best of it together. `hacking` trains on rewards that do not mean what they say: alone, in an ensemble
with two preference models under every rule, and alone with sentinels.
"""

from __future__ import annotations

from tailorpo.experiments.grid import Variant

PREFERENCE = "emoji_preference"
HACKABLE = ("jpeg_compressibility", "colourfulness")

_PLAIN = {
    "TailorPO": (),
    "best and worst of 4": ("algorithm.candidates=4",),
    "Plackett-Luce of 4": ("algorithm.candidates=4", "algorithm.objective=plackett_luce"),
    "soft labels": ("algorithm.labels=soft", "algorithm.tau=auto"),
    "IPO": ("algorithm.objective=ipo",),
    "measured label smoothing": ("algorithm.label_smoothing=auto", f"algorithm.misranks={PREFERENCE}"),
    "winner's safeguard": ("algorithm.safeguard=true",),
    "KL target 100": ("algorithm.kl_target=100",),
    "moving reference": ("algorithm.reference={ema: 0.9}",),
    "measured steps": (f"algorithm.train_steps={{auto: 5, measured: {PREFERENCE}}}",),
    "lookahead 2": ("algorithm.step_reward={lookahead: 2}",),
}
_GUIDED = {
    "TailorPO-G": (),
    "-G, symmetric": ("algorithm.guidance.symmetric=true",),
    "-G, best of 4": ("algorithm.candidates=4",),
    "-G, soft labels": ("algorithm.labels=soft", "algorithm.tau=auto"),
    "-G, KL target 100": ("algorithm.kl_target=100",),
    "-G, moving reference": ("algorithm.reference={ema: 0.9}",),
}

BEYOND = tuple(
    Variant(name=name, recipe=recipe, overrides=overrides, tuned=tuned)
    for tuned, recipe, rows in (
        ("TailorPO", "emoji_tailorpo.yaml", _PLAIN),
        ("TailorPO-G", "emoji_tailorpo_g.yaml", _GUIDED),
    )
    for name, overrides in rows.items()
)

_MEMBERS = f"[{{name: <reward>}}, {{name: {PREFERENCE}}}, {{name: emoji_step_preference}}]"
_PUSHED = ("algorithm.beta=0.02", "optimizer.lr=2e-3")
"""Hard enough that a reward that can be hacked is hacked within the budget; as in `pushed`."""
_SENTINELS = ("sentinels.every=1", "sentinels.judge={name: emoji_judge}")


def _hacking(name: str, *overrides: str, rewards: tuple[str, ...] = HACKABLE) -> Variant:
    return Variant(name=name, recipe="emoji_tailorpo.yaml", overrides=(*_PUSHED, *overrides), rewards=rewards)


HACKING = (
    _hacking("alone", *_SENTINELS, rewards=(*HACKABLE, PREFERENCE)),
    _hacking("alone, rolled back", *_SENTINELS, "sentinels.on_alarm=rollback"),
    _hacking("alone, beta raised", *_SENTINELS, "sentinels.on_alarm=raise_beta"),
    _hacking("weighted sum", f"reward={_MEMBERS}"),
    *(
        _hacking(rule.replace("_", " "), f"reward={_MEMBERS}", f"ensemble.rule={rule}")
        for rule in ("mean", "worst_case", "uncertainty", "majority", "pareto", "soft_vote")
    ),
    _hacking("mean, gated KL", f"reward={_MEMBERS}", "ensemble.rule=mean", "algorithm.gated_kl=0.1"),
    _hacking(
        "mean, rolled back", f"reward={_MEMBERS}", "ensemble.rule=mean", *_SENTINELS, "sentinels.on_alarm=rollback"
    ),
)
