"""One of two processes fails, is killed or stops answering: the other ends soon and in words, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import processes as many
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import refused, tailorpo, write_recipe

GUIDED = {"name": "tailorpo", "train_steps": 2, "guidance": {"form": "sigma", "k": 0.5, "accept_reject": True}}
# DDPO's memory of a prompt's rewards has to be the same in both processes, too.
DDPO = {"name": "ddpo", "history": 4, "history_min": 2, "minibatch": 2, "accumulate": 4}


def recipe(folder: Path, model: Path, algorithm: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Three updates of two batches, whose reward obeys $STRIKE; a large eps keeps rounding from being amplified."""
    return write_recipe(
        folder,
        model,
        algorithm=algorithm or GUIDED,
        batch={"trajectories": 4, "micro": 2},
        optimizer={"lr": 1e-2, "eps": 1e-2},
        **changes,
    )


def outcome(run: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    checkpoint = run / "checkpoints" / "update-000003"
    return {
        "metrics": [{name: value for name, value in line.items() if name != "seconds"} for line in lines],
        "lora": (run / "lora" / "pytorch_lora_weights.safetensors").read_bytes(),
        "tensors": (checkpoint / "tensors.safetensors").read_bytes(),
        "state": json.loads((checkpoint / "state.json").read_text()),
        "eval": json.loads((run / "eval.json").read_text())["groups"],
    }


@pytest.mark.parametrize(
    ("algorithm", "victim", "variables"),
    [
        pytest.param(GUIDED, 1, {}, id="guided"),
        pytest.param(DDPO, 0, {}, id="ddpo"),
        pytest.param(GUIDED, 1, many.DEEPSPEED, id="deepspeed", marks=many.needs_deepspeed),
    ],
)
def test_after_a_kill_two_processes_go_on_with_the_same_bits_and_one_does_up_to_rounding(
    tiny_folder: Path, tmp_path: Path, algorithm: dict[str, Any], victim: int, variables: dict[str, str]
) -> None:
    reward = {"name": "processes:Striking" if algorithm is GUIDED else "processes:striking"}
    path = recipe(tmp_path, tiny_folder, algorithm, reward=reward)
    harmless = {"STRIKE": "none 0 0", **variables}
    deadly = harmless | {"STRIKE": f"kill {victim} {2 if algorithm is DDPO else 10}"}

    def command(count: int, name: str, *arguments: str, **options: Any) -> list[many.Ended]:
        return many.run(count, tmp_path / name, many.command, *arguments, **options)

    whole, run = tmp_path / "whole", tmp_path / "run"
    ended = command(2, "a", "train", str(path), "--out", str(whole), environment=harmless)
    assert [each.exit_code for each in ended] == [0, 0], ended
    ended = command(2, "b", "train", str(path), "--out", str(run), environment=deadly)
    assert ended[victim].exit_code == -signal.SIGKILL
    survivor = ended[1 - victim]
    assert survivor.exit_code == 1
    assert "another process of this run has failed, was stopped or did not answer in time" in survivor.output
    assert "Traceback" not in survivor.output
    done = [folder.name for folder in sorted((run / "checkpoints").glob("update-*"))]
    assert done
    assert "update-000003" not in done

    alone = shutil.copytree(run, tmp_path / "alone")
    assert [each.exit_code for each in command(2, "c", "resume", str(run), environment=harmless)] == [0, 0]
    assert [each.exit_code for each in command(1, "d", "resume", str(alone), environment=harmless)] == [0]
    expected, found, rounded = outcome(whole), outcome(run), outcome(alone)
    for part, value in expected.items():
        assert found[part] == value, part
    assert rounded["state"].keys() == expected["state"].keys()
    assert rounded["state"]["evaluations"] == expected["state"]["evaluations"]
    assert rounded["state"]["reward_queries"] == expected["state"]["reward_queries"]
    ours, theirs = (
        load_file(each / "checkpoints" / "update-000003" / "tensors.safetensors") for each in (alone, whole)
    )
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, rtol=1e-3, atol=1e-5), name


