"""Where the recipe's files lie, and how long its stages are.

`MINIATURE_QUICK=DIR python -m miniature` runs every stage at about a hundredth of its length, from an empty cache, and
writes all its files under DIR: minutes instead of hours, to see that the recipe works, not to get a model.
"""

from __future__ import annotations

import os
from pathlib import Path

_QUICK = os.environ.get("MINIATURE_QUICK")
_ROOT = Path(_QUICK) if _QUICK else Path(__file__).parents[1]

CACHE = _ROOT / "miniature" / ".cache"
ASSETS = _ROOT / "src" / "tailorpo" / "assets"
RESULTS = _ROOT / "miniature" / "results.json"
PICTURE = _ROOT / "docs" / "img" / "miniature.webp"


def length(n: int, *, quick: int | None = None) -> int:
    """A number of steps or pictures: `n`, or in a quick run `quick` (by default a hundredth)."""
    if not _QUICK:
        return n
    return quick if quick is not None else max(4, n // 100)
