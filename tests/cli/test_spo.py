"""SPO from the command line, on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import refused, tailorpo, write_recipe


def spo(**options: Any) -> dict[str, Any]:
    return {"name": "spo", "candidates": 3, "first_step": 1, **options}


@pytest.mark.parametrize("update", ["inline", "buffered"])
def test_a_run_trains_evaluates_and_resumes(tmp_path: Path, tiny_folder: Path, update: str) -> None:
    recipe = write_recipe(
        tmp_path,
        tiny_folder,
        updates=2,
        algorithm=spo(update=update, threshold=0.0),
        reward={"name": "brightness", "weight": 100.0},
    )
    run = tmp_path / "run"
    result = tailorpo("train", recipe, "--out", run)
    assert result.exit_code == 0, result.output
    assert (run / "report.html").is_file()
    assert tailorpo("resume", run, "updates=3").exit_code == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [1, 2, 3]
    # 4 steps, 3 candidates from step 1 on: 1 + 3 + 2 * 3 + 3, one more for the first trained step where none is kept.
    each = 2 * (13 if update == "inline" else 14)
    assert [row["forwards"] for row in rows] == [each, 2 * each, 3 * each]
    assert [row["reward_queries"] for row in rows] == [18, 36, 54]
    for row in rows:
        assert row["pairs"] == 6
        assert row["kept"] == 1.0
        assert 0 < row["softmax_gap"] < 1
        assert [step["k"] for step in row["by_step"]] == [1, 2, 3]
    assert rows[0]["kl"] == 0.0
    assert rows[1]["kl"] > 0.0


def test_an_update_whose_pairs_are_all_dropped_trains_nothing(tmp_path: Path, tiny_folder: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_folder, updates=2, algorithm=spo(threshold=0.99))
    assert tailorpo("train", recipe, "--out", tmp_path / "run").exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["kept"] for row in rows] == [0.0, 0.0]
    assert [row["kl"] for row in rows] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("mode", "reward", "message"),
    [
        ("aware", "brightness", "no reward is told the time"),
        ("predicted", "emoji_step_preference", "is told the time: say aware"),
    ],
)
def test_the_step_reward_and_the_reward_have_to_agree(
    tmp_path: Path, tiny_folder: Path, mode: str, reward: str, message: str
) -> None:
    recipe = write_recipe(tmp_path, tiny_folder, algorithm=spo(step_reward=mode), reward={"name": reward})
    assert message in " ".join(refused("show", recipe).split())
