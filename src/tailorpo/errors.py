"""The exceptions of tailorpo, one tree.

    TailorpoError
      UserError            something the user wrote or passed is wrong; the CLI prints the message and exits with code 2
        RunFileError       every mistake of a run file at once
        RewardError        a reward raised, or returned something that is not one finite number per picture
        CheckpointError    a run directory or checkpoint cannot be used
      DivergedError        training produced a loss that is not a number; the last good checkpoint is kept
      StorageError         the disk refused a write (full, read-only); nothing that was saved before is lost
      ProcessError         another process of the same run is gone, or has computed something else

The CLI exits with code 2 for a UserError and 1 for the others, never with a traceback for any of them.
"""

from __future__ import annotations

from collections.abc import Sequence


class TailorpoError(Exception):
    """Base class of every error that tailorpo raises on purpose."""


class UserError(TailorpoError):
    """A mistake in what the user wrote or passed; the message says how to fix it."""


class RunFileError(UserError):
    """All mistakes of one run file.

    `problems` holds one line per mistake, each naming the key, what was got and what is accepted.
    """

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source = source
        self.problems = tuple(problems)
        count = "1 mistake" if len(self.problems) == 1 else f"{len(self.problems)} mistakes"
        super().__init__("\n".join([f"{source}: {count}", *(f"  - {problem}" for problem in self.problems)]))


class RewardError(UserError):
    """A reward raised or returned something unusable."""


class CheckpointError(UserError):
    """A run directory or one of its checkpoints is missing, incomplete, edited or from an incompatible run."""


class DivergedError(TailorpoError):
    """The loss or a gradient stopped being a finite number."""


class StorageError(TailorpoError):
    """Writing failed: the disk is full or not writable."""


class ProcessError(TailorpoError):
    """Several processes work on one run, and another one is gone or has come to other parameters."""
