"""What the README shows is what the code is."""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path

from tailorpo import Run
from tailorpo.train import Session

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_loop_is_printed_whole() -> None:
    assert textwrap.dedent(inspect.getsource(Session.update)) in blocks()


def test_the_python_example_builds_the_run_it_shows() -> None:
    (example,) = [block for block in blocks() if "RunDirectory.create" in block]
    names: dict[str, object] = {}
    before_training, _, last = example.partition("model = train(")
    exec(before_training, names)
    assert isinstance(names["run"], Run)
    assert "reporter=" in last


def test_every_link_into_the_repository_leads_somewhere() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"
