"""RunDirectory: the folder of one run, and who may write to it.

    run.yaml        every setting, resolved
    metrics.jsonl   one JSON object per update; a resumed run's equals an uninterrupted one's but for the seconds
    checkpoints/    the newest three (`checkpoint`)
    best/           checkpoints of the looks with the best judge, under `sentinels.on_alarm: rollback`
    lora/           pytorch_lora_weights.safetensors, diffusers' standard file
    unet/           instead of it under full fine-tuning: the network as a diffusers folder
    samples/        pictures
    eval.json  report.html
    export/         what `tailorpo export` writes where no other folder is named

One process at a time may train in it: a lock that the operating system releases when the process dies, however it dies.
Left out: network file systems without locks; there the lock always succeeds or fails as the file system decides.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tailorpo.errors import CheckpointError, UserError
from tailorpo.files import atomic_write, remove_remains, storage_errors
from tailorpo.run import Run

RUN, METRICS, LOCK = "run.yaml", "metrics.jsonl", ".lock"


@dataclass(frozen=True)
class RunDirectory:
    """One run on disk; make it with `create` or `open`."""

    path: Path

    @classmethod
    def create(cls, path: Path | str, run: Run) -> RunDirectory:
        """A new directory, or an empty one that exists, with the run's settings in it.

        Raises:
            UserError: there is something in it already.
            StorageError: it cannot be written.
        """
        folder = Path(path)
        if (folder / RUN).exists():
            raise UserError(
                f"{folder} already holds a run: continue it with `tailorpo resume {folder}`, or choose another --out"
            )
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and is not an empty folder; choose another --out")
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        directory = cls(folder)
        directory.write_run(run)
        return directory

    @classmethod
    def open(cls, path: Path | str) -> RunDirectory:
        """The directory of a run that has begun.

        Raises:
            CheckpointError: there is no run in it.
        """
        folder = Path(path)
        if not (folder / RUN).is_file():
            state = "there is no such folder" if not folder.exists() else f"it holds no {RUN}"
            raise CheckpointError(f"{folder} is not a run directory: {state}")
        return cls(folder)

    @property
    def run(self) -> Run:
        """The settings in run.yaml. Files they name need not exist: a run can be reported without its model."""
        return Run.load(self.path / RUN, files=False)

    @property
    def checkpoints(self) -> Path:
        """Where `checkpoint` writes."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """Where the checkpoint is that the sentinels' rollback goes back to."""
        return self.path / "best"

    @property
    def lora(self) -> Path:
        """The folder of the trained adapter."""
        return self.path / "lora"

    @property
    def unet(self) -> Path:
        """The folder of the network, where all of it is trained."""
        return self.path / "unet"

    @property
    def samples(self) -> Path:
        """The folder of pictures."""
        return self.path / "samples"

    def write_run(self, run: Run) -> None:
        """Replace run.yaml."""
        atomic_write(self.path / RUN, run.to_yaml())

    @contextmanager
    def lock(self) -> Generator[None]:
        """Keep other processes out of the directory.

        Raises:
            UserError: another process is at work in it.
        """
        path = self.path / LOCK
        with storage_errors(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                owner = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
                raise UserError(f"{self.path} is in use by another process (its id is {owner})") from error
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
            self._remove_remains()
            yield
        finally:
            os.close(handle)

    def _remove_remains(self) -> None:
        """Delete what killed processes left half written; nobody else writes an export while the lock is held."""
        remove_remains(self.path)
        for kind in (self.lora.name, self.unet.name):
            for folder in self.path.glob(f".{kind}-*"):
                shutil.rmtree(folder, ignore_errors=True)

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Add one line and force it to the disk, so that a checkpoint never is ahead of its metrics.

        Numbers that are not finite become null: JSON has no other word for them.
        """
        path = self.path / METRICS
        line = json.dumps(_finite(metrics), allow_nan=False) + "\n"
        with storage_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl. A last line that a kill tore apart is left out.

        Raises:
            CheckpointError: another line is not a JSON object.
        """
        path = self.path / METRICS
        if not path.is_file():
            return []
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        records: list[dict[str, Any]] = []
        for number, line in enumerate(lines, start=1):
            try:
                record: object = json.loads(line)
                if not isinstance(record, dict):
                    raise TypeError("not an object")
            except (ValueError, TypeError) as error:
                if number == len(lines):
                    break
                raise CheckpointError(f"{path}: line {number} is damaged; delete it to go on") from error
            records.append(cast(dict[str, Any], record))
        return records

    def truncate_metrics(self, updates: int) -> None:
        """Forget what was measured after the given number of updates: a resumed run measures it again."""
        path = self.path / METRICS
        if path.is_file():
            kept = [record for record in self.metrics() if record["update"] <= updates]
            atomic_write(path, "".join(f"{json.dumps(record)}\n" for record in kept))

    def write_json(self, name: str, value: object) -> None:
        """Replace a JSON file of the directory as a whole."""
        atomic_write(self.path / name, json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        """The content of a JSON file of the directory.

        Raises:
            CheckpointError: it is not there or not JSON.
        """
        path = self.path / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} does not exist") from error
        except ValueError as error:
            raise CheckpointError(f"{path} is not valid JSON") from error


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in cast(Mapping[str, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in cast(list[Any], value)]
    return value