def test_an_error_in_one_process_is_said_by_that_process(tiny_folder: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, tiny_folder, DDPO, reward={"name": "processes:striking"})
    command = ("train", str(path), "--out", str(tmp_path / "run"))
    ended = many.run(2, tmp_path, many.command, *command, environment={"STRIKE": "raise 1 2"})
    assert [each.exit_code for each in ended] == [1, 2]
    assert "error in process 1: reward 'processes:striking' raised RuntimeError: the reward server is out" in (
        ended[1].output
    )
    assert "another process of this run has failed" in ended[0].output
    assert "reward server" not in ended[0].output


def test_a_process_that_stops_answering_is_given_up(tiny_folder: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, tiny_folder, DDPO, reward={"name": "processes:striking"})
    command = ("train", str(path), "--out", str(tmp_path / "run"))
    environment = {"STRIKE": "stop 1 2", "TAILORPO_TIMEOUT": "6"}
    waiting, stopped = many.start(2, tmp_path, many.command, *command, environment=environment)
    try:
        waiting.join(100)
        assert waiting.exitcode == 1
        assert "did not answer in time" in (tmp_path / "0.txt").read_text()
        assert stopped.is_alive()
    finally:
        os.kill(stopped.pid, signal.SIGKILL)
        stopped.join()


def test_what_only_one_process_misses_is_said_once_and_leaves_no_folder(tiny_folder: Path, tmp_path: Path) -> None:
    """As on a second machine that lacks a file; both end, with the exit code of a mistake."""
    path = recipe(tmp_path, tiny_folder, reward={"name": "processes:missing_in_process_1"})
    ended = many.run(2, tmp_path, many.command, "train", str(path), "--out", str(tmp_path / "run"))
    assert [each.exit_code for each in ended] == [2, 0]
    assert "error: process 1 of 2: reward 'processes:missing_in_process_1'" in ended[0].output
    assert ended[1].output.strip() == ""
    assert not (tmp_path / "run").exists()


def test_more_processes_than_batches_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, tiny_folder)
    ended = many.run(2, tmp_path, many.command, "train", str(path), "--out", str(tmp_path / "run"))
    assert [each.exit_code for each in ended] == [2, 0]
    assert "2 processes share the batches of an update, and there are 1" in ended[0].output
    assert "a smaller batch.micro (at most 1)" in ended[0].output
    assert not (tmp_path / "run").exists()


def test_what_is_not_supported_is_refused(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_recipe(tmp_path, tiny_folder)
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
        message = refused("train", path, "--out", tmp_path / "run")
        assert "accelerate is configured with MEGATRON_LM, which tailorpo does not support" in message
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        assert "set fsdp_version: 2" in refused("train", path, "--out", tmp_path / "run")
        patch.setenv("FSDP_VERSION", "2")
        patch.setenv("FSDP_OFFLOAD_PARAMS", "true")
        assert "fsdp_offload_params is on" in refused("train", path, "--out", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        result = tailorpo("train", path, "updates=1", "--out", tmp_path / "run")
        assert "note: accelerate's mixed_precision bf16 has no effect; model.dtype" in result.output
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "`tailorpo sample` works in one process, not 2" in refused("sample", "emoji", "--prompts", "a cat")


def test_the_launcher_ends_a_run_whose_process_was_killed(tiny_folder: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, tiny_folder, DDPO, reward={"name": "processes:striking"})
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = ["--main_process_port", "0", "-m", "tailorpo", "train", str(path), "--out", str(tmp_path / "run")]
    places = [str(Path(many.__file__).parent), *sys.path]
    variables = {"PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1", "TAILORPO_DEVICE": "cpu"}
    variables |= {"STRIKE": "kill 1 2", "HF_HOME": str(tmp_path)}
    began = time.monotonic()
    ended = subprocess.run(
        [*launcher, *command], env={**os.environ, **variables}, capture_output=True, text=True, timeout=200, check=False
    )
    assert ended.returncode == 1, ended.stderr
    assert "update 1/3" in ended.stdout
    assert "Signal 9 (SIGKILL)" in ended.stderr
    assert time.monotonic() - began < 180
    assert (tmp_path / "run" / "checkpoints" / "update-000001").is_dir()
