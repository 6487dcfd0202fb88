"""The plot of a grid: learning curves against both costs, and the final gains with their intervals.

Colours are Okabe and Ito's, which people with colour blindness can tell apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tailorpo.errors import UserError
from tailorpo.experiments.grid import Grid
from tailorpo.experiments.statistics import iqm
from tailorpo.experiments.tables import by_variant, gains

COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#F0E442", "#000000")
AXES = (("forwards", "guided network evaluations, thousands"), ("reward_queries", "reward queries, thousands"))


def pyplot() -> Any:
    """matplotlib's pyplot, drawing to files.

    Raises:
        UserError: it is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install 'tailorpo[experiments]'") from error
    mpl.use("agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def plot_grid(grid: Grid, content: dict[str, Any], path: Path) -> None:
    """Draw the finished cells, one row of panels per reward."""
    plt = pyplot()
    rewards = [reward for reward in grid.seeds if by_variant(grid, content["cells"], reward)]
    many = len(grid.variants) > len(COLOURS)
    # More variants than colours: one colour per method, which is what stands before the comma.
    groups = {variant.name: variant.name.partition(",")[0] if many else variant.name for variant in grid.variants}
    places = {group: index for index, group in enumerate(dict.fromkeys(groups.values()))}
    colours = {name: COLOURS[places[group] % len(COLOURS)] for name, group in groups.items()}
    height = 0.24 * len(grid.variants) if many else 3.2
    figure, axes = plt.subplots(
        len(rewards), 3, figsize=(12, height * len(rewards)), squeeze=False, layout="constrained"
    )
    for row, reward in zip(axes, rewards, strict=True):
        variants = by_variant(grid, content["cells"], reward)
        for panel, (axis, label) in zip(row[:2], AXES, strict=True):
            for name, cells in variants.items():
                _curve(panel, cells, axis, colour=colours[name], label=groups[name])
            panel.set_xlabel(label)
            panel.set_ylabel(f"{reward}\n(plain samples, seen prompts)")
        lines = dict(zip(*reversed(row[0].get_legend_handles_labels()), strict=True))
        row[0].legend(lines.values(), lines.keys(), frameon=False, fontsize=7)
        _final(row[2], variants, colours)
        row[2].set_xlabel(f"gain of {reward}, seen prompts")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _curve(panel: Any, cells: list[dict[str, Any]], axis: str, *, colour: str, label: str) -> None:
    """The mean over seeds, and every seed thinly."""
    lines = [([point[axis] / 1000 for point in cell["curve"]], [p["reward"] for p in cell["curve"]]) for cell in cells]
    for xs, ys in lines:
        panel.plot(xs, ys, color=colour, linewidth=0.6, alpha=0.45)
    if len({len(xs) for xs, _ in lines}) == 1:
        xs, ys = (np.mean([line[part] for line in lines], axis=0) for part in (0, 1))
        panel.plot(xs, ys, color=colour, linewidth=1.8, marker="o", markersize=3, label=label)


def _final(panel: Any, variants: dict[str, list[dict[str, Any]]], colours: dict[str, str]) -> None:
    for place, (name, cells) in enumerate(variants.items()):
        values = gains(cells)
        if values is None:
            continue
        estimate = iqm(values)
        low, high = (estimate.value if end is None else end for end in (estimate.low, estimate.high))
        panel.plot([low, high], [place, place], color=colours[name], linewidth=2)
        panel.plot([estimate.value], [place], "o", color=colours[name])
        panel.plot(values.mean(1), [place + 0.22] * len(values), "|", color=colours[name], markersize=5)
    panel.axvline(0, color="0.6", linewidth=0.8)
    panel.set_yticks(range(len(variants)), list(variants))
    panel.invert_yaxis()
