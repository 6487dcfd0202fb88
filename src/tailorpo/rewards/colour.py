"""Two rewards of colour alone: colourfulness (Hasler and Suesstrunk 2003) and brightness. Differentiable, no weights.

    rg = R - G,  yb = (R + G) / 2 - B,  on the scale 0..255
    colourfulness = sqrt(std(rg)^2 + std(yb)^2) + 0.3 * sqrt(mean(rg)^2 + mean(yb)^2)        (their metric M-hat-(3))
    brightness    = mean over the pixels of 0.2126 R + 0.7152 G + 0.0722 B                   (Rec. 709 luma, 0..1)

std is the population's (divided by the number of pixels). The square roots have an infinite slope at zero, which a grey
picture reaches, so 1e-6 is added under each: the score of a grey picture is 0.0013 in place of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tailorpo.device import sent

_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class Colourfulness:
    """How colourful people judge a picture: 0 is grey, 15 slight, 33 moderate, 59 high, 109 extreme."""

    name: Literal["colourfulness"] = "colourfulness"
    differentiable = True
    needs = "nothing"
    units = "M3 on 0..255 pixels, 0 (grey) to about 190"
    source = "Hasler and Suesstrunk 2003, Measuring colourfulness in natural images"

    def load(self, device: torch.device | str) -> Colourfulness:
        """The configuration is the reward."""
        return self

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B,), in the dtype of the images; the prompts are not read."""
        red, green, blue = (images.flatten(2) * 255).unbind(1)
        opponents = torch.stack([red - green, (red + green) / 2 - blue], dim=1)
        spread = opponents.var(dim=2, correction=0).sum(1)
        centre = opponents.mean(2).square().sum(1)
        return (spread + _EPSILON).sqrt() + 0.3 * (centre + _EPSILON).sqrt()


@dataclass(frozen=True, kw_only=True)
class Brightness:
    """Mean Rec. 709 luma of the gamma-encoded pixels: 0 is black, 1 is white."""

    name: Literal["brightness"] = "brightness"
    differentiable = True
    needs = "nothing"
    units = "mean Rec. 709 luma, 0 (black) to 1 (white)"
    source = "ITU-R BT.709"

    def load(self, device: torch.device | str) -> Brightness:
        """The configuration is the reward."""
        return self

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B,), in the dtype of the images; the prompts are not read."""
        weights = sent(torch.tensor([0.2126, 0.7152, 0.0722], dtype=images.dtype), images.device)
        return torch.einsum("bchw,c->b", images, weights) / images[0, 0].numel()
