"""`tailorpo serve-reward` in a process of its own, and trainings that ask it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import outcome, refused, tailorpo, write_recipe

CHANGES: dict[str, Any] = {
    "updates": 1,
    "algorithm": {"name": "tailorpo", "train_steps": 2, "guidance": {"form": "sigma", "k": 1.0}},
    "reward": {"name": "emoji_preference"},
    "prompts": {"list": ["a cat", "a dog"]},
    "eval": {"seeds": 1, "prompts_seen": {"list": ["a cat"]}},
}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """The `reward` section that the server prints."""
    recipe = write_recipe(tmp_path, "nowhere", reward={"name": "emoji_preference"})  # the model is not needed
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    command = [sys.executable, "-m", "tailorpo", "serve-reward", str(recipe), "--port", "0", "--device", "cpu"]

    def hear_interrupts() -> None:  # which a test suite in a shell's background does not pass on
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, preexec_fn=hear_interrupts
    ) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            start, _, section = said.partition("reward: ")
            assert start == "serving emoji_preference: "
            yield yaml.safe_load(section)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                assert process.wait(60) == 130
            finally:
                process.kill()


def test_a_run_with_a_remote_reward_is_the_run_without(
    served: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    runs: list[dict[str, Any]] = []
    for name, reward in (("near", CHANGES["reward"]), ("far", served)):
        (tmp_path / name).mkdir()
        recipe = write_recipe(tmp_path / name, "emoji", **{**CHANGES, "reward": reward})
        result = tailorpo("train", recipe, "--out", tmp_path / name / "run", "--device", "cpu")
        assert result.exit_code == 0, result.output
        runs.append(outcome(tmp_path / name / "run"))
    near, far = runs
    assert near["metrics"][0]["guidance_size"] == pytest.approx(1)  # so the gradient came along
    assert far["metrics"] == near["metrics"]
    assert far["checkpoints"] == near["checkpoints"]
    assert far["eval"] == near["eval"]


def test_without_a_server_nothing_begins(tmp_path: Path, tiny_folder: Path) -> None:
    reward = {"name": "remote", "url": "http://127.0.0.1:9", "retries": 0}
    recipe = write_recipe(tmp_path, tiny_folder, reward=reward)
    assert "is `tailorpo serve-reward RECIPE` running there?" in refused("train", recipe, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert tailorpo("show", recipe).exit_code == 0
    assert "reward remote: what its server computes and holds is not counted" in tailorpo("plan", recipe).output
    guided = refused("train", recipe, "algorithm.guidance={form: sigma, k: 1.0}", "--out", tmp_path / "run")
    assert "needs the gradient of the reward" in guided


def test_a_reward_that_cannot_be_loaded_is_not_served(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "nowhere", reward={"name": "aesthetic", "path": str(tmp_path / "none")})
    assert "aesthetic" in refused("serve-reward", recipe, "--port", "0", "--device", "cpu")
