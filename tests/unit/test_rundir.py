"""The folder of a run: who may write, and what survives."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import settings

import tailorpo.files
from tailorpo.errors import CheckpointError, StorageError, UserError
from tailorpo.files import atomic_write
from tailorpo.run import Run
from tailorpo.rundir import RunDirectory


@pytest.fixture
def run() -> Run:
    return Run.from_dict(settings("emoji"), files=False)


def test_a_new_directory_holds_the_settings(tmp_path: Path, run: Run) -> None:
    directory = RunDirectory.create(tmp_path / "a" / "b", run)
    assert RunDirectory.open(directory.path).run == run


def test_a_directory_with_a_run_or_anything_else_is_refused(tmp_path: Path, run: Run) -> None:
    RunDirectory.create(tmp_path / "a", run)
    with pytest.raises(UserError, match="already holds a run: continue it with `tailorpo resume"):
        RunDirectory.create(tmp_path / "a", run)
    (tmp_path / "b").mkdir()
    RunDirectory.create(tmp_path / "b", run)  # an empty one is fine
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").touch()
    with pytest.raises(UserError, match="not an empty folder"):
        RunDirectory.create(tmp_path / "c", run)
    with pytest.raises(UserError, match="not an empty folder"):
        RunDirectory.create(tmp_path / "c" / "thesis.tex", run)


def test_what_is_no_run_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        RunDirectory.open(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"it holds no run\.yaml"):
        RunDirectory.open(tmp_path)


def test_metrics_survive_a_torn_last_line_and_are_cut_on_resume(tmp_path: Path, run: Run) -> None:
    directory = RunDirectory.create(tmp_path / "run", run)
    assert directory.metrics() == []
    for update in (1, 2, 3):
        directory.append_metrics({"update": update, "loss": float("nan"), "by_step": [{"kl": float("inf")}]})
    path = directory.path / "metrics.jsonl"
    complete = path.read_bytes()
    path.write_bytes(complete + b'{"update": 4, "lo')
    assert [record["update"] for record in directory.metrics()] == [1, 2, 3]
    assert directory.metrics()[0] == {"update": 1, "loss": None, "by_step": [{"kl": None}]}
    directory.truncate_metrics(2)
    assert path.read_bytes() == b"".join(complete.splitlines(keepends=True)[:2])


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, run: Run) -> None:
    directory = RunDirectory.create(tmp_path / "run", run)
    (directory.path / "metrics.jsonl").write_text('{"update": 1}\n{"upd\n{"update": 3}\n')
    with pytest.raises(CheckpointError, match="line 2 is damaged"):
        directory.metrics()


def test_one_process_at_a_time(tmp_path: Path, run: Run) -> None:
    directory = RunDirectory.create(tmp_path / "run", run)
    with directory.lock(), pytest.raises(UserError, match="in use by another process"), directory.lock():
        pass
    with directory.lock():  # free again
        pass


def test_json_files(tmp_path: Path, run: Run) -> None:
    directory = RunDirectory.create(tmp_path / "run", run)
    directory.write_json("eval.json", {"a": float("nan"), "b": (1, 2)})
    assert directory.read_json("eval.json") == {"a": None, "b": [1, 2]}
    with pytest.raises(CheckpointError, match="does not exist"):
        directory.read_json("none.json")
    (directory.path / "eval.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        directory.read_json("eval.json")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "eval.json"
    atomic_write(path, json.dumps("old"))

    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:1])
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(tailorpo.files, "write_durably", full)
    with pytest.raises(StorageError, match="disk is full"):
        atomic_write(path, json.dumps("new"))
    assert json.loads(path.read_text()) == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_other_errors_of_the_system_are_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "none" / "file", "text")


def test_remains_of_killed_processes_are_removed_by_the_next_and_those_of_living_ones_are_not(
    tmp_path: Path, run: Run
) -> None:
    directory = RunDirectory.create(tmp_path / "run", run)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    directory.lora.mkdir()
    torn = [directory.path / f".run.yaml.{dead.pid}.tmp", directory.lora / f".x.safetensors.{dead.pid}.tmp"]
    living = directory.path / f".report.html.{os.getpid()}.tmp"
    for file in (*torn, living):
        file.write_text("{")
    half = directory.path / ".lora-abc"
    half.mkdir()
    (half / "x").write_text("")
    with directory.lock():
        assert not any(file.exists() for file in (*torn, half))
        assert living.exists()
        assert directory.run == run
