"""What the report shows of the training itself: the curves, and the table by denoising step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from tailorpo.report.charts import Chart, Series, finite, line_chart


def training_charts(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """The training curves, without those that have no data."""
    if not rows:
        return []
    log2 = (0.693147, "log 2: nothing learnt")
    charts = [
        *_reward_charts(rows),
        line_chart(rows, [Series("gap", "gap")], title="Reward gap", note="winner minus loser, mean of the pairs"),
        line_chart(
            rows,
            [Series("accuracy", "accuracy")],
            title="Accuracy of the implicit reward",
            note="share of pairs in which the model, against the reference, prefers the winner",
            rule=(0.5, "chance"),
        ),
        line_chart(
            rows,
            [Series("kl", "trained steps"), Series("kl_trajectory", "all steps", "muted")],
            title="KL to the reference",
            note="nats per trajectory; that of all steps is to the base model, measured on few trajectories",
        ),
        line_chart(
            rows,
            [Series("beta", "beta"), Series("kl_penalty", "penalty", "muted")],
            title="What holds the KL target",
            note="beta with soft labels, the price of a nat with hard ones",
        ),
        line_chart(rows, [Series("loss", "loss")], title="Loss", rule=log2),
        line_chart(
            rows,
            [Series("log_ratio_winner", "winner", "good"), Series("log_ratio_loser", "loser", "bad")],
            title="Log-ratio to the base model",
            note="nats; a winner that falls far below zero is unlearnt",
            rule=(0.0, "base"),
        ),
        line_chart(rows, [Series("grad_norm", "norm")], title="Gradient norm", note="before clipping"),
        line_chart(
            rows,
            [Series("guidance_size", "size"), Series("guidance_accepted", "accepted share", "muted")],
            title="Guidance",
            note="mean length of the push on winners, in units of the step's noise",
        ),
        line_chart(
            rows,
            [Series("forwards", "forwards")],
            title="Network evaluations",
            note="guided forwards of one latent, cumulated",
            smooth=False,
        ),
        line_chart(rows, [Series("seconds", "seconds")], title="Seconds per update"),
    ]
    return [chart for chart in charts if chart]


def _reward_charts(rows: Sequence[Mapping[str, Any]]) -> list[Chart | None]:
    """The reward, or each member of an ensemble, whose own winners' and losers' rewards have no common unit."""
    members = [key.removeprefix("reward_final:") for key in rows[0] if key.startswith("reward_final:")]
    charts = [
        line_chart(
            rows,
            [
                Series(f"reward_final{suffix}", "finished pictures", "accent"),
                Series(f"reward_winner{suffix}", "winners", "good"),
                Series(f"reward_loser{suffix}", "losers", "bad"),
            ],
            title=f"Reward{suffix}".replace(":", ": "),
            note="of the candidates' predicted clean pictures, and of the pictures at the end of the trajectories",
        )
        for suffix in ([f":{name}" for name in members] or [""])
    ]
    if members:
        tones = ("accent", "good", "bad", "muted")
        agreement = [Series(f"agreement:{name}", name, tones[index % len(tones)]) for index, name in enumerate(members)]
        charts.append(
            line_chart(
                rows,
                [*agreement, Series("abstained", "the ensemble abstains", "muted")],
                title="Agreement with the ensemble",
                note="share of pairs that a member orders as the ensemble does, an abstention counting half",
                rule=(0.5, "chance"),
            )
        )
    return charts


def history_charts(evaluation: Mapping[str, Any]) -> list[Chart]:
    """Where a run was evaluated more than once: each measure's difference to the base model over the updates."""
    history = evaluation.get("history", [])
    if len(history) < 2:
        return []
    groups = [group for group in ("seen", "unseen") if group in evaluation["groups"]]
    tones = {"seen": "accent", "unseen": "good"}
    charts: list[Chart | None] = []
    for name, key, title in (
        ("reward", "difference", "Trained reward, difference to the base"),
        ("judge", "difference", "Judge, difference to the base"),
        ("distance", "ratio", "Diversity, share of the base"),
    ):
        rows = [
            {"update": entry["update"]}
            | {group: entry["groups"].get(group, {}).get(name, {}).get(key) for group in groups}
            for entry in history
        ]
        series = [Series(group, f"{group} prompts", tones[group]) for group in groups]
        rule = (1.0, "base") if key == "ratio" else (0.0, "base")
        # Before the first update the adapter does nothing, so the first point is known without drawing a picture.
        rows.insert(0, {"update": 0, **dict.fromkeys(groups, rule[0])})
        charts.append(line_chart(rows, series, title=title, rule=rule, always_rule=True, smooth=False))
    return [chart for chart in charts if chart]


def step_table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What happened at each trained step, averaged over the last quarter of the updates, weighted by pairs."""
    sums: dict[int, dict[str, float]] = {}
    for row in rows[-max(1, len(rows) // 4) :]:
        for step in cast(list[dict[str, Any]], row.get("by_step") or []):
            pairs = finite(step.get("pairs")) or 0.0
            total = sums.setdefault(int(step["k"]), {"time": step["time"], "pairs": 0.0})
            total["pairs"] += pairs
            for key in ("gap", "accuracy", "kl", "reward"):
                value = finite(step.get(key))
                if value is not None:
                    total[key] = total.get(key, 0.0) + pairs * value
                    total[f"{key} pairs"] = total.get(f"{key} pairs", 0.0) + pairs
    steps: list[dict[str, Any]] = []
    for k, total in sorted(sums.items()):
        step: dict[str, Any] = {"k": k, "time": int(total["time"]), "pairs": int(total["pairs"])}
        for key in ("gap", "accuracy", "kl", "reward"):
            weight = total.get(f"{key} pairs", 0.0)
            step[key] = total[key] / weight if weight else None
        steps.append(step)
    for key in ("gap", "kl"):
        largest = max((step[key] for step in steps if step[key] is not None), default=0.0)
        for step in steps:
            step[f"{key}_bar"] = round(100 * max(0.0, step[key] or 0.0) / largest, 1) if largest > 0 else 0.0
    return steps
