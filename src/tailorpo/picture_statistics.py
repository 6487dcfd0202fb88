"""Low-level statistics of pictures: what a reward that is being exploited usually moves first.

    saturation    mean over pixels of (max - min) / max of the three channels
    edge energy   mean of the squared differences of brightness to the right and to the lower neighbour, added up
    flat share    share of pixels that differ from both neighbours by less than `FLAT` in every channel

(B, 3, H, W) in [0, 1] -> (B,) each. The size as a JPEG is in `rewards.jpeg`. Left out: texture and colour statistics
that need a transform; these say "empty", "noisy" and "garish" already, the ways in which pictures break.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLAT = 4 / 255
"""A difference below this is none: three levels of 255 are what a decoder leaves on an even ground."""


def saturation(images: Tensor) -> Tensor:
    """0 for grey pictures, 1 for pure colours."""
    high, low = images.amax(1), images.amin(1)
    return ((high - low) / high.clamp(min=1e-6)).mean((1, 2))


def edge_energy(images: Tensor) -> Tensor:
    """0 for an even picture; brightness by the weights of Rec. 601."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
    brightness = (images * weights).sum(1)
    across, down = brightness.diff(dim=2), brightness.diff(dim=1)
    return across.square().mean((1, 2)) + down.square().mean((1, 2))


def flat_share(images: Tensor) -> Tensor:
    """1 for an even picture; the last row and column have no neighbours and do not count."""
    across, down = images.diff(dim=3)[:, :, :-1], images.diff(dim=2)[:, :, :, :-1]
    largest = torch.maximum(across.abs(), down.abs()).amax(1)
    return (largest < FLAT).to(images.dtype).mean((1, 2))
