"""The LAION aesthetic predictor: what people rate a picture from 1 to 10 (Schuhmann 2022; the reward of DDPO and D3PO).

    score(x) = MLP(image_features(x) / |image_features(x)|)

The MLP sits on CLIP ViT-L/14's projected image embedding and has no activation anywhere, so at evaluation it is one
affine map; its dropouts are off. Nothing clips the score: a model that games it can pass 10. The prompt is not read.

Left out: DDPO's rounding of the pictures to 8 bits before scoring, which has no gradient.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from tailorpo.errors import RewardError
from tailorpo.rewards.clip_folder import ClipPreprocess, load_clip


@dataclass(frozen=True, kw_only=True)
class Aesthetic:
    """How beautiful people find a picture: the LAION aesthetic predictor, about 1 to 10.

    `path` is a folder of the CLIP model under it, `file` the predictor's own weights,
    sac+logos+ava1-l14-linearMSE.pth.
    """

    name: Literal["aesthetic"] = "aesthetic"
    path: str
    file: str
    differentiable = True
    needs = "path: openai/clip-vit-large-patch14 (1.7 GB), file: sac+logos+ava1-l14-linearMSE.pth (3.7 MB)"
    units = "rating, about 1 to 10; Stable Diffusion 1.5 about 5 to 6"
    source = "Schuhmann 2022, github.com/christophschuhmann/improved-aesthetic-predictor"

    def load(self, device: torch.device | str) -> AestheticScorer:
        """Read both; RewardError if one is missing or they do not fit together."""
        folder = Path(self.path).expanduser()
        hint = "download it first\n  hf download openai/clip-vit-large-patch14 --local-dir clip-vit-large-patch14"
        model = load_clip(folder, "vision", name=self.name, hint=hint)
        preprocess = ClipPreprocess.from_folder(folder, model.config.image_size, device, name=self.name)
        layers = [(weight.to(device), bias.to(device)) for weight, bias in _read_head(Path(self.file).expanduser())]
        width = int(model.config.projection_dim)
        if layers[0][0].shape[1] != width:
            raise RewardError(
                f"reward {self.name!r}: {self.file} expects embeddings of {layers[0][0].shape[1]} numbers, the model "
                f"in {folder} gives {width}; the predictor belongs to clip-vit-large-patch14 (768)"
            )
        return AestheticScorer(model.to(device), preprocess, layers=layers, name=self.name)


class AestheticScorer:
    """The loaded predictor; frozen, in eval mode, float32."""

    differentiable = True

    def __init__(
        self, model: Any, preprocess: ClipPreprocess, *, layers: Sequence[tuple[Tensor, Tensor]], name: str
    ) -> None:
        """Take a CLIPVisionModelWithProjection, its preprocessing, and the (weight, bias) of the linear layers."""
        self.name = name
        self.model = model
        self.preprocess = preprocess
        self._layers = layers

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B,) float32, with the graph to the pictures if gradients are on."""
        embeddings: Tensor = self.model(pixel_values=self.preprocess(images)).image_embeds
        x = F.normalize(embeddings, dim=-1)
        for weight, bias in self._layers:
            x = F.linear(x, weight, bias)
        return x.squeeze(1)


def _read_head(path: Path) -> list[tuple[Tensor, Tensor]]:
    """The linear layers `layers.N.weight`, `layers.N.bias` in the order of N (the gaps are dropouts)."""
    if not path.is_file():
        raise RewardError(
            f"reward 'aesthetic': there is no file {path}; get sac+logos+ava1-l14-linearMSE.pth from "
            "github.com/christophschuhmann/improved-aesthetic-predictor"
        )
    try:
        state = cast(dict[str, Tensor], torch.load(path, map_location="cpu", weights_only=True))
        numbers = sorted(int(key[1]) for key in map(re.compile(r"layers\.(\d+)\.weight").fullmatch, state) if key)
        layers = [(state[f"layers.{n}.weight"].float(), state[f"layers.{n}.bias"].float()) for n in numbers]
        fits = all(below[0].shape[0] == above[0].shape[1] for below, above in pairwise(layers))
        if not layers or not fits or layers[-1][0].shape[0] != 1:
            raise ValueError(f"it holds {sorted(state)[:3]}, expected layers.N.weight and layers.N.bias that end in 1")
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, TypeError, EOFError) as error:
        raise RewardError(f"reward 'aesthetic': {path} is not an aesthetic predictor: {error}") from error
    return layers
