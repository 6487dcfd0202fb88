"""Preference rewards in the architecture of PickScore: any transformers CLIPModel, and the two bundled emoji models.

    score(x, c) = exp(logit_scale) * cos(image_features(x), text_features(c))   (Kirstain et al. 2023, arXiv 2305.01569)

Left out: text cleaning as open_clip does it (PickScore's reference does not), and the B x B matrix of all pictures
against all prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from tailorpo.errors import RewardError
from tailorpo.rewards.clip_folder import ClipPreprocess, load_clip, read_json

_ASSETS = Path(__file__).resolve().parents[1] / "assets"
QUALITY = "quality.json"
"""A model folder may say here from which score on a picture is good: {"threshold": 1.5}."""


@dataclass(frozen=True, kw_only=True)
class ClipPreference:
    """A CLIPModel folder of yours as reward: PickScore itself, or one trained on your own preferences.

    The folder holds config.json, model.safetensors, the tokenizer's files and preprocessor_config.json, as
    `CLIPModel.save_pretrained` and friends write them.
    """

    name: Literal["clip_preference"] = "clip_preference"
    path: str
    differentiable = True
    needs = "path: a local CLIPModel folder, for example yuvalkirstain/PickScore_v1 (3.9 GB)"
    units = "exp(logit_scale) * cosine; PickScore about 17 to 24"
    source = "Kirstain et al. 2023 (PickScore), arXiv 2305.01569"

    def load(self, device: torch.device | str) -> ClipScorer:
        """Read the folder; RewardError if it is missing or incomplete."""
        return ClipScorer.from_folder(
            Path(self.path).expanduser(),
            name=self.name,
            device=device,
            hint="download one first, for example\n  hf download yuvalkirstain/PickScore_v1 --local-dir pickscore",
        )


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
    return ClipScorer.from_folder(folder, name=name, device=device, hint=hint), folder


class ClipScorer:
    """A loaded CLIPModel as reward; frozen, in eval mode, float32. No score depends on what else is in the batch."""

    differentiable = True

    def __init__(
        self,
        model: Any,
        preprocess: ClipPreprocess,
        *,
        tokenize: Callable[[str], list[int]],
        name: str,
        good_threshold: float | None = None,
    ) -> None:
        """Take a transformers CLIPModel, its preprocessing, and a function from a prompt to its token ids."""
        self.name = name
        self.good_threshold = good_threshold
        """The score from which evaluation counts a picture as good; None where the folder names none."""
        self.model = model.float().eval().requires_grad_(False)
        """The transformers CLIPModel."""
        self.preprocess = preprocess
        self._tokenize = tokenize
        self.scale: Tensor = model.logit_scale.detach().exp()
        """exp(logit_scale), a scalar."""
        self._text = lru_cache(maxsize=4096)(self._encode)

    @classmethod
    def from_folder(cls, folder: Path, *, name: str, device: torch.device | str, hint: str) -> ClipScorer:
        """Read a CLIPModel folder without any network; `hint` ends the RewardError about a folder that is not there."""
        model = load_clip(folder, "both", name=name, hint=hint)
        preprocess = ClipPreprocess.from_folder(folder, model.config.vision_config.image_size, device, name=name)
        if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
            raise RewardError(f"reward {name!r}: no tokenizer (tokenizer.json or vocab.json, merges.txt) in {folder}")
        from transformers import CLIPTokenizer

        try:
            tokenizer = cast(Any, CLIPTokenizer.from_pretrained(folder, local_files_only=True))
        except Exception as error:  # a damaged file fails in many ways, inside tokenizers
            raise RewardError(f"reward {name!r}: the tokenizer in {folder} cannot be read: {error}") from error
        longest: int = model.config.text_config.max_position_embeddings

        def tokenize(prompt: str) -> list[int]:
            return cast(list[int], tokenizer(prompt, truncation=True, max_length=longest)["input_ids"])

        quality = read_json(folder / QUALITY, name=name) if (folder / QUALITY).is_file() else {}
        threshold = quality.get("threshold")
        if threshold is not None and (isinstance(threshold, bool) or not isinstance(threshold, int | float)):
            raise RewardError(f"reward {name!r}: the threshold in {folder / QUALITY} is no number: {threshold!r}")
        return cls(model.to(device), preprocess, tokenize=tokenize, name=name, good_threshold=threshold)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, 3, H, W) in [0, 1] and B prompts -> (B,) float32, with the graph to the pictures if gradients are on."""
        return self.scale * (self.embed(images) * self.text(prompts)).sum(-1)

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> normalised image features (B, D); evaluation measures diversity in them."""
        features: Tensor = self.model.get_image_features(pixel_values=self.preprocess(images)).pooler_output
        return F.normalize(features, dim=-1)

    def text(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> normalised text features (B, D), without a graph."""
        return torch.stack([self._text(prompt) for prompt in prompts])

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.scale.device

    def _encode(self, prompt: str) -> Tensor:
        """Normalised text features (D,) of one prompt; alone, so that no padding and no neighbour can change them."""
        with torch.no_grad():
            tokens = torch.tensor([self._tokenize(prompt)], device=self.device)
            output = self.model.get_text_features(input_ids=tokens, attention_mask=torch.ones_like(tokens))
            features: Tensor = output.pooler_output
            return F.normalize(features[0], dim=-1)
