"""Text rendering: how much of the quoted text of a prompt stands in the picture (the OCR reward of Flow-GRPO).

    score = 1 - min(d, n) / n,   n = len(target),   d = 0 if target is part of what was read, else their edit distance

The target is what stands between the first two double quotes of the prompt: `a poster that says "Grand Opening"`. Both
sides lose their spaces and become lower case; what was read is all lines, joined. (Liu et al. 2025, arXiv 2505.05470)

What reads is rapidocr (PP-OCRv6, its networks come inside its package) on onnxruntime, on the CPU. Flow-GRPO uses
PaddleOCR 2, so scores are not comparable to its tables digit by digit. Not differentiable. Left out: Flow-GRPO's zero
for a picture on which the reader fails, which would hide a broken installation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from tailorpo.errors import RewardError
from tailorpo.images import to_uint8


@dataclass(frozen=True, kw_only=True)
class OCR:
    """Does the picture show the text in double quotes: the share of it that can be read, 0 to 1."""

    name: Literal["ocr"] = "ocr"
    differentiable = False
    needs = "pip install 'tailorpo[ocr]' (280 MB); prompts with a text in double quotes"
    units = "share of the characters, 0 to 1"
    source = "Liu et al. 2025 (Flow-GRPO), arXiv 2505.05470"

    def load(self, device: torch.device | str) -> OCRScorer:
        """Start the reader, which runs on the CPU; RewardError if it is not installed."""
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise RewardError(
                f"reward {self.name!r} needs the packages rapidocr and onnxruntime ({error}); "
                "pip install 'tailorpo[ocr]'"
            ) from error
        threads = "EngineConfig.onnxruntime.intra_op_num_threads"
        reader: Any = RapidOCR(params={"Global.log_level": "error", threads: torch.get_num_threads()})

        def read(pixels: np.ndarray) -> str:
            lines: Any = reader(pixels[..., ::-1]).txts  # it wants blue first, and says None for nothing
            return "".join(cast(Sequence[str], lines or ()))

        return OCRScorer(read, name=self.name)


class OCRScorer:
    """A reader of text, and the score of what it reads."""

    differentiable = False

    def __init__(self, read: Callable[[np.ndarray], str], *, name: str) -> None:
        """Take a function from a picture (H, W, 3) uint8 RGB to all of its text."""
        self.name = name
        self._read = read

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, 3, H, W) in [0, 1] and B prompts with a quoted text -> (B,) float32; RewardError without one."""
        targets = [quoted(prompt) for prompt in prompts]
        pixels = to_uint8(images).permute(0, 2, 3, 1).contiguous().numpy()
        scores = [text_accuracy(self._read(picture), target) for picture, target in zip(pixels, targets, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)


def quoted(prompt: str) -> str:
    """What stands between the first two double quotes of a prompt.

    Raises:
        RewardError: there are none, or nothing but spaces between them.
    """
    parts = prompt.split('"')
    if len(parts) < 3 or not _plain(parts[1]):
        raise RewardError(
            f"reward 'ocr': the prompt {prompt!r} has no text in double quotes to look for in the picture; write for "
            'example: a poster that says "Grand Opening"'
        )
    return parts[1]


def text_accuracy(read: str, target: str) -> float:
    """1 - min(d, n) / n for n = len(target) > 0 characters, d their edit distance, 0 where `read` contains `target`."""
    read, target = _plain(read), _plain(target)
    distance = 0 if target in read else edit_distance(read, target)
    return 1 - min(distance, len(target)) / len(target)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: the least number of characters to insert, delete or replace that turns one into the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(above + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def _plain(text: str) -> str:
    return text.replace(" ", "").lower()
