"""What the training stages share: the learning-rate curve, moving averages, and checkpoints that survive a kill."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn


def cosine(step: int, steps: int, *, warmup: int) -> float:
    """A factor for the learning rate: a linear warm-up, then a half cosine down to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (steps - warmup))))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets one learning rate on all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint so that a kill at any moment leaves the old or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    torch.save(state, draft)
    draft.replace(path)


def load(path: Path) -> dict[str, Any] | None:
    """Reads a checkpoint, or returns None where there is none yet."""
    return torch.load(path, weights_only=False) if path.exists() else None


class Average:
    """An exponential moving average of a module's parameters."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = [p.detach().clone() for p in module.parameters()]

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Moves the average; early on faster, so that the first weights are forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in module.parameters()], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Writes the average into a module of the same shape."""
        for parameter, value in zip(module.parameters(), self.values, strict=True):
            parameter.copy_(value)
