"""kill -9, full disks and damaged checkpoints: a resumed run ends with the bits of an uninterrupted one."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import outcome, tailorpo, write_recipe

UPDATES = 5
BUFFERED = {
    "name": "tailorpo",
    "train_steps": 2,
    "offset": "random",
    "update": "buffered",
    "inner_epochs": 2,
    "minibatch": 2,
}
GUIDED = {
    "name": "tailorpo",
    "train_steps": 2,
    "offset": "random",
    "guidance": {"form": "sigma", "k": 0.5, "accept_reject": True},
}


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that start with everything imported, so that a test kills training and not an import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_run", "tailorpo.train", "tailorpo.evaluate", "tailorpo.report"])
    warm = context.Process(target=int)
    warm.start()
    warm.join()
    return context


def _command(arguments: list[str], limit: int | None) -> None:
    """Run in a process of its own; its output goes nowhere. A limit makes every file larger than it fail."""
    import torch

    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    os._exit(tailorpo(*arguments).exit_code)


def start(processes: Any, *arguments: str | Path, limit: int | None = None) -> Any:
    process = processes.Process(target=_command, args=([str(argument) for argument in arguments], limit))
    process.start()
    return process


@pytest.fixture(scope="module", params=[GUIDED, BUFFERED], ids=["guided", "buffered"])
def uninterrupted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path
) -> tuple[Path, dict[str, Any]]:
    """A recipe and what it leads to if nothing happens."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    recipe = write_recipe(folder, tiny_folder, updates=UPDATES, checkpoint_every=2, algorithm=request.param)
    result = tailorpo("train", recipe, "--out", folder / "run")
    assert result.exit_code == 0, result.output
    return recipe, outcome(folder / "run")


def lines(run: Path, count: int) -> Callable[[], bool]:
    metrics = run / "metrics.jsonl"
    return lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= count


def exists(run: Path, pattern: str) -> Callable[[], bool]:
    return lambda: run.exists() and any(run.glob(pattern))


# Moments to strike: while the run file is new, between updates, while a checkpoint is being written, at the end.
MOMENTS: dict[str, Callable[[Path], Callable[[], bool]]] = {
    "beginning": lambda run: exists(run, "run.yaml"),
    "first update": lambda run: lines(run, 1),
    "writing a checkpoint": lambda run: exists(run, "checkpoints/.update-*.tmp"),
    "after a checkpoint": lambda run: exists(run, "checkpoints/update-000002"),
    "third update": lambda run: lines(run, 3),
    "last update": lambda run: lines(run, UPDATES),
    "evaluation": lambda run: exists(run, "samples/eval.partial"),
}


def strike(process: Any, moment: Callable[[], bool], delay: float) -> None:
    """Kill the process a little after the moment, unless it has ended before."""
    deadline = time.monotonic() + 200
    while process.is_alive() and not moment():
        assert time.monotonic() < deadline, "the moment did not come"
        time.sleep(0.0005)
    time.sleep(delay)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_again_and_again_a_run_ends_with_the_same_bits(
    processes: Any, uninterrupted: tuple[Path, dict[str, Any]], tmp_path: Path, seed: int
) -> None:
    recipe, expected = uninterrupted
    run = tmp_path / "run"
    draw = random.Random(seed)
    moments = draw.sample(sorted(MOMENTS), 3)
    for number, name in enumerate(sorted(moments, key=list(MOMENTS).index)):
        begun = (run / "run.yaml").exists()
        command = ("resume", run) if begun else ("train", recipe, "--out", run)
        assert begun or number == 0
        strike(start(processes, *command), MOMENTS[name](run), draw.random() * 0.05)
    result = tailorpo("resume", run)
    assert result.exit_code == 0, result.output
    found = outcome(run)
    for part, value in expected.items():
        assert found[part] == value, (part, moments)
    assert not list(run.rglob("*.tmp"))


def test_a_kill_between_a_checkpoint_and_its_lora_file_is_made_good(
    uninterrupted: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    recipe, expected = uninterrupted
    run = tmp_path / "run"
    lora = run / "lora" / "pytorch_lora_weights.safetensors"
    assert tailorpo("train", recipe, "updates=4", "--out", run).exit_code == 0
    older = lora.read_bytes()
    assert tailorpo("resume", run, f"updates={UPDATES}").exit_code == 0
    lora.write_bytes(older)
    (run / "report.html").unlink()  # which the killed run had not come to
    result = tailorpo("resume", run)
    assert result.exit_code == 0, result.output
    assert lora.read_bytes() == expected["lora"] != older


def test_a_damaged_checkpoint_is_named_and_costs_only_the_updates_since_the_one_before(
    uninterrupted: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    recipe, expected = uninterrupted
    run = tmp_path / "run"
    assert tailorpo("train", recipe, "updates=4", "--out", run).exit_code == 0
    damaged = run / "checkpoints" / "update-000004" / "tensors.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    result = tailorpo("resume", run, f"updates={UPDATES}")
    assert result.exit_code == 0, result.output
    assert "update-000004 is refused: tensors.safetensors has" in result.output
    assert "truncated or edited" in result.output
    found = outcome(run)
    for part, value in expected.items():
        assert found[part] == value, part

    for folder in (run / "checkpoints").iterdir():
        (folder / "state.json").write_text("{}")
    result = tailorpo("resume", run, "updates=9")
    assert result.exit_code == 2
    assert "none of the 3 checkpoints can be used" in result.output


def test_a_full_disk_stops_with_a_message_and_nothing_is_lost(
    processes: Any, uninterrupted: tuple[Path, dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe, expected = uninterrupted
    run = tmp_path / "run"
    assert tailorpo("train", recipe, "updates=2", "--out", run).exit_code == 0
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    largest = (run / "metrics.jsonl").stat().st_size
    process = start(processes, "resume", run, f"updates={UPDATES}", limit=max(20_000, 4 * largest))
    process.join()
    assert process.exitcode == 1
    assert {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()} == before
    assert not list((run / "checkpoints").glob(".*"))
    result = tailorpo("resume", run)
    assert result.exit_code == 0, result.output
    found = outcome(run)
    for part, value in expected.items():
        assert found[part] == value, part


def test_two_processes_do_not_train_in_one_folder(
    processes: Any, uninterrupted: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    recipe, _ = uninterrupted
    run = tmp_path / "run"
    process = start(processes, "train", recipe, "updates=500", "--out", run)
    try:
        while not lines(run, 1)():
            assert process.is_alive()
            time.sleep(0.005)
        result = tailorpo("resume", run)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert result.exit_code == 2
    assert f"{run} is in use by another process (its id is {process.pid})" in result.output
