"""`tailorpo experiment` as people type it, on a random tiny model."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_run import refused, tailorpo

from tailorpo.experiments.docs import MISSING

ROOT = Path(__file__).parents[2]
RECIPES = ("--recipes", ROOT / "recipes")
RESULTS = ROOT / "benchmarks" / "results" / "experiments"

pytest.importorskip("matplotlib")


def results(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "quick" / "results" / f"{name}.json").read_text())


def test_the_list_names_every_experiment_of_the_page() -> None:
    output = tailorpo("experiment", "--list").output
    page = (ROOT / "docs" / "experiments.md").read_text()
    names = [line.split()[2] for line in page.splitlines() if line.startswith("<!-- experiment:")]
    assert len(names) == 19
    listed = [line.split()[0] for line in output.splitlines()[1:] if line and not line.startswith(" ")]
    assert listed == names


def test_methods_in_quick_trains_evaluates_and_is_then_finished(tmp_path: Path, tiny_folder: Path) -> None:
    """One variant through a process of its own; the command of the whole grid differs by --only."""
    asked = ("experiment", "methods", f"model.path={tiny_folder}", "--quick", "--only", "tailorpo.*")
    asked = (*asked, *RECIPES, "--work", tmp_path)
    listed = tailorpo(*asked, "--dry-run")
    assert "tailorpo.emoji_preference.1  1        60" in listed.output
    assert "0 of 1 finished" in listed.output
    result = tailorpo(*asked)
    assert result.exit_code == 0, result.output
    assert "done: tailorpo.emoji_preference.1  (1 of 1)" in result.output
    (cell,) = results(tmp_path, "methods")["cells"]
    assert (cell["variant"], cell["updates"], cell["forwards"]) == ("TailorPO", 1, 60)
    assert "### emoji_preference" in (tmp_path / "quick" / "results" / "methods.md").read_text()
    assert (tmp_path / "quick" / "results" / "methods.webp").stat().st_size > 5000
    assert "1 of 1 finished; 0 s left" in tailorpo(*asked, "--dry-run").output
    assert "begun" not in tailorpo(*asked).output


@pytest.mark.parametrize("name", ["step-reward", "gradient-direction", "pair-worth", "pushed", "diversity-price"])
def test_measurements_in_quick(name: str, tmp_path: Path, tiny_folder: Path) -> None:
    result = tailorpo("experiment", name, f"model.path={tiny_folder}", "--quick", *RECIPES, "--work", tmp_path)
    assert result.exit_code == 0, result.output
    content, folder = results(tmp_path, name), tmp_path / "quick" / "results"
    assert content["question"]
    assert (folder / f"{name}.md").read_text().count("\n|") >= 3
    assert (folder / f"{name}.webp").stat().st_size > 5000
    if name == "gradient-direction":
        for method in content["methods"].values():
            # what was asked of the step, to first order, is what the exact log-ratios say happened
            assert method["all"]["shift"] == pytest.approx(0.01, rel=0.02)
        assert content["methods"]["TailorPO"]["all"]["reversed"][0] == 0


def test_what_cannot_be_is_said() -> None:
    assert "there is no experiment 'methodz'" in refused("experiment", "methodz")
    assert "no cell of methods matches nobody" in refused("experiment", "methods", "--only", "nobody", *RECIPES)
    assert "--recipes" in refused("experiment", "methods", "--recipes", "/nowhere")
    assert "--states" in refused("experiment", "methods", "--states", "3", *RECIPES)
    assert "pushed has no pairs" in refused("experiment", "pushed", "--pairs", "3", *RECIPES)


def test_the_page_gets_the_results_there_are(tmp_path: Path) -> None:
    page, folder = tmp_path / "docs" / "page.md", tmp_path / "results"
    for each in (page.parent, folder):
        each.mkdir()
    places = [f"<!-- experiment: {name} -->\nold\n<!-- end -->\n" for name in ("methods", "tune")]
    page.write_text("# Page\n\n" + "\n".join(places) + "after\n")
    (folder / "methods.md").write_text("Budget.\n\n### emoji_preference\n\n| a \\1 |\n")
    asked = ("experiment", "--docs", page, "--results", folder)
    output = tailorpo(*asked).output
    assert "not measured yet: tune" in output
    filled = page.read_text()
    assert "\nold\n" not in filled
    assert "#### emoji_preference\n\n| a \\1 |\n\n![methods](../results/methods.webp)\n<!-- end -->" in filled
    assert filled.endswith(f"<!-- experiment: tune -->\n{MISSING}\n<!-- end -->\nafter\n")
    tailorpo(*asked)
    assert page.read_text() == filled
    page.write_text("nothing")
    assert "has no place" in refused(*asked)


def test_the_pages_hold_what_the_results_say(tmp_path: Path) -> None:
    """As the command writes them: rows of single methods on their pages, the whole on the experiments' page."""
    places = 0
    for source in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = source.read_text()
        if "<!-- experiment: " in text:
            places += text.count("<!-- experiment: ")
            page = tmp_path / source.relative_to(ROOT)
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(text)
            tailorpo("experiment", "--docs", page, "--results", RESULTS)
            where = os.path.relpath(RESULTS, page.parent)
            assert page.read_text().replace(f"({where}/", "(") == re.sub(
                r"\((?:\.\./)+benchmarks/results/experiments/", "(", text
            ), source
    assert places > 9
    page.write_text("<!-- experiment: methods: Nobody -->\n<!-- end -->\n")
    assert "has no Nobody; it has DDPO" in refused("experiment", "--docs", page, "--results", RESULTS)
