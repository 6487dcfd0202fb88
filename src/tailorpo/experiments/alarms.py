"""What the sentinels of a grid's cells saw: when they raised the alarm, and what the judge had lost by then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from tailorpo.sentinels.series import looks

Row = Mapping[str, Any]


def looks_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What a cell's result keeps of the looks in its metrics: update, state, judge and base's judge, share of the
    base's diversity, KL, and where a rollback went."""
    found: list[dict[str, Any]] = []
    for look in looks(rows):
        judge, distance = (look["measures"].get(name, {}) for name in ("judge", "distance"))
        found.append(
            {
                "update": look["update"],
                "state": look["state"],
                "judge": judge.get("now"),
                "base": judge.get("base"),
                "diversity": distance.get("ratio"),
                "kl": look["kl"],
                "forwards": look["cost"]["forwards"],
                "restored": look.get("restored"),
            }
        )
    return found


def alarm_table(cells: Mapping[str, Sequence[Row]]) -> str | None:
    """One row for every variant that has sentinels; None where none has."""
    head = [
        "sentinels",
        "runs",
        "with an alarm",
        "first alarm, update",
        "judge's best gain before",
        "lost at the alarm",
        "KL, best to alarm",
        "kept of",
        "F of all looks",
    ]
    lines = [_row(head), _row(["---"] * len(head))]
    for name, runs in cells.items():
        seen = [run["sentinels"] for run in runs if run.get("sentinels")]
        if seen:
            lines.append(_row([name, str(len(seen)), *_alarms(seen)]))
    if len(lines) == 2:
        return None
    note = (
        "\n\nJudge: mean over the looks' prompts, against the base model's; each seed's own numbers, with commas"
        " between them. Lost at the alarm: judge's best less the judge at the first alarm, and as a share of the best"
        " gain where there was one. KL: nats of the look with the best judge, and of the alarm's. Kept of: the update"
        " whose weights a rollback kept, 0 for the base model. F of all looks comes on top of the training's, and is"
        " not in its minutes either."
    )
    return "\n".join(lines) + note


def _alarms(seen: Sequence[Sequence[Row]]) -> list[str]:
    first: list[str] = []
    best: list[str] = []
    lost: list[str] = []
    spent: list[str] = []
    for run in seen:
        alarm = next((i for i, look in enumerate(run) if look["state"] == "hacking"), None)
        base = {"judge": run[0]["base"], "kl": 0.0}
        peak = max([base, *(run if alarm is None else run[:alarm])], key=lambda look: look["judge"])
        gain = peak["judge"] - base["judge"]
        best.append(f"{gain:+.2f}")
        if alarm is None:
            first.append("none")
            lost.append("-")
            spent.append("-")
        else:
            fall = peak["judge"] - run[alarm]["judge"]
            first.append(str(run[alarm]["update"]))
            lost.append(f"{fall:.2f} ({fall / gain:.0%})" if gain > 0 else f"{fall:.2f}")
            spent.append(f"{peak['kl']:.0f} to {run[alarm]['kl']:.0f}")
    restored = [str(run[-1]["restored"]) for run in seen if run[-1]["restored"] is not None]
    return [
        str(sum(each != "none" for each in first)),
        ", ".join(first),
        ", ".join(best),
        ", ".join(lost),
        ", ".join(spent),
        ", ".join(restored) or "-",
        f"{fmean(sum(look['forwards'] for look in run) for run in seen):,.0f}",
    ]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
