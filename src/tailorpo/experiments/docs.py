"""Puts the tables of the results into pages, between two comments, so that no number is ever copied by hand.

<!-- experiment: methods -->             table and plot of an experiment
<!-- experiment: methods: D3PO -->       its rows of one variant (or several: A | B), one for every reward
<!-- experiment: methods: * -->          one row for every variant, of the experiment's first reward
whatever stands here is replaced, by "Not measured yet." where there is no result
<!-- end -->
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from tailorpo.errors import UserError
from tailorpo.experiments.conduct import find
from tailorpo.experiments.grid import Grid
from tailorpo.experiments.runner import read_results
from tailorpo.experiments.tables import variant_table

_PLACE = re.compile(r"<!-- experiment: ([a-z-]+)(?:: ([^\n]+?))? -->\n.*?<!-- end -->", re.DOTALL)
MISSING = "Not measured yet."


def include(pages: Path, results: Path) -> list[str]:
    """Rewrite the places of a page, or of all pages in a folder, and return the experiments that have no result.

    Raises:
        UserError: there is no such page, it has no place, or a place names no experiment.
    """
    if not pages.exists():
        raise UserError(f"there is no page {pages}")
    missing: dict[str, None] = {}
    found = sorted(pages.rglob("*.md")) if pages.is_dir() else [pages]
    texts = {page: page.read_text(encoding="utf-8") for page in found}
    texts = {page: text for page, text in texts.items() if _PLACE.search(text)}
    if not texts:
        raise UserError(
            f"{pages} has no place for a result: write `<!-- experiment: NAME -->` and `<!-- end -->` below"
        )
    for page, text in texts.items():

        def fill(match: re.Match[str], page: Path = page) -> str:
            experiment, rows = find(match[1]), match[2]
            body = _rows(experiment, rows, results) if rows else _whole(experiment.name, results, page)
            if body is None:
                missing[experiment.name] = None
            place = f"{experiment.name}: {rows}" if rows else experiment.name
            return f"<!-- experiment: {place} -->\n{body or MISSING}\n<!-- end -->"

        page.write_text(_PLACE.sub(fill, text), encoding="utf-8")
    return list(missing)


def _whole(name: str, results: Path, page: Path) -> str | None:
    table = results / f"{name}.md"
    if not table.is_file():
        return None
    picture = os.path.relpath(results / f"{name}.webp", page.parent)
    # Headings of a table become one level deeper than the page's own.
    content = re.sub(r"^### ", "#### ", table.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return f"{content.strip()}\n\n![{name}]({picture})"


def _rows(experiment: object, rows: str, results: Path) -> str | None:
    if not isinstance(experiment, Grid):
        raise UserError("only an experiment made of training runs has rows to choose from")
    names = [variant.name for variant in experiment.variants]
    wanted = names if rows == "*" else [name.strip() for name in rows.split("|")]
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise UserError(f"{experiment.name} has no {', '.join(unknown)}; it has {', '.join(names)}")
    rewards = list(experiment.seeds)[: 1 if rows == "*" else None]
    return variant_table(experiment, read_results(results / f"{experiment.name}.json"), wanted, rewards)
