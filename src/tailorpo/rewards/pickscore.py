"""PickScore: which of two pictures of a prompt people picked in the Pick-a-Pic web app.

    score(x, c) = exp(logit_scale) * cos(image_features(x), text_features(c))   (Kirstain et al. 2023, arXiv 2305.01569)

A CLIP ViT-H/14 in transformers' own format. The reference goes through transformers' processor: crop offsets are
rounded down, and prompts are not cleaned as open_clip cleans them.

Left out: dividing by 26, as some training code does; a weight of 0.0385 does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from tailorpo.rewards.clip import ClipScorer
from tailorpo.rewards.weights import DTYPES, Download, Dtype, check, missing_downloads


@dataclass(frozen=True, kw_only=True)
class PickScore:
    """Which of two pictures of a prompt people picked: PickScore v1, about 17 to 24."""

    name: Literal["pickscore"] = "pickscore"
    path: str
    dtype: Dtype = "float32"
    differentiable = True
    needs = "path: a folder with the files of yuvalkirstain/PickScore_v1 (3.9 GB)"
    units = "exp(logit_scale) * cosine, about 17 to 24"
    source = "Kirstain et al. 2023, arXiv 2305.01569"
    downloads = (
        Download(
            repository="yuvalkirstain/PickScore_v1",
            files=("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json|vocab.json"),
            size="3.9 GB",
            licence="MIT (its code); none stated for the weights",
        ),
    )

    def missing(self) -> list[str]:
        """What is not there yet, one line each, with the command that fetches it."""
        return missing_downloads(Path(self.path).expanduser(), self.downloads)

    def load(self, device: torch.device | str) -> ClipScorer:
        """Read the folder; RewardError if something is missing or damaged."""
        folder = check(self)
        return ClipScorer.from_folder(folder, name=self.name, device=device, hint="", dtype=DTYPES[self.dtype])
