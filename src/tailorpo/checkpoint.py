"""Checkpoints: one folder each, written so that a kill, a power cut or a full disk costs the newest one at most.

    checkpoints/update-000020/
        tensors.safetensors   the adapter's weights and the optimizer's moments
        state.json            everything else the loop needs
        manifest.json         update, and bytes and sha256 of the two files

A checkpoint is written beside its place, forced to the disk and renamed; what has the final name is therefore complete.
On reading, sizes and checksums are compared: a truncated or edited checkpoint is refused with a note, and the previous
one used. No state of random number generators is kept, because noise is addressed by keys (`noise`).

Left out: pickles (a checkpoint from elsewhere can never run code) and sharded files (an adapter is small).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tailorpo.errors import CheckpointError
from tailorpo.files import storage_errors, sync_directory, write_durably

_FORMAT = 1
_NAME = re.compile(r"update-(\d{6,})")
_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after `update` updates."""

    update: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(
    directory: Path, *, update: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int = 3
) -> Path:
    """Write one checkpoint into `directory` and delete all but the newest `keep`.

    Raises:
        StorageError: the disk is full or not writable; no remains are left and the previous checkpoints are untouched.
    """
    final = directory / f"update-{update:06d}"
    temporary = directory / f".{final.name}.{os.getpid()}.tmp"
    contents = {
        _TENSORS: save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}),
        _STATE: json.dumps(dict(state), indent=1, sort_keys=True, allow_nan=False).encode(),
    }
    files = {name: {"bytes": len(data), "sha256": _digest(data)} for name, data in contents.items()}
    contents[_MANIFEST] = json.dumps({"format": _FORMAT, "update": update, "files": files}, indent=1).encode()
    with storage_errors(final):
        directory.mkdir(parents=True, exist_ok=True)
        _remove_remains(directory)
        try:
            temporary.mkdir()
            for name, data in contents.items():
                write_durably(temporary / name, data)
            sync_directory(temporary)
            if final.exists():  # a damaged one that this run has passed again
                shutil.rmtree(final)
            temporary.rename(final)
            sync_directory(directory)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    for _, old in _saved(directory)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_latest_checkpoint(directory: Path, *, note: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None if there is none at all.

    Args:
        note: is told about every checkpoint that is refused, and why.

    Raises:
        CheckpointError: there are checkpoints, and every one of them is damaged.
    """
    saved = _saved(directory)
    for _, folder in saved:
        try:
            return _read(folder)
        except CheckpointError as error:
            note(f"{error}; falling back to the one before")
    if saved:
        raise CheckpointError(
            f"{directory}: none of the {len(saved)} checkpoints can be used (see the notes above). "
            "Delete the folder to start from the beginning, or restore one from a backup."
        )
    return None


def load_checkpoint(directory: Path, update: int) -> Checkpoint:
    """The checkpoint after the given number of updates.

    Raises:
        CheckpointError: it is not there, or damaged.
    """
    return _read(directory / f"update-{update:06d}")


def remove_checkpoints(directory: Path, *, after: int) -> None:
    """Delete those of later updates, the newest first, so that an interruption leaves a sound series."""
    for update, folder in _saved(directory):
        if update > after:
            shutil.rmtree(folder, ignore_errors=True)


def latest_update(directory: Path) -> int:
    """The update of the newest checkpoint, unchecked; 0 if there is none."""
    return max((update for update, _ in _saved(directory)), default=0)


def _read(folder: Path) -> Checkpoint:
    manifest = _json(folder, _bytes(folder, _MANIFEST), _MANIFEST)
    if manifest.get("format") != _FORMAT:
        raise CheckpointError(f"checkpoint {folder} is refused: its format {manifest.get('format')!r} is not {_FORMAT}")
    contents: dict[str, bytes] = {}
    for name in (_TENSORS, _STATE):
        data = contents[name] = _bytes(folder, name)
        expected = cast(dict[str, Any], manifest.get("files", {})).get(name, {})
        if len(data) != expected.get("bytes"):
            reason = (
                f"{name} has {len(data):,} bytes instead of {expected.get('bytes', 0):,}: it was truncated or edited"
            )
            raise CheckpointError(f"checkpoint {folder} is refused: {reason}")
        if _digest(data) != expected.get("sha256"):
            raise CheckpointError(f"checkpoint {folder} is refused: the checksum of {name} is wrong: it was edited")
    try:
        tensors = load(contents[_TENSORS])
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint {folder} is refused: {_TENSORS} cannot be read ({error})") from error
    return Checkpoint(int(manifest["update"]), tensors, _json(folder, contents[_STATE], _STATE))


def _bytes(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder} is refused: {name} is missing or unreadable") from error


def _json(folder: Path, data: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {folder} is refused: {name} is not valid JSON") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"checkpoint {folder} is refused: {name} is not a JSON object")
    return cast(dict[str, Any], value)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _saved(directory: Path) -> list[tuple[int, Path]]:
    """Update and folder of what looks like a checkpoint, the newest first."""
    if not directory.is_dir():
        return []
    matches = [(_NAME.fullmatch(folder.name), folder) for folder in directory.iterdir() if folder.is_dir()]
    return sorted(((int(match[1]), folder) for match, folder in matches if match), reverse=True)


def _remove_remains(directory: Path) -> None:
    """Delete what killed processes left half written; the run directory's lock keeps others out."""
    for folder in directory.glob(".update-*.tmp"):
        shutil.rmtree(folder, ignore_errors=True)
