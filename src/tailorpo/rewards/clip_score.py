"""CLIPScore: whether a picture shows what the prompt says (Hessel et al. 2021, arXiv 2104.08718), in three conventions.

    cosine         cos(x, c)                                       as ImageReward's comparison and much training code
    paper          2.5 max(cos(x, "A photo depicts " + c), 0)      the paper; on CLIP ViT-B/32
    torchmetrics   100 max(cos(x, c), 0)                           of each picture; torchmetrics clips the mean

"paper" follows OpenAI's code in text and picture: prompts are cleaned, crop offsets rounded to the nearest. The others
follow transformers' processor. Where a maximum is 0 there is no gradient.

Left out: the reference-augmented RefCLIPScore.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from tailorpo.rewards.clean_text import clean_text, missing_ftfy
from tailorpo.rewards.clip import ClipScorer, load_clip, read_preprocess, read_tokenizer
from tailorpo.rewards.weights import Download, check, missing_downloads

PREFIX = "A photo depicts "


@dataclass(frozen=True, kw_only=True)
class ClipScore:
    """Whether a picture shows what the prompt says: CLIP's cosine, as it is or as CLIPScore."""

    name: Literal["clip_score"] = "clip_score"
    path: str
    convention: Literal["cosine", "paper", "torchmetrics"] = "cosine"
    differentiable = True
    needs = "path: a CLIPModel folder such as openai/clip-vit-base-patch32 (0.6 GB); for paper: pip install ftfy"
    units = "cosine, about 0.15 to 0.35; paper times 2.5, torchmetrics times 100"
    source = "Hessel et al. 2021, arXiv 2104.08718"
    downloads = (
        Download(
            repository="openai/clip-vit-base-patch32",
            files=("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json|vocab.json"),
            size="0.6 GB",
            licence="MIT (its code)",
        ),
    )

    def missing(self) -> list[str]:
        """What is not there yet, one line each, with the command that fetches it."""
        files = missing_downloads(Path(self.path).expanduser(), self.downloads)
        return files + (missing_ftfy() if self.convention == "paper" else [])

    def load(self, device: torch.device | str) -> ClipScorer:
        """Read the folder; RewardError if something is missing or damaged."""
        folder, paper = check(self), self.convention == "paper"
        model = load_clip(folder, "both", name=self.name)
        preprocess = read_preprocess(folder, model.config.vision_config.image_size, name=self.name)
        tokenize = read_tokenizer(folder, longest=model.config.text_config.max_position_embeddings, name=self.name)
        factor = {"cosine": 1.0, "paper": 2.5, "torchmetrics": 100.0}[self.convention]
        return ClipScorer(
            model.to(device),
            replace(preprocess, crop_rounding="nearest") if paper else preprocess,
            tokenize=(lambda prompt: tokenize(clean_text(PREFIX + prompt))) if paper else tokenize,
            name=self.name,
            formula=(lambda cosine: cosine) if self.convention == "cosine" else lambda c: factor * c.clamp(min=0),
        )
