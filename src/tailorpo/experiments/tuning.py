"""Which of the settings that were tried won, by method: the largest mean gain of the trained reward.

tune      a grid of settings
refine    its winner with one thing changed at a time
confirm   the two best of both from a second seed; the mean of the two seeds decides
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

from tailorpo.experiments.catalogue import FINALISTS, METHODS
from tailorpo.experiments.grid import Grid
from tailorpo.experiments.tables import gains

Overrides = tuple[str, ...]
Winners = dict[str, Overrides]


def winners(grid: Grid, content: dict[str, Any]) -> Winners:
    """The overrides that won, by method; methods whose settings have not all been measured have no winner."""
    return {method: _best(scores)[0] for method, scores in _scores(grid, content).items()}


def finalists(tune: Grid, tuned: dict[str, Any], refine: Grid, content: dict[str, Any]) -> Winners:
    """The best and the second best of each method, under the names that `confirm` has for them."""
    found = _candidates(tune, tuned, refine, content)
    return {
        f"{method}, {place}": overrides
        for method, scores in found.items()
        for place, overrides in zip(FINALISTS, _best(scores), strict=False)
    }


def confirmed(
    tune: Grid, tuned: dict[str, Any], refine: Grid, content: dict[str, Any], *, confirm: dict[str, Any]
) -> Winners:
    """The finalist with the larger mean over both seeds; the best of the first seed where the second is missing."""
    first, found = _candidates(tune, tuned, refine, content), Winners()
    for method, scores in first.items():
        best, *rest = _best(scores)[: len(FINALISTS)]
        again = [_gain(confirm, f"{method}, {place}") for place in FINALISTS]
        found[method] = best
        if rest and None not in again:
            means = [fmean((scores[each], own or 0.0)) for each, own in zip((best, *rest), again, strict=True)]
            found[method] = (best, *rest)[means.index(max(means))]
    return found


def _candidates(
    tune: Grid, tuned: dict[str, Any], refine: Grid, content: dict[str, Any]
) -> dict[str, dict[Overrides, float]]:
    """Everything that was tried of a method, with its mean gain; a change of `refine` replaces what it changes."""
    found, after = _scores(tune, tuned), _scores(refine, content)
    for method, scores in found.items():
        start = _best(scores)[0]
        for change, gain in after.get(method, {}).items():
            replaced = {setting.partition("=")[0] for setting in change}
            scores[(*(each for each in start if each.partition("=")[0] not in replaced), *change)] = gain
    return found


def _best(scores: dict[Overrides, float]) -> list[Overrides]:
    return sorted(scores, key=lambda overrides: -scores[overrides])


def _scores(grid: Grid, content: dict[str, Any]) -> dict[str, dict[Overrides, float]]:
    """Mean gains by method and overrides, of the methods whose settings have all been measured."""
    found: dict[str, dict[Overrides, float]] = {}
    for method in METHODS:
        variants = [variant for variant in grid.variants if variant.name.startswith(f"{method.name},")]
        values = {variant.overrides: _gain(content, variant.name) for variant in variants}
        scores = {overrides: gain for overrides, gain in values.items() if gain is not None}
        if variants and len(scores) == len(variants):
            found[method.name] = scores
    return found


def _gain(content: dict[str, Any], variant: str) -> float | None:
    values = gains([cell for cell in content["cells"] if cell["variant"] == variant])
    return None if values is None else float(values.mean())
