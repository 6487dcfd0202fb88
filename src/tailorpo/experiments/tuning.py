"""Which of the settings that `tune` tried won, by method: the largest mean gain of the trained reward."""

from __future__ import annotations

from typing import Any

from tailorpo.experiments.catalogue import METHODS
from tailorpo.experiments.grid import Grid
from tailorpo.experiments.tables import gains


def winners(grid: Grid, content: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """The overrides that won, by method; methods whose settings have not all been measured have no winner."""
    found: dict[str, tuple[str, ...]] = {}
    for method in METHODS:
        variants = [variant for variant in grid.variants if variant.name.startswith(f"{method.name},")]
        scores: dict[tuple[str, ...], float] = {}
        for variant in variants:
            values = gains([cell for cell in content["cells"] if cell["variant"] == variant.name])
            if values is not None:
                scores[variant.overrides] = float(values.mean())
        if variants and len(scores) == len(variants):
            found[method.name] = max(scores, key=lambda overrides: scores[overrides])
    return found
