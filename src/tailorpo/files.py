"""Writing files so that a crash, a kill or a full disk leaves the old content or the new one, never half of either."""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from tailorpo.errors import StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def storage_errors(path: Path) -> Generator[None]:
    """Turn the operating system's refusals to write at `path` into a StorageError; other errors pass through."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            reason = "the disk is full, or a limit on file sizes was reached"
        elif error.errno in _REFUSED:
            reason = "it is not writable"
        else:
            raise
        hint = "Nothing that was saved before is lost: make room and run `tailorpo resume`."
        raise StorageError(f"cannot write {path}: {reason} ({os.strerror(error.errno)}). {hint}") from error


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(folder: Path) -> None:
    """Wait until the disk has the names in a folder, so that a rename survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Replace the file at `path` as a whole.

    Raises:
        StorageError: the disk is full or not writable; the old file is untouched and no remains are left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        try:
            write_durably(temporary, data.encode() if isinstance(data, str) else data)
            temporary.replace(path)
            sync_directory(path.parent)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def remove_remains(folder: Path) -> None:
    """Delete what `atomic_write` left half written anywhere in a folder, in processes that were killed."""
    for file in folder.rglob(".*.tmp"):
        process = file.suffixes[-2].removeprefix(".") if len(file.suffixes) > 1 else ""
        if file.is_file() and process.isdecimal() and not _lives(int(process)):
            with suppress(OSError):
                file.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
