"""The plot of a grid: learning curves against both costs, the final gains with their intervals, and what sentinels saw.

Colours are Okabe and Ito's, which people with colour blindness can tell apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    """Draw the finished cells, one row of panels per reward; of more variants than there are colours one row for those
    of each recipe, where the names beside the gains are the legend."""
    plt = pyplot()
    rows = list(_rows(grid, content["cells"]))
    many = len(grid.variants) > len(COLOURS)
    heights = [max(0.25 * len(variants) + 0.6, 1.8) if many else 3.2 for _, variants in rows]
    looked = any(cell.get("sentinels") for cell in content["cells"])
    size = (16 if looked else 12, sum(heights))
    figure, axes = plt.subplots(
        len(rows), 4 if looked else 3, figsize=size, height_ratios=heights, squeeze=False, layout="constrained"
    )
    for panels, (reward, variants) in zip(axes, rows, strict=True):
        looks = {name: _look(place) for place, name in enumerate(variants)}
        if not many:
            looks = {name: _look([each.name for each in grid.variants].index(name)) for name in variants}
        for panel, (axis, label) in zip(panels[:2], AXES, strict=True):
            for name, cells in variants.items():
                _curve(panel, cells, axis, look=looks[name], label=name)
            panel.set_xlabel(label)
            panel.set_ylabel(f"{reward}\nplain samples,\nseen prompts")
        if not many:
            panels[0].legend(frameon=False, fontsize=7)
        _final(panels[2], variants, looks)
        panels[2].set_xlabel(f"gain of {reward}, seen prompts")
        if looked:
            _looks(panels[3], variants, looks)
    for reward in grid.seeds:
        for column in zip(
            *(panels[:3] for panels, (each, _) in zip(axes, rows, strict=True) if each == reward), strict=True
        ):
            _align(column)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _rows(grid: Grid, cells: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, list[dict[str, Any]]]]]:
    """The finished variants of each row of panels, and its reward."""
    recipes = {variant.name: variant.recipe if len(grid.variants) > len(COLOURS) else "" for variant in grid.variants}
    for reward in grid.seeds:
        found = by_variant(grid, cells, reward)
        for recipe in dict.fromkeys(recipes[name] for name in found):
            yield reward, {name: each for name, each in found.items() if recipes[name] == recipe}


def _look(place: int) -> dict[str, str]:
    """A colour, and a marker and a line for those that have to share one."""
    again, colour = divmod(place, len(COLOURS))
    marker, line = (("o", "-"), ("s", "--"), ("^", ":"))[again % 3]
    return {"color": COLOURS[colour], "marker": marker, "linestyle": line}


def _curve(panel: Any, cells: list[dict[str, Any]], axis: str, *, look: dict[str, str], label: str) -> None:
    """The mean over seeds, and every seed thinly."""
    lines = [([point[axis] / 1000 for point in cell["curve"]], [p["reward"] for p in cell["curve"]]) for cell in cells]
    for xs, ys in lines:
        panel.plot(xs, ys, color=look["color"], linewidth=0.6, alpha=0.3)
    if len({len(xs) for xs, _ in lines}) == 1:
        xs, ys = (np.mean([line[part] for line in lines], axis=0) for part in (0, 1))
        panel.plot(xs, ys, linewidth=1.8, markersize=3.5, label=label, **look)


def _looks(panel: Any, variants: dict[str, list[dict[str, Any]]], looks: dict[str, dict[str, str]]) -> None:
    """Every run's judge as its sentinels saw it, against the root of the KL, up to its first alarm (a cross)."""
    for name, cells in variants.items():
        for cell in cells:
            seen: list[dict[str, Any]] = cell.get("sentinels") or []
            alarm = next((at for at, look in enumerate(seen, start=1) if look["state"] == "hacking"), None)
            points = [(look["kl"] ** 0.5, look["judge"] - look["base"]) for look in seen[:alarm]]
            if points:
                xs, ys = zip((0.0, 0.0), *points, strict=True)
                panel.plot(xs, ys, color=looks[name]["color"], linewidth=0.9)
                if alarm is not None:
                    panel.plot(xs[-1:], ys[-1:], "x", color=looks[name]["color"], markersize=6)
    panel.axhline(0, color="0.6", linewidth=0.8)
    panel.set_xlabel("root of the KL, nats")
    panel.set_ylabel("judge at the looks, gain\n(x: first alarm)")


def _align(panels: Sequence[Any]) -> None:
    """One scale for all panels of a column; their rows have names where they are no numbers."""
    ends = [panel.get_xlim() for panel in panels]
    heights = [panel.get_ylim() for panel in panels]
    for panel in panels:
        panel.set_xlim(min(low for low, _ in ends), max(high for _, high in ends))
        if panel.get_ylabel():
            panel.set_ylim(min(low for low, _ in heights), max(high for _, high in heights))


def _final(panel: Any, variants: dict[str, list[dict[str, Any]]], looks: dict[str, dict[str, str]]) -> None:
    for place, (name, cells) in enumerate(variants.items()):
        values, look = gains(cells), looks[name]
        if values is None:
            continue
        estimate = iqm(values)
        low, high = (estimate.value if end is None else end for end in (estimate.low, estimate.high))
        panel.plot([low, high], [place, place], color=look["color"], linewidth=2)
        panel.plot([estimate.value], [place], color=look["color"], marker=look["marker"])
        panel.plot(values.mean(1), [place + 0.22] * len(values), "|", color=look["color"], markersize=5)
    panel.axvline(0, color="0.6", linewidth=0.8)
    panel.set_yticks(range(len(variants)), list(variants))
    panel.set_ylim(len(variants) - 0.4, -0.6)
