"""Five experiments on what this library has beyond the paper, as data.

`beyond` takes TailorPO and TailorPO-G as the other experiments found them best, and changes one thing at a time; the
last rows put the best of it together. `kl-target` asks of runs three times as long whether a target is held, and what
that is good for. `hacking` trains on rewards that do not mean what they say: alone, in an ensemble
with two preference models under every rule, and alone with sentinels. `alarm` asks at a slower pace how early the
sentinels notice, and `early-alarm`, much slower and with looks at many pictures, whether before a tenth is lost.
"""

from __future__ import annotations

from tailorpo.experiments.grid import Grid, Variant
from tailorpo.experiments.protocol import BUDGET, COLOUR, EVALUATION, JPEG, PAPERS_G, PREFERENCE
from tailorpo.prompts import PromptsConfig, load_prompts

HACKABLE = (JPEG, COLOUR)
_SYMMETRIC = "algorithm.guidance={form: sigma, k: 8.0, symmetric: true}"
_SOFT = ("algorithm.labels=soft", "algorithm.tau=auto", "algorithm.beta=0.2")
_AUTO = ("algorithm.labels=soft", "algorithm.tau=0.2", "algorithm.beta=auto", "algorithm.kl_target=100")

_PLAIN = {
    "TailorPO": (),
    "best and worst of 4": ("algorithm.candidates=4",),
    "Plackett-Luce of 4": ("algorithm.candidates=4", "algorithm.objective=plackett_luce"),
    "soft labels": _SOFT,
    "IPO": ("algorithm.objective=ipo", "algorithm.beta=0.1"),
    "measured label smoothing": ("algorithm.label_smoothing=auto", f"algorithm.misranks={PREFERENCE}"),
    "moving reference": ("algorithm.reference={ema: 0.9}",),
    "lookahead 2": ("algorithm.step_reward={lookahead: 2}",),
    "KL target 100": ("algorithm.kl_target=100",),
    "soft labels and KL target 100": (*_SOFT, "algorithm.kl_target=100"),
    "beta auto for 100 nats": _AUTO,
    "KL mask 1": ("algorithm.kl_mask=1",),
    "reference every 5": ("algorithm.reference={every: 5}",),
    "tiny decoder": ("model.tiny_vae=emoji",),
}
_GUIDED = {
    "TailorPO-G": PAPERS_G,
    "G, symmetric": (*PAPERS_G, _SYMMETRIC),
    "G, best of 4": (*PAPERS_G, "algorithm.candidates=4"),
    "G, soft labels": (*PAPERS_G, *_SOFT),
    "G, moving reference": (*PAPERS_G, "algorithm.reference={ema: 0.9}"),
    "G, KL target 100": (*PAPERS_G, "algorithm.kl_target=100"),
    "G, symmetric, KL target 100": (*PAPERS_G, _SYMMETRIC, "algorithm.kl_target=100"),
}
"""Settings that no other experiment has tuned: the strengths are those at which a trained step's fixed point is at some
nats of KL (docs/algorithms/tailorpo.md), chosen before the runs."""

BEYOND = tuple(
    Variant(name=name, recipe=recipe, overrides=overrides, tuned=tuned)
    for tuned, recipe, rows in (
        ("TailorPO", "emoji_tailorpo.yaml", _PLAIN),
        ("TailorPO-G", "emoji_tailorpo_g.yaml", _GUIDED),
    )
    for name, overrides in rows.items()
)

HELD = tuple(
    Variant(name=name, recipe=recipe, overrides=overrides, tuned=tuned)
    for name, tuned, recipe, overrides in (
        ("TailorPO-G", "TailorPO-G", "emoji_tailorpo_g.yaml", PAPERS_G),
        ("G, KL target 100", "TailorPO-G", "emoji_tailorpo_g.yaml", (*PAPERS_G, "algorithm.kl_target=100")),
        ("G, KL target 300", "TailorPO-G", "emoji_tailorpo_g.yaml", (*PAPERS_G, "algorithm.kl_target=300")),
        ("TailorPO", "TailorPO", "emoji_tailorpo.yaml", ()),
        ("KL target 100", "TailorPO", "emoji_tailorpo.yaml", ("algorithm.kl_target=100",)),
        ("soft labels, KL target 100", "TailorPO", "emoji_tailorpo.yaml", (*_SOFT, "algorithm.kl_target=100")),
        ("beta auto, KL target 100", "TailorPO", "emoji_tailorpo.yaml", _AUTO),
    )
)

_SUM = f"reward=[{{name: <reward>}}, {{name: {PREFERENCE}}}, {{name: emoji_step_preference}}]"
_SENTINELS = ("sentinels.every=1", "sentinels.judge={name: emoji_judge}")
_ALL_PROMPTS = ("sentinels.count=45", "sentinels.batch_size=30")
"""Looks at every animal instead of 16 of them."""
_ROLLBACK = (*_SENTINELS, "sentinels.on_alarm=rollback")
_PUSHED = ("algorithm.beta=0.02", "optimizer.lr=3e-3")
"""Hard enough that a reward that can be hacked is hacked within the budget: at 2e-3 and ten updates, as in `pushed`,
colourfulness still did the pictures good."""
_PACED = ("algorithm.beta=0.02", "optimizer.lr=1e-3")
"""Slow enough that near the judge's peak the KL grows by a quarter between two looks, not by three quarters."""
_FINER = ("algorithm.beta=0.02", "optimizer.lr=2.5e-4", "batch={trajectories: 4, micro: 4}", "algorithm.kl_measured=0")
"""A quarter of that, by four times as many updates of half the trajectories; the looks measure the KL."""


