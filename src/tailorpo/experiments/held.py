"""How well the cells of a grid held their KL target, update by update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

Row = Mapping[str, Any]

BAND = math.log(1.2)
"""Within 20 %, in logarithms, so that half and twice are equally far."""


def kl_of(rows: Sequence[Row]) -> list[float]:
    """What a cell's result keeps: the KL of an update's trajectories over all steps, nats, of every update."""
    return [float(f"{row['kl_trajectory']:.4g}") for row in rows]


def held_table(cells: Mapping[str, Sequence[Row]]) -> str | None:
    """One row for every variant with a target; None where there is none."""
    head = ["KL target", "runs", "nats", "first within 20 %, update", "KL from half-time on, of the target"]
    head += ["updates from half-time on within 20 %"]
    lines = [_row(head), _row(["---"] * len(head))]
    for name, runs in cells.items():
        aimed = [run for run in runs if run.get("kl_by_update")]
        if aimed:
            lines.append(_row([name, str(len(aimed)), *_held(aimed)]))
    if len(lines) == 2:
        return None
    note = (
        "\n\nKL of the trajectories of an update, all steps, to the base model; each seed's own numbers, with commas"
        " between them. From half-time on: mean over the second half of the updates."
    )
    return "\n".join(lines) + note


def _held(runs: Sequence[Row]) -> list[str]:
    targets = sorted({run["kl_target"] for run in runs})
    first: list[str] = []
    mean: list[str] = []
    within: list[str] = []
    for run in runs:
        ratios = [kl / run["kl_target"] for kl in run["kl_by_update"]]
        inside = [ratio > 0 and abs(math.log(ratio)) <= BAND for ratio in ratios]
        late = len(ratios) // 2
        first.append(str(inside.index(True) + 1) if any(inside) else "never")
        mean.append(f"{fmean(ratios[late:]):.2f}")
        within.append(f"{100 * fmean(inside[late:]):.0f} %")
    return [", ".join(f"{target:g}" for target in targets), ", ".join(first), ", ".join(mean), ", ".join(within)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
