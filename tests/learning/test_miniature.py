"""On the bundled miniature a short run raises the evaluated reward, significantly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tailorpo.evaluate import evaluate
from tailorpo.run import Run
from tailorpo.rundir import RunDirectory
from tailorpo.train import train

RECIPES = Path(__file__).parents[2] / "recipes"
SHORT = ("updates=10", "optimizer.lr=2e-3", "eval.seeds=2", "eval.prompts_unseen=null", "eval.judge=null")
ANIMALS = "prompts={list: [a cat, a dog, a fox, a frog, a pig, a lion, a bear, a rabbit]}"


class Silent:
    """A reporter that says nothing."""

    def phase(self, text: str) -> None: ...
    def step(self, done: int, total: int) -> None: ...
    def update(self, metrics: dict[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...


@pytest.mark.timeout(400)
def test_a_short_run_raises_the_evaluated_reward(tmp_path: Path) -> None:
    run = Run.load(RECIPES / "emoji_tailorpo_g.yaml", [*SHORT, ANIMALS])
    directory = RunDirectory.create(tmp_path / "run", run)
    model = train(run, directory, reporter=Silent())
    reward = evaluate(run, directory, model, reporter=Silent())["groups"]["seen"]["metrics"]["reward"]
    assert reward["low"] > 0, f"the interval of the paired difference includes zero: {reward}"
