"""Preference rewards in the architecture of PickScore: any transformers CLIPModel, and the two bundled emoji models.

    score(x, c) = exp(logit_scale) * cos(image_features(x), text_features(c))   (Kirstain et al. 2023, arXiv 2305.01569)

Left out: text cleaning as open_clip does it (PickScore's reference does not).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from tailorpo.errors import RewardError
from tailorpo.rewards.clip import ClipScorer, read_json

_ASSETS = Path(__file__).resolve().parents[1] / "assets"
QUALITY = "quality.json"
"""A model folder may say here from which score on a picture is good: {"threshold": 1.5}."""


@dataclass(frozen=True, kw_only=True)
class ClipPreference:
    """A CLIPModel folder of yours as reward, for example one trained on your own preferences.

    The folder holds config.json, model.safetensors, the tokenizer's files and preprocessor_config.json, as
    `CLIPModel.save_pretrained` and friends write them.
    """

    name: Literal["clip_preference"] = "clip_preference"
    path: str
    differentiable = True
    needs = "path: a local CLIPModel folder"
    units = "exp(logit_scale) * cosine"
    source = "Kirstain et al. 2023 (PickScore), arXiv 2305.01569"

    def load(self, device: torch.device | str) -> ClipScorer:
        """Read the folder; RewardError if it is missing or incomplete."""
        hint = "it has to hold a transformers CLIPModel, as CLIPModel.save_pretrained writes it"
        return read_preference(Path(self.path).expanduser(), name=self.name, device=device, hint=hint)


@dataclass(frozen=True, kw_only=True)
class EmojiPreference:
    """The bundled preference model of the miniature world: crisp, well framed, well lit, and matching the prompt."""

    name: Literal["emoji_preference"] = "emoji_preference"
    differentiable = True
    needs = "nothing (bundled)"
    units = "nats of preference: a gap of 1 means preferred in 73 % of comparisons"
    source = "docs/miniature.md"

    def load(self, device: torch.device | str) -> ClipScorer:
        """Read the bundled folder."""
        return bundled_clip(self.name, device)[0]


@dataclass(frozen=True, kw_only=True)
class EmojiJudge:
    """The bundled held-out judge: trained apart from emoji_preference, meant for evaluation, not for training."""

    name: Literal["emoji_judge"] = "emoji_judge"
    differentiable = True
    needs = "nothing (bundled)"
    units = "nats of preference: a gap of 1 means preferred in 73 % of comparisons"
    source = "docs/miniature.md"

    def load(self, device: torch.device | str) -> ClipScorer:
        """Read the bundled folder."""
        return bundled_clip(self.name, device)[0]


def bundled_clip(name: str, device: torch.device | str) -> tuple[ClipScorer, Path]:
    """A bundled CLIPModel and its folder."""
    hint = "it comes with the package, so reinstall tailorpo, or run `make miniature` in a clone to train it again"
    folder = _ASSETS / name
    return read_preference(folder, name=name, device=device, hint=hint), folder


def read_preference(folder: Path, *, name: str, device: torch.device | str, hint: str) -> ClipScorer:
    """A CLIPModel folder with what it may say about good pictures; `hint` as in `ClipScorer.from_folder`."""
    scorer = ClipScorer.from_folder(folder, name=name, device=device, hint=hint)
    threshold = read_json(folder / QUALITY, name=name).get("threshold") if (folder / QUALITY).is_file() else None
    if threshold is not None and (isinstance(threshold, bool) or not isinstance(threshold, int | float)):
        raise RewardError(f"reward {name!r}: the threshold in {folder / QUALITY} is no number: {threshold!r}")
    scorer.good_threshold = threshold
    return scorer
