"""Metrics to TensorBoard, W&B and others, off unless the run file's `trackers` names some.

metrics.jsonl and report.html are always written and need none of these. The trackers are accelerate's, each with its
own package; their files land in the run directory under trackers/.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

from tailorpo.errors import UserError
from tailorpo.run import Run
from tailorpo.rundir import RunDirectory


class Trackers(Protocol):
    """Where numbers go besides metrics.jsonl."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Send one update's metrics; what is no number is left out."""
        ...

    def close(self) -> None:
        """Send what is left and stop."""
        ...


class _None:
    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        pass

    def close(self) -> None:
        pass


class _Some:
    def __init__(self, run: Run, directory: RunDirectory) -> None:
        from tailorpo._distributed import AccelerateTrackers

        folder = directory.path / "trackers"
        folder.mkdir(exist_ok=True)
        try:
            self._trackers = AccelerateTrackers(run.trackers, folder, _flat(run.to_dict()))
        except (ImportError, ValueError) as error:
            raise UserError(f"trackers {', '.join(run.trackers)} cannot start: {error}") from error

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        numbers = {
            name: value for name, value in metrics.items() if isinstance(value, int | float) and name != "update"
        }
        self._trackers.log(numbers, step)

    def close(self) -> None:
        self._trackers.close()


def open_trackers(run: Run, directory: RunDirectory | None) -> Trackers:
    """The trackers that the run names; without any, or without a directory, nothing is imported and calls do nothing.

    Raises:
        UserError: a tracker cannot start.
    """
    return _Some(run, directory) if run.trackers and directory else _None()


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested settings as `sampler.steps`; TensorBoard's table of settings takes scalars only."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat.update(_flat(cast(Mapping[str, Any], value), f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str | int | float | bool) else str(value)
    return flat
