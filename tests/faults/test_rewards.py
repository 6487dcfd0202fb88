"""Rewards of the user's own that fail, through the whole command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_run import refused, tailorpo, write_recipe

MODULE = """
import torch

calls = 0

def good(images, prompts):
    return images.mean(dim=(1, 2, 3))

def raises(images, prompts):
    raise RuntimeError("the camera is off")

def later(images, prompts):
    global calls
    calls += 1
    if calls > 6:
        raise RuntimeError("out of film")
    return good(images, prompts)

def shape(images, prompts):
    return images.mean(dim=(2, 3))

def text(images, prompts):
    return ["nice"] * len(prompts)

def nan(images, prompts):
    scores = good(images, prompts)
    scores[0] = float("nan")
    return scores

def infinite(images, prompts):
    return good(images, prompts) / 0

def blind(images, prompts):
    return good(images.nan_to_num(), prompts)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A module of the user's in the working directory, under a name of its own for every test."""
    name = "rewards_" + "".join(char if char.isalnum() else "_" for char in request.node.name)
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("raises", ["RuntimeError", "the camera is off"]),
        ("shape", ["shape"]),
        ("text", ["text"]),
        ("nan", ["NaN"]),
        ("infinite", ["inf"]),
        ("goood", ["goood", "did you mean `good`"]),
    ],
)
def test_a_reward_that_fails_is_named_and_leaves_nothing_behind(
    tmp_path: Path, tiny_folder: Path, module: str, function: str, words: list[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny_folder, reward={"name": f"{module}:{function}"})
    output = refused("train", recipe, "--out", tmp_path / "run")
    assert f"{module}:{function}" in output
    for word in words:
        assert word.lower() in output.lower()
    assert not (tmp_path / "run").exists()  # mend it and type the same command again


def test_a_module_that_is_not_there(tmp_path: Path, tiny_folder: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_folder, reward={"name": "no_such_module_xyz:f"})
    assert "no_such_module_xyz" in refused("train", recipe, "--out", tmp_path / "run")
    guided = {"name": "tailorpo", "train_steps": 2, "guidance": {"form": "sigma"}}
    recipe = write_recipe(tmp_path, tiny_folder, reward={"name": "no_such_module_xyz:f"}, algorithm=guided)
    assert "no_such_module_xyz" in refused("show", recipe)  # guidance asks whether it is differentiable


def test_a_reward_that_fails_later_keeps_what_was_trained(tmp_path: Path, tiny_folder: Path, module: str) -> None:
    recipe = write_recipe(tmp_path, tiny_folder, reward={"name": f"{module}:later"}, updates=5)
    output = refused("train", recipe, "--out", tmp_path / "run")
    assert "out of film" in output
    assert list((tmp_path / "run" / "checkpoints").glob("update-*"))
    (tmp_path / f"{module}.py").write_text(MODULE.replace("calls > 6", "False"))


def test_invalid_rewards_can_be_skipped_and_are_counted(tmp_path: Path, tiny_folder: Path, module: str) -> None:
    recipe = write_recipe(tmp_path, tiny_folder, reward={"name": f"{module}:nan"}, on_invalid_reward="skip", updates=1)
    result = tailorpo("train", recipe, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    (line,) = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line["invalid"] > 0
    assert line["pairs"] > line["invalid"] or line["pairs"] == 2


def test_a_loss_that_is_no_number_stops_with_the_last_good_checkpoint(
    tmp_path: Path, tiny_folder: Path, module: str
) -> None:
    recipe = write_recipe(tmp_path, tiny_folder, reward={"name": f"{module}:blind"}, optimizer={"lr": 1e30})
    result = tailorpo("train", recipe, "--out", tmp_path / "run")
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    assert "error:" in result.output
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["loss"] is not None for line in lines)
    saved = sorted((tmp_path / "run" / "checkpoints").glob("update-*"))
    assert len(saved) == len(lines) >= 1
