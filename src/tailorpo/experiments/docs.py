"""Puts the tables of the results into a page, between two comments, so that no number is ever copied by hand.

<!-- experiment: methods -->
whatever stands here is replaced by the table and the plot of methods, or by "not measured yet"
<!-- end -->
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from tailorpo.errors import UserError
from tailorpo.experiments.conduct import find

_PLACE = re.compile(r"<!-- experiment: ([a-z-]+) -->\n.*?<!-- end -->", re.DOTALL)
MISSING = "Not measured yet."


def include(page: Path, results: Path) -> list[str]:
    """Rewrite the places of a page, and return the names of the experiments that have no result.

    Raises:
        UserError: there is no such page, it has no place, or a place names no experiment.
    """
    if not page.is_file():
        raise UserError(f"there is no page {page}")
    missing: list[str] = []
    text = page.read_text(encoding="utf-8")

    def fill(match: re.Match[str]) -> str:
        name = find(match[1]).name
        table = results / f"{name}.md"
        body = MISSING
        if table.is_file():
            picture = os.path.relpath(results / f"{name}.webp", page.parent)
            # Headings of a table become one level deeper than the page's own.
            content = re.sub(r"^### ", "#### ", table.read_text(encoding="utf-8"), flags=re.MULTILINE)
            body = f"{content.strip()}\n\n![{name}]({picture})"
        else:
            missing.append(name)
        return f"<!-- experiment: {name} -->\n{body}\n<!-- end -->"

    changed, count = _PLACE.subn(fill, text)
    if not count:
        raise UserError(f"{page} has no place for a result: write `<!-- experiment: NAME -->` and `<!-- end -->` below")
    page.write_text(changed, encoding="utf-8")
    return missing
