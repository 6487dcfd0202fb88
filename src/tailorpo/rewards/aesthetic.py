"""The LAION aesthetic predictor: what people rate a picture from 1 to 10 (Schuhmann 2022; the reward of DDPO and D3PO).

    score(x) = head(image_features(x) / |image_features(x)|)

The head sits on CLIP ViT-L/14's projected image embedding and is one affine map (affine_head.py). Nothing clips the
score: a model that games it can pass 10. The prompt is not read.

Left out: DDPO's rounding of the pictures to 8 bits before scoring, which has no gradient (`eight_bit` of its
preprocessing does it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tailorpo.rewards.affine_head import AffineHead
from tailorpo.rewards.clip import CHUNK, load_clip, read_preprocess
from tailorpo.rewards.preprocess import Preprocess
from tailorpo.rewards.weights import Download, check, missing_downloads, read_weights

HEAD = "sac+logos+ava1-l14-linearMSE.pth"


@dataclass(frozen=True, kw_only=True)
class Aesthetic:
    """How beautiful people find a picture: the LAION aesthetic predictor, about 1 to 10."""

    name: Literal["aesthetic"] = "aesthetic"
    path: str
    differentiable = True
    needs = "path: a folder with openai/clip-vit-large-patch14 and sac+logos+ava1-l14-linearMSE.pth (1.7 GB)"
    units = "rating, about 1 to 10; Stable Diffusion 1.5 about 5 to 6"
    source = "Schuhmann 2022, github.com/christophschuhmann/improved-aesthetic-predictor"
    downloads = (
        Download(
            repository="openai/clip-vit-large-patch14",
            files=("config.json", "model.safetensors", "preprocessor_config.json"),
            size="1.7 GB",
            licence="MIT (its code)",
        ),
        Download(
            repository="https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
            + HEAD.replace("+", "%2B"),
            files=(HEAD,),
            size="3.7 MB",
            licence="Apache-2.0",
        ),
    )

    def missing(self) -> list[str]:
        """What is not there yet, one line each, with the command that fetches it."""
        return missing_downloads(Path(self.path).expanduser(), self.downloads)

    def load(self, device: torch.device | str) -> AestheticScorer:
        """Read both; RewardError if one is missing or they do not fit together."""
        folder = check(self)
        model = load_clip(folder, "vision", name=self.name)
        preprocess = read_preprocess(folder, model.config.image_size, name=self.name)
        state = read_weights(folder / HEAD, name=self.name)
        head = AffineHead.of(state, model.config.projection_dim, name=self.name, source=folder / HEAD)
        return AestheticScorer(model.to(device), preprocess, head=head.to(device), name=self.name)


class AestheticScorer:
    """The loaded predictor; frozen, in eval mode, float32."""

    differentiable = True

    def __init__(self, model: Any, preprocess: Preprocess, *, head: AffineHead, name: str) -> None:
        """Take a CLIPVisionModelWithProjection, its preprocessing, and the head on the same device."""
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.preprocess = preprocess
        self._head = head

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B,) float32, with the graph to the pictures if gradients are on."""
        pixels = (self.preprocess(part.to(self._head.weight.device)) for part in torch.split(images, CHUNK))
        embeddings = torch.cat([self.model(pixel_values=part).image_embeds for part in pixels])
        return self._head(F.normalize(embeddings, dim=-1))
