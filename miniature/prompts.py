"""The prompt lists that ship with the miniature."""

from __future__ import annotations

from miniature.concepts import CONCEPTS
from miniature.place import ASSETS

LISTS = {
    "animals": ("animal",),
    "animals_unseen": ("unseen animal",),
    "all": tuple(dict.fromkeys(c.group for c in CONCEPTS)),
}
"""File name -> the groups of concepts in it."""


def write_prompts() -> None:
    """Writes one plain prompt per line."""
    folder = ASSETS / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    for name, groups in LISTS.items():
        lines = [c.prompt for c in CONCEPTS if c.group in groups]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