def _hacking(
    name: str, *overrides: str, rewards: tuple[str, ...] = HACKABLE, pace: tuple[str, ...] = _PUSHED
) -> Variant:
    return Variant(name=name, recipe="emoji_tailorpo.yaml", overrides=(*pace, *overrides), rewards=rewards)


HACKING = (
    _hacking("alone", *_SENTINELS, rewards=(*HACKABLE, PREFERENCE)),
    _hacking("alone, rolled back", *_ROLLBACK),
    _hacking("alone, beta raised", *_SENTINELS, "sentinels.on_alarm=raise_beta"),
    _hacking("weighted sum", _SUM),
    *(
        _hacking(rule.replace("_", " "), _SUM, f"ensemble.rule={rule}")
        for rule in ("mean", "worst_case", "uncertainty", "majority", "pareto", "soft_vote")
    ),
    _hacking("mean, gated KL", _SUM, "ensemble.rule=mean", "algorithm.gated_kl=0.01"),
    _hacking("mean, rolled back", _SUM, "ensemble.rule=mean", *_ROLLBACK),
)

ALARM = (
    _hacking("alone", *_SENTINELS, pace=_PACED, rewards=(COLOUR, PREFERENCE)),
    _hacking("alone, 45 prompts", *_SENTINELS, *_ALL_PROMPTS, pace=_PACED, rewards=(COLOUR, PREFERENCE)),
    _hacking("alone, rolled back", *_ROLLBACK, pace=_PACED, rewards=(COLOUR,)),
    _hacking("weighted sum", _SUM, *_SENTINELS, pace=_PACED, rewards=(COLOUR,)),
    _hacking("weighted sum, rolled back", _SUM, *_ROLLBACK, pace=_PACED, rewards=(COLOUR,)),
)

EARLY = (
    _hacking(
        "450 pictures, a quarter of the pace",
        *_SENTINELS,
        *_ALL_PROMPTS,
        "sentinels.seeds=10",
        "sentinels.batch_size=225",
        "sentinels.rules={turn: 0.6, kl_growth: null}",
        "sentinels.on_alarm=stop",
        pace=_FINER,
        rewards=(COLOUR, PREFERENCE),
    ),
)

HACKING_BUDGET = 3_840
"""Sixteen updates: JPEG size and colourfulness have gone from pictures to flat or garish ones by then."""

FEWER_PROMPTS = (f"eval.prompts_seen={{list: [{', '.join(load_prompts(PromptsConfig(name='animals'))[::2])}]}}",)
"""Every second animal: the effects are large, and the evaluation would cost three times the training."""

ALARM_BUDGET = 2 * HACKING_BUDGET
"""Thirty-two updates at a third of the learning rate."""

EARLY_BUDGET = 2 * ALARM_BUDGET
"""A hundred and twenty-eight updates of half the trajectories at a quarter of that learning rate."""

GRIDS = (
    Grid(
        name="beyond",
        question="Which of the things beyond the paper are worth having, at equal network evaluations?",
        paper="none",
        statistic="as in methods",
        variants=BEYOND,
        seeds={PREFERENCE: (1, 2, 3)},
        budget=BUDGET,
        overrides=EVALUATION,
        reference="TailorPO-G",
    ),
    Grid(
        name="kl-target",
        question="Is a KL target held, and what is it worth in a run three times as long?",
        paper="none",
        statistic="as in methods; KL against its target by update",
        variants=HELD,
        seeds={PREFERENCE: (1, 2, 3)},
        budget=3 * BUDGET,
        overrides=EVALUATION,
        reference="TailorPO-G",
    ),
    Grid(
        name="hacking",
        question="What keeps a model from fooling its reward: ensembles, their rules, or sentinels?",
        paper="none; Figure 11 shows the problem",
        statistic="as in methods, against the judge; alarms by update",
        variants=HACKING,
        seeds=dict.fromkeys((*HACKABLE, PREFERENCE), (1, 2, 3)),
        budget=HACKING_BUDGET,
        overrides=(*EVALUATION, *FEWER_PROMPTS),
        reference="alone",
        points=1,
    ),
    Grid(
        name="alarm",
        question="Does the alarm come in time where the looks can follow, and does a healthy run stay without one?",
        paper="none",
        statistic="as in hacking",
        variants=ALARM,
        seeds=dict.fromkeys((COLOUR, PREFERENCE), (7, 8, 9)),
        budget=ALARM_BUDGET,
        overrides=(*EVALUATION, *FEWER_PROMPTS),
        reference="alone",
        points=1,
    ),
    Grid(
        name="early-alarm",
        question="With small steps and looks at many pictures: does it come before a tenth of the best gain is lost?",
        paper="none",
        statistic="as in hacking",
        variants=EARLY,
        seeds=dict.fromkeys((COLOUR, PREFERENCE), (16, 17, 18, 19)),
        budget=EARLY_BUDGET,
        overrides=(*EVALUATION, *FEWER_PROMPTS),
        reference=None,
        points=1,
    ),
)
