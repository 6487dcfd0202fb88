"""Pictures as the vision towers of rewards want them: resized, cut or padded to a square, normalised; differentiable.

The official code of most rewards resizes an 8-bit picture with Pillow, which has no gradient. Here the same filter runs
on tensors, in Pillow's order: across, clip, down, clip. Against Pillow's bytes, in levels of 255 (the bounds are in
tests/unit/test_rewards_preprocess.py, with pictures and checkerboards of odd sizes):

    (default)         nothing is rounded          at most 1.1 levels, mean below 0.29: Pillow's own rounding
    eight_bit=True    rounded after each pass     at most 1 level, more than 99.9 % of a picture's values are equal

Rounding is "straight through": its gradient is taken to be one. The default does not round, for along the gradient that
guidance follows a score should not move in jumps.

Left out: other filters than bicubic, and Pillow's fixed-point coefficients (22 bits), which decide ties:
1 to 2 % of the values of a checkerboard.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tailorpo.device import sent

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP, and of all models here that were made from CLIP or BLIP."""


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """(B, 3, H, W) in [0, 1] to (B, 3, size, size), normalised channel by channel.

    Attributes:
        size: side of the square the tower reads.
        fit: "crop" resizes the shorter side and cuts the middle out; "pad" resizes the longer side and fills up with
            zeros before normalising; "squash" resizes both sides.
        shorter_side: of "crop", before cutting; None is `size`.
        crop_rounding: where the middle is when an odd number of pixels is cut off: transformers rounds the offset down
            ("floor"), torchvision to the nearest, halves to even ("nearest"). They differ when the number is 3 mod 4.
        resize: what the official code resizes: an 8-bit picture with "pillow", which clips to [0, 1], or a float
            "tensor", which overshoots at edges.
        antialias: of "tensor" only; torchvision did not do it by default before 0.17.
        eight_bit: round to whole levels of 255, straight through, wherever the official code holds bytes: the pictures
            and, with "pillow", each pass of the resizing.
        mean: of each channel.
        std: of each channel.
    """

    size: int
    fit: Literal["crop", "pad", "squash"] = "crop"
    shorter_side: int | None = None
    crop_rounding: Literal["floor", "nearest"] = "floor"
    resize: Literal["pillow", "tensor"] = "pillow"
    antialias: bool = True
    eight_bit: bool = False
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD

    def __post_init__(self) -> None:
        """Raise ValueError for settings that contradict each other."""
        if self.resize == "pillow" and not self.antialias:
            raise ValueError('Pillow always antialiases; antialias=False needs resize="tensor"')
        if self.shorter_side is not None and self.shorter_side < self.size:
            raise ValueError(f"the shorter side becomes {self.shorter_side}, too short to cut {self.size} out of it")

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, size, size) on their device; float64 stays, everything else is float32."""
        pixels = images if images.dtype == torch.float64 else images.float()
        if self.eight_bit:
            pixels = _to_levels(pixels)
        pixels = self._square(self._resize(pixels))
        mean, std = (
            sent(torch.tensor(values, dtype=pixels.dtype), pixels.device).view(1, 3, 1, 1)
            for values in (self.mean, self.std)
        )
        return (pixels - mean) / std

    def _resize(self, pixels: Tensor) -> Tensor:
        before, after = tuple(pixels.shape[2:]), self._sides(*pixels.shape[2:])
        if self.resize == "tensor":
            return pixels if before == after else _bicubic(pixels, after, antialias=self.antialias)
        return pillow_bicubic(pixels, after, eight_bit=self.eight_bit)

    def _sides(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing."""
        if self.fit == "squash":
            return self.size, self.size
        if self.fit == "pad":
            scale = self.size / max(height, width)
            return max(1, round(height * scale)), max(1, round(width * scale))
        target, shorter = self.shorter_side or self.size, min(height, width)
        return int(target * height / shorter), int(target * width / shorter)

    def _square(self, pixels: Tensor) -> Tensor:
        """Cut or pad what was resized; nothing to do after "squash"."""
        height, width = pixels.shape[2:]
        if self.fit == "pad":
            across, down = self.size - width, self.size - height
            return F.pad(pixels, (across // 2, across - across // 2, down // 2, down - down // 2))
        top, left = (
            (side - self.size) // 2 if self.crop_rounding == "floor" else round((side - self.size) / 2)
            for side in (height, width)
        )
        return pixels[:, :, top : top + self.size, left : left + self.size]


def pillow_bicubic(pixels: Tensor, sides: tuple[int, int], *, eight_bit: bool = False) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] resized to (height, width) as Pillow does: across, clip, down, clip."""
    for after in ((pixels.shape[2], sides[1]), sides):
        if after != tuple(pixels.shape[2:]):  # a pass that would change nothing is skipped
            pixels = _bicubic(pixels, after, antialias=True)
            pixels = _to_levels(pixels) if eight_bit else pixels.clamp(0, 1)
    return pixels


def _bicubic(pixels: Tensor, sides: tuple[int, int], *, antialias: bool) -> Tensor:
    height, width = pixels.shape[2:]
    if sides[0] != height:
        pixels = _resizing(height, sides[0], antialias, pixels.dtype, pixels.device) @ pixels
    if sides[1] != width:
        pixels = pixels @ _resizing(width, sides[1], antialias, pixels.dtype, pixels.device).T
    return pixels


@lru_cache(maxsize=64)
def _resizing(before: int, after: int, antialias: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What bicubic resizing does to each column of pixels, (after, before). As a matrix product it has the same bits
    every time, which the gradient of torch's own kernel on a GPU has not."""
    eye = torch.eye(before, dtype=dtype)[None, None]
    rows = F.interpolate(eye, size=(after, before), mode="bicubic", antialias=antialias)
    return sent(rows[0, 0], device)


def _to_levels(pixels: Tensor) -> Tensor:
    """The nearest of 0, 1/255, ..., 1, with the gradient of clamping alone."""
    clamped = pixels.clamp(0, 1)
    return clamped.detach().mul(255).round().div(255) + (clamped - clamped.detach())
