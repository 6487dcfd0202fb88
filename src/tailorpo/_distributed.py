"""The device a run computes on, and the only place that imports accelerate.

Left out for now: more than one process. Noise and prompts are addressed by trajectory, so that processes will be able
to share the trajectories of an update without any change of what is drawn.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tailorpo.errors import UserError

DEVICE = "TAILORPO_DEVICE"


def pick_device() -> torch.device:
    """The device named by the environment variable TAILORPO_DEVICE, otherwise the best there is: cuda, mps, cpu.

    Raises:
        UserError: the named one does not exist here.
    """
    name = os.environ.get(DEVICE) or _best()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is not one that torch knows; use cuda, cuda:1, mps or cpu") from error
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(device.type, False):
        raise UserError(f"device {name!r} is not available here; use {_best()}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r}: there are only {torch.cuda.device_count()} CUDA devices, counted from 0")
    return device


def _best() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


class AccelerateTrackers:
    """accelerate's trackers (TensorBoard, W&B, ...) behind two calls."""

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> None:
        from accelerate import Accelerator

        self._accelerator = Accelerator(log_with=list(names), project_dir=folder, cpu=pick_device().type == "cpu")
        self._accelerator.init_trackers("tailorpo", config=dict(config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers of one update."""
        self._accelerator.log(dict(values), step=step)

    def close(self) -> None:
        """Wait until everything is sent."""
        self._accelerator.end_training()
