"""A newcomer can follow one training step: the functions that one update calls are short, and few.

How it is measured, and what is left out and why, stands in tests/path_of_one_step.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from path_of_one_step import METHODS, longest, measure, total
from tiny import save_tiny_xl_model

LIMIT = 900
DOCS = Path(__file__).parents[2] / "docs" / "concepts.md"
WRITTEN = {
    name: int(lines) for name, lines in re.findall(r"^\| ([^|]+) \| (\d+) \| \d+ \| \d+ \|$", DOCS.read_text(), re.M)
}


@pytest.fixture(scope="module")
def models(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"sd": tiny_folder, "sdxl": save_tiny_xl_model(tmp_path_factory.mktemp("xl") / "model")}


@pytest.mark.parametrize("name", METHODS)
def test_one_step_can_be_read_in_one_sitting(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    functions = measure(name, models, tmp_path)
    lines, called = total(functions), {qualified for _, qualified, _ in functions}
    # What an update cannot do without, so that a measurement that saw nothing does not pass.
    assert {"Session.update", "Learner.step", "LatentDiffusion.predict", "UpdateMetrics.summary"} <= called
    assert lines <= LIMIT, (
        f"one update of {name} runs through {lines} code lines, at most {LIMIT} are allowed. Move what an option needs"
        f" out of the way of those who do not use it. The longest functions:\n{longest(functions)}"
    )
    assert lines == pytest.approx(int(WRITTEN[name]), rel=0.03), (
        f"docs/concepts.md says {WRITTEN[name]} of {name}; put what `python tests/path_of_one_step.py` prints there"
    )
