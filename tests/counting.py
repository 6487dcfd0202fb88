"""Counts what a method costs: items through the UNet, by a hook, and pictures scored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tailorpo.models.latent import LatentDiffusion
from tailorpo.policy import Policy


class Counter:
    """What a policy's network and `score` are asked from now on; the counts may be set back to 0."""

    def __init__(self, policy: Policy, score: Callable[[Tensor, Any], Tensor]) -> None:
        assert isinstance(policy.model, LatentDiffusion)
        policy.model.unet.register_forward_hook(self._forward)
        self._score = score
        self.items = self.queries = 0

    def score(self, images: Tensor, prompts: Any) -> Tensor:
        """The score of pictures."""
        self.queries += len(images)
        return self._score(images, prompts)

    def _forward(self, module: Any, args: Any, output: Any) -> None:
        self.items += len(args[0])
