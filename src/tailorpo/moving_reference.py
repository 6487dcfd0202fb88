"""A reference of the loss that follows the policy: a copy of the trained parameters (TR-DPO, arXiv 2404.09656).

    ema     phi <- d phi + (1 - d) theta     after every update ("soft update"; the paper's alpha is 1 - d)
    every   phi <- theta                     after every n-th update ("hard update")

With a moving reference the loss ties the policy to where it was a while ago: the KL to the base model has no bound of
its own and is measured, not held. Only the loss looks at the copy; evaluation compares with the base model as always
(`DiffusionModel.reference`).

The average is one of parameters. Of a LoRA's two matrices it is not the average of their products; both forms agree
where the policy moves little within 1 / (1 - d) updates. Left out: a whole second network, which a LoRA does not need.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_PREFIX = "reference/"


@dataclass(frozen=True, kw_only=True)
class MovingReference:
    """How the reference follows the policy: one of the two.

    Attributes:
        ema: share of the old reference that stays at an update, 0 < ema < 1; 0.9 follows within some ten updates.
        every: after how many updates the reference becomes a copy of the policy.
    """

    ema: float | None = None
    every: int | None = None

    def __post_init__(self) -> None:
        if (self.ema is None) == (self.every is None):
            raise ValueError("a moving reference needs ema (such as 0.9) or every (such as 10), and not both")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must be between 0 and 1, got {self.ema}")
        if self.every is not None and self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")


class ParameterCopy:
    """The copy, and how it follows.

    Args:
        parameters: the trained parameters by name, as they are before the first update.
        rule: how to follow them.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], rule: MovingReference) -> None:
        self.rule = rule
        self._parameters = dict(parameters)
        self._copy = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @contextmanager
    def in_place(self) -> Generator[None]:
        """Within it the network computes with the copy; nothing may be differentiated.

        Storages are exchanged, not contents: the graph of an earlier forward stays valid.
        """
        own = {name: parameter.data for name, parameter in self._parameters.items()}
        try:
            for name, parameter in self._parameters.items():
                parameter.data = self._copy[name]
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = own[name]

    @torch.no_grad()
    def follow(self, updates: int) -> None:
        """Move after the policy, when it has `updates` updates behind it."""
        for name, parameter in self._parameters.items():
            if self.rule.ema is not None:
                self._copy[name].lerp_(parameter, 1 - self.rule.ema)
            elif self.rule.every is not None and updates % self.rule.every == 0:
                self._copy[name].copy_(parameter)

    def tensors(self) -> dict[str, Tensor]:
        """The copy for a checkpoint."""
        return {_PREFIX + name: value.cpu() for name, value in self._copy.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` of an equal run returned."""
        for name, value in self._copy.items():
            value.copy_(tensors[_PREFIX + name])
