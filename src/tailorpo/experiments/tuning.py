"""Which of the settings that were tried won, by method: the largest mean gain of the trained reward.

`tune` tries a grid, `refine` changes one thing of its winner at a time.
"""

from __future__ import annotations

from typing import Any

from tailorpo.experiments.catalogue import METHODS
from tailorpo.experiments.grid import Grid
from tailorpo.experiments.tables import gains

Winners = dict[str, tuple[str, ...]]


def winners(grid: Grid, content: dict[str, Any]) -> Winners:
    """The overrides that won, by method; methods whose settings have not all been measured have no winner."""
    found = _scores(grid, content)
    return {method: max(scores, key=lambda overrides: scores[overrides]) for method, scores in found.items()}


def refined(tune: Grid, tuned: dict[str, Any], refine: Grid, content: dict[str, Any]) -> Winners:
    """The winners of `tune`, or where one of their changes gained more, these with the change."""
    found = winners(tune, tuned)
    before, after = _scores(tune, tuned), _scores(refine, content)
    for method in found.keys() & after.keys():
        change = max(after[method], key=lambda overrides: after[method][overrides])
        if after[method][change] > before[method][found[method]]:
            replaced = {setting.partition("=")[0] for setting in change}
            found[method] = (*(each for each in found[method] if each.partition("=")[0] not in replaced), *change)
    return found


def _scores(grid: Grid, content: dict[str, Any]) -> dict[str, dict[tuple[str, ...], float]]:
    """Mean gains by method and overrides, of the methods whose settings have all been measured."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for method in METHODS:
        variants = [variant for variant in grid.variants if variant.name.startswith(f"{method.name},")]
        scores: dict[tuple[str, ...], float] = {}
        for variant in variants:
            values = gains([cell for cell in content["cells"] if cell["variant"] == variant.name])
            if values is not None:
                scores[variant.overrides] = float(values.mean())
        if variants and len(scores) == len(variants):
            found[method.name] = scores
    return found
