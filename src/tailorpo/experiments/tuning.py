"""Which of the settings that were tried won, by method: the largest mean gain of the trained reward.

tune      a grid of settings
refine    its winner with one thing changed at a time
confirm   the two best of both from a second seed; the mean of the two seeds decides
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tailorpo.experiments.catalogue import FINALISTS, METHODS
from tailorpo.experiments.grid import Grid
from tailorpo.experiments.tables import gains, kept

Overrides = tuple[str, ...]
Winners = dict[str, Overrides]

TIE = 0.05
"""Mean gains that differ by less are not told apart by two seeds."""


@dataclass(frozen=True)
class _Score:
    """Mean gain of the trained reward, and diversity as a share of the base's."""

    gain: float
    diversity: float


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
    """The better finalist over both seeds; the best of the first seed where the second is missing."""
    first, found = _candidates(tune, tuned, refine, content), Winners()
    for method, scores in first.items():
        best, *rest = _best(scores)[: len(FINALISTS)]
        found[method] = best
        again = [_score(confirm, f"{method}, {place}") for place in FINALISTS]
        if rest and again[0] and again[1]:
            (second,) = rest
            means = [
                _Score((a.gain + b.gain) / 2, (a.diversity + b.diversity) / 2)
                for a, b in zip((scores[best], scores[second]), (again[0], again[1]), strict=True)
            ]
            lead = means[0].gain - means[1].gain
            if (means[0].diversity < means[1].diversity) if abs(lead) < TIE else lead < 0:
                found[method] = second
    return found


def _candidates(
    tune: Grid, tuned: dict[str, Any], refine: Grid, content: dict[str, Any]
) -> dict[str, dict[Overrides, _Score]]:
    """Everything that was tried of a method, with its score; a change of `refine` replaces what it changes."""
    found, after = _scores(tune, tuned), _scores(refine, content)
    for method, scores in found.items():
        start = _best(scores)[0]
        for change, score in after.get(method, {}).items():
            replaced = {setting.partition("=")[0] for setting in change}
            scores[(*(each for each in start if each.partition("=")[0] not in replaced), *change)] = score
    return found


def _best(scores: dict[Overrides, _Score]) -> list[Overrides]:
    return sorted(scores, key=lambda overrides: -scores[overrides].gain)


def _scores(grid: Grid, content: dict[str, Any]) -> dict[str, dict[Overrides, _Score]]:
    """Scores by method and overrides, of the methods whose settings have all been measured."""
    found: dict[str, dict[Overrides, _Score]] = {}
    for method in METHODS:
        variants = [variant for variant in grid.variants if variant.name.startswith(f"{method.name},")]
        values = {variant.overrides: _score(content, variant.name) for variant in variants}
        scores = {overrides: score for overrides, score in values.items() if score is not None}
        if variants and len(scores) == len(variants):
            found[method.name] = scores
    return found


def _score(content: dict[str, Any], variant: str) -> _Score | None:
    cells = [cell for cell in content["cells"] if cell["variant"] == variant]
    values = gains(cells)
    return None if values is None else _Score(float(values.mean()), kept(cells) or 0.0)
