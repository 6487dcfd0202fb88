"""Checkpoints: the saved comes back bit for bit, the damaged is refused, what cannot be written costs nothing."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tailorpo.checkpoint
from tailorpo.checkpoint import latest_update, load_latest_checkpoint, save_checkpoint
from tailorpo.errors import CheckpointError, StorageError

TENSORS = {
    "lora.a": torch.arange(6, dtype=torch.float32).view(2, 3).t(),  # not contiguous
    "optimizer.step": torch.tensor(3.0),
    "half": torch.tensor([1.5, float("inf")], dtype=torch.bfloat16),
}


def save(folder: Path, update: int, keep: int = 3) -> Path:
    return save_checkpoint(folder, update=update, tensors=TENSORS, state={"steps": update}, keep=keep)


def quiet(text: str) -> None:
    raise AssertionError(text)


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    save(tmp_path, 7)
    checkpoint = load_latest_checkpoint(tmp_path, note=quiet)
    assert checkpoint is not None
    assert (checkpoint.update, checkpoint.state) == (7, {"steps": 7})
    assert checkpoint.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert checkpoint.tensors[name].dtype == tensor.dtype
        assert torch.equal(checkpoint.tensors[name], tensor)


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert load_latest_checkpoint(tmp_path / "none", note=quiet) is None
    assert load_latest_checkpoint(tmp_path, note=quiet) is None
    assert latest_update(tmp_path) == 0


def test_the_newest_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    for update in (8, 9, 10, 11):
        save(tmp_path, update, keep=2)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["update-000010", "update-000011"]
    assert latest_update(tmp_path) == 11


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def new_format(path: Path) -> None:
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("tensors.safetensors", flip, "checksum of tensors.safetensors is wrong"),
        ("tensors.safetensors", cut, "truncated or edited"),
        ("tensors.safetensors", Path.unlink, "tensors.safetensors is missing"),
        ("state.json", flip, "checksum of state.json is wrong"),
        ("state.json", cut, "truncated or edited"),
        ("manifest.json", cut, "manifest.json is not valid JSON"),
        ("manifest.json", Path.unlink, "manifest.json is missing"),
        ("manifest.json", new_format, "format 99"),
        ("manifest.json", lambda path: path.write_text("[]"), "not a JSON object"),
    ],
)
def test_a_damaged_one_is_refused_and_the_one_before_is_used(
    tmp_path: Path, name: str, damage: Callable[[Path], object], reason: str
) -> None:
    save(tmp_path, 1)
    damage(save(tmp_path, 2) / name)
    notes: list[str] = []
    checkpoint = load_latest_checkpoint(tmp_path, note=notes.append)
    assert checkpoint is not None
    assert checkpoint.update == 1
    assert len(notes) == 1
    assert reason in notes[0]
    assert "update-000002" in notes[0]


def test_all_damaged_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    cut(save(tmp_path, 1) / "state.json")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints can be used"):
        load_latest_checkpoint(tmp_path, note=lambda _: None)


def test_a_damaged_one_is_replaced_when_the_run_passes_it_again(tmp_path: Path) -> None:
    save(tmp_path, 1)
    cut(save(tmp_path, 2) / "state.json")
    save(tmp_path, 2)
    checkpoint = load_latest_checkpoint(tmp_path, note=quiet)
    assert checkpoint is not None
    assert checkpoint.update == 2


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "disk is full"), (errno.EFBIG, "disk is full"), (errno.EROFS, "not writable")],
)
@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_full_disk_leaves_the_previous_one_and_no_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str, written: int
) -> None:
    save(tmp_path, 1)
    real, calls = tailorpo.checkpoint.write_durably, 0

    def full(path: Path, data: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls > written:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(number, "refused")
        real(path, data)

    monkeypatch.setattr(tailorpo.checkpoint, "write_durably", full)
    with pytest.raises(StorageError, match=words):
        save(tmp_path, 2)
    assert [folder.name for folder in tmp_path.iterdir()] == ["update-000001"]
    checkpoint = load_latest_checkpoint(tmp_path, note=quiet)
    assert checkpoint is not None
    assert checkpoint.update == 1


def test_remains_of_a_killed_process_are_ignored_and_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    remains = tmp_path / ".update-000002.123.tmp"
    remains.mkdir()
    (remains / "state.json").write_text("{")
    assert latest_update(tmp_path) == 1
    save(tmp_path, 2)
    assert not remains.exists()


def test_the_state_is_readable_json(tmp_path: Path) -> None:
    assert json.loads((save(tmp_path, 5) / "state.json").read_text()) == {"steps": 5}
