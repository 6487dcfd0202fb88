"""JPEG compressibility and incompressibility: the size of the picture as a JPEG file (Black et al. 2023, DDPO).

    size(x) = bytes of JPEG(x, quality 95) / 1000,   compressibility = -size,   incompressibility = +size

Needs no weights and no prompt. Not differentiable: the encoder rounds. The number depends a little on the libjpeg that
Pillow was built with, and on the size of the picture (an empty 512 x 512 picture has 4.7 kB, noise 308 kB).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Size of each picture as a JPEG of quality 95 in kB (1000 bytes): (B, 3, H, W) in [0, 1] -> (B,) float32.

    Values become bytes as in DDPO: times 255, rounded to the nearest integer (halves to even), clamped to 0..255.
    Pillow's defaults otherwise: 4:2:0 chroma, no optimised Huffman tables.
    """
    pixels = (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)
    sizes: list[float] = []
    for picture in pixels.permute(0, 2, 3, 1).cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32, device=images.device)


@dataclass(frozen=True, kw_only=True)
class JpegCompressibility:
    """Minus the JPEG size in kB: smooth, empty pictures win."""

    name: Literal["jpeg_compressibility"] = "jpeg_compressibility"
    differentiable = False
    needs = "nothing"
    units = "-kB at quality 95, below 0"
    source = "Black et al. 2023 (DDPO), arXiv 2305.13301"

    def load(self, device: torch.device | str) -> JpegCompressibility:
        """The configuration is the reward."""
        return self

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B,), minus kB; the prompts are not read."""
        return -jpeg_kilobytes(images)


@dataclass(frozen=True, kw_only=True)
class JpegIncompressibility:
    """The JPEG size in kB: detail, texture and noise win."""

    name: Literal["jpeg_incompressibility"] = "jpeg_incompressibility"
    differentiable = False
    needs = "nothing"
    units = "kB at quality 95, above 0"
    source = "Black et al. 2023 (DDPO), arXiv 2305.13301"

    def load(self, device: torch.device | str) -> JpegIncompressibility:
        """The configuration is the reward."""
        return self

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B,), kB; the prompts are not read."""
        return jpeg_kilobytes(images)
