"""`tailorpo jensen` as people type it, on a random tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_run import refused, tailorpo, write_recipe

SMALL = ("--states", 5, "--continuations", 2, "--plain-states", 4, "--probes", 1, "--batch", 8)
TWO = [{"name": "brightness"}, {"name": "jpeg_compressibility", "weight": 0.5}]


def content(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "jensen.json").read_text())


def jensen(*arguments: str | Path | int) -> str:
    result = tailorpo("jensen", *map(str, arguments))
    assert result.exit_code == 0, result.output
    return result.output


def test_a_recipe_is_measured_and_a_stopped_measurement_ends_the_same(tmp_path: Path, tiny_folder: Path) -> None:
    recipe, out = write_recipe(tmp_path, tiny_folder, reward=TWO), tmp_path / "out"
    output = jensen(recipe, *SMALL, "--steps", "all", "--out", out)
    # 5 states: 4 steps of the walk; siblings at steps 0, 1, 2 with 3, 2, 1 steps left: 2 + 2 (lookahead) or 2 and
    # 2 * 2 * (left - 1) for the continuations. 4 plain states: (4 + 2 * 3) / 2.
    assert f"{5 * (4 + (4 + 8) + (4 + 4) + 2) + 4 * 5} F" in output
    assert output.index(" F (guided") < output.index("ranking siblings")
    found = content(out)
    assert list(found["rewards"]) == ["brightness", "jpeg_compressibility", "weighted sum"]
    assert found["score"] == "weighted sum"
    assert [row["k"] for row in found["steps"]] == [0, 1, 2, 3]
    for row in found["steps"]:
        assert {"k", "time", "v", "misrank", "misrank_low", "misrank_high", "correlation", "noise_weight"} <= set(row)
        assert 0 <= row["misrank_low"] <= row["misrank"] <= row["misrank_high"] <= 1
    assert found["steps"][-1]["misrank_high"] == 0, "a finished picture's step reward is its reward"
    # The gap of a weighted sum is the weighted sum of gaps; JPEG size has no gradient and so no bounds.
    for k in range(4):
        parts = [found["rewards"][name]["steps"][k]["gap"] for name in ("brightness", "jpeg_compressibility")]
        assert found["steps"][k]["gap"] == pytest.approx(parts[0] + 0.5 * parts[1], rel=1e-4, abs=1e-7)
    bounds = [found["rewards"][name]["steps"][0]["bounds"] for name in ("brightness", "jpeg_compressibility")]
    assert bounds[0]["lipschitz"] > 0
    assert bounds[1]["lipschitz"] is None
    assert [row["k"] for row in found["posterior"]] == [0, 1, 2]
    # Killed in the middle of a line: the rest is measured again, with the same numbers.
    rows = (out / "rows.jsonl").read_text().splitlines(keepends=True)
    (out / "rows.jsonl").write_text("".join(rows[: len(rows) // 2]) + rows[len(rows) // 2][:20])
    (out / "jensen.json").unlink()
    jensen(recipe, *SMALL, "--steps", "all", "--out", out)
    assert content(out) == found
    assert sorted((out / "rows.jsonl").read_text().splitlines()) == sorted(row.rstrip("\n") for row in rows)
    # More states add rows; the same states again need none.
    before = (out / "rows.jsonl").read_text()
    jensen(recipe, *SMALL, "--steps", "1,3", "--out", out)
    assert (out / "rows.jsonl").read_text() == before
    assert content(out)["steps"][0]["v"] == found["steps"][1]["v"]
    jensen(recipe, *SMALL, "--states", 6, "--steps", "1,3", "--out", out)
    added = (out / "rows.jsonl").read_text().removeprefix(before).splitlines()
    assert [(json.loads(row)["k"], json.loads(row)["state"]) for row in added] == [(-1, 5), (1, 5), (3, 5)]


def test_pages_are_self_contained_and_say_the_verdict(tmp_path: Path, tiny_folder: Path) -> None:
    out = tmp_path / "out"
    recipe = write_recipe(tmp_path, tiny_folder)
    output = jensen(recipe, *SMALL, "--plain-states", 0, "--steps", "0,3", "--out", out)
    verdict = content(out)["rewards"]["brightness"]["verdict"]
    page, text = (out / "jensen.html").read_text(), (out / "jensen.md").read_text()
    for place in (output, page, text):
        assert verdict["headline"] in place
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", page)
    assert "<script" not in page
    assert content(out)["posterior"] == []
    assert text.count("\n| ") == 4, "a head, its rule, and two steps"


def test_a_run_is_measured_with_what_it_has_learnt(tmp_path: Path, tiny_folder: Path) -> None:
    run = tmp_path / "run"
    recipe = write_recipe(tmp_path, tiny_folder, updates=2, optimizer={"lr": 0.05})
    assert tailorpo("train", recipe, "--out", run).exit_code == 0
    jensen(run, *SMALL, "--plain-states", 0)
    jensen(run, *SMALL, "--plain-states", 0, "--base")
    jensen(recipe, *SMALL, "--plain-states", 0, "--out", tmp_path / "recipe")
    trained, base, untrained = (
        content(folder) for folder in (run / "jensen", run / "jensen-base", tmp_path / "recipe")
    )
    assert trained["weights"] == "trained for 2 updates"
    assert base["steps"] == untrained["steps"]
    assert trained["steps"] != base["steps"]


def test_the_cost_alone(tmp_path: Path, tiny_folder: Path) -> None:
    out = tmp_path / "out"
    output = jensen(write_recipe(tmp_path, tiny_folder), "--dry-run", "--out", out)
    assert "F (guided network evaluations)" in output
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--states", "3"), "--states must be at least 4, got 3"),
        (("--continuations", "1", "--probes", "0"), "--probes must be at least 1, got 0"),
        (("--plain-states", "2"), "--plain-states must be at least 4, or 0 for none, got 2"),
        (("--steps", "1,4"), "--steps: there is no step 4; a run of 4 steps has 0 to 3"),
        (("--steps", "early"), "--steps takes `all` or whole numbers with commas, such as 0,4,9,14; got 'early'"),
        (("sampler.eta=0.0", "algorithm={name: reward_backprop}"), "steps without noise have no siblings to rank"),
        (
            ("reward=[{name: brightness}, {name: colourfulness}]", "ensemble.rule=mean"),
            "add ensemble=null to measure its members",
        ),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str, tmp_path: Path, tiny_folder: Path) -> None:
    assert message in refused("jensen", write_recipe(tmp_path, tiny_folder), *arguments)


def test_a_run_that_has_saved_nothing_yet(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "run").mkdir()
    write_recipe(tmp_path, tiny_folder).rename(tmp_path / "run" / "run.yaml")
    assert "has no LoRA yet" in refused("jensen", tmp_path / "run", *map(str, SMALL))
