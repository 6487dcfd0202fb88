"""The head that the LAION aesthetic predictor and ImageReward share: five linear layers without an activation.

    layers.{0,2,4,6,7}: D -> 1024 -> 128 -> 64 -> 16 -> 1

Between them are dropouts only, so in eval mode the head is one affine map, w . x + b. It is multiplied out once, in
float64; in float32 the layers one after the other differ from it by their own rounding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from tailorpo.errors import RewardError

_WEIGHT = re.compile(r"layers\.(\d+)\.weight")


class AffineHead:
    """w . x + b of features (B, D), in float32."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        """Take w (D,) and b ()."""
        self.weight = weight.float()
        self.bias = bias.float()

    def __call__(self, features: Tensor) -> Tensor:
        """(B, D) -> (B,)."""
        return features.float() @ self.weight + self.bias

    def to(self, device: torch.device | str) -> AffineHead:
        """The same on a device."""
        return AffineHead(self.weight.to(device), self.bias.to(device))

    @classmethod
    def of(cls, state: Mapping[str, Tensor], width: int, *, name: str, source: Path) -> AffineHead:
        """Multiply `layers.N.weight`, `layers.N.bias` out in the order of N.

        Raises:
            RewardError: the names are others, or the layers do not lead from `width` numbers to one.
        """
        numbers = sorted(int(match[1]) for match in map(_WEIGHT.fullmatch, state) if match)
        expected = {f"layers.{number}.{kind}" for number in numbers for kind in ("weight", "bias")}
        if not numbers or expected != set(state):
            raise RewardError(
                f"reward {name!r}: {source} is not its predictor: it holds {sorted(state)[:3]}, expected only "
                "layers.N.weight and layers.N.bias"
            )
        layers = [(state[f"layers.{n}.weight"].double(), state[f"layers.{n}.bias"].double()) for n in numbers]
        widths = [width, *(len(bias) for _, bias in layers)]
        if widths[-1] != 1 or [tuple(weight.shape) for weight, _ in layers] != [(b, a) for a, b in pairwise(widths)]:
            shapes = ", ".join(str(tuple(weight.shape)) for weight, _ in layers)
            raise RewardError(
                f"reward {name!r}: {source} does not lead from the {width} numbers of the model under it to one score; "
                f"its layers are {shapes}"
            )
        weight, bias = layers[0]
        for outer, shift in layers[1:]:
            weight, bias = outer @ weight, outer @ bias + shift
        return cls(weight[0], bias[0])
