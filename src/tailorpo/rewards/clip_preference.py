"""Preference rewards in the architecture of PickScore: any transformers CLIPModel, and the two bundled emoji models.

    score(x, c) = exp(logit_scale) * cos(image_features(x), text_features(c))   (Kirstain et al. 2023, arXiv 2305.01569)

The preprocessing is the library's own, on tensors, so that gradients reach the pictures: shorter side to the model's
size (bicubic with antialiasing, clamped), crop in the middle, normalise with the mean and std of
preprocessor_config.json. It differs from the 8-bit path through PIL by rounding only (one or two levels of 255).

Left out: quantising to 8 bits before scoring, text cleaning as open_clip does it (PickScore's reference does not), and
the B x B matrix of all pictures against all prompts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from tailorpo.errors import RewardError

_ASSETS = Path(__file__).resolve().parents[1] / "assets"
_OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
_OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


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
        return _bundled(self.name, device)


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
        return _bundled(self.name, device)


def _bundled(name: str, device: torch.device | str) -> ClipScorer:
    hint = "it comes with the package, so reinstall tailorpo, or run `make miniature` in a clone to train it again"
    return ClipScorer.from_folder(_ASSETS / name, name=name, device=device, hint=hint)


class ClipScorer:
    """A loaded CLIPModel as reward; frozen, in eval mode, float32. No score depends on what else is in the batch."""

    differentiable = True

    def __init__(
        self,
        model: Any,
        tokenize: Callable[[str], list[int]],
        *,
        name: str,
        resize: int | None = None,
        mean: Sequence[float] = _OPENAI_MEAN,
        std: Sequence[float] = _OPENAI_STD,
    ) -> None:
        """Take a transformers CLIPModel, a function from a prompt to its token ids, and the preprocessing.

        `resize` is the length of the shorter side before the crop to the model's square; None = the square's side.
        """
        self.name = name
        self.model = model.float().eval().requires_grad_(False)
        """The transformers CLIPModel."""
        self._tokenize = tokenize
        self._scale: Tensor = model.logit_scale.detach().exp()
        self._size: int = model.config.vision_config.image_size
        self._resize = resize or self._size
        self._mean = torch.tensor(mean, device=self._scale.device).view(1, 3, 1, 1)
        self._std = torch.tensor(std, device=self._scale.device).view(1, 3, 1, 1)
        self._text = lru_cache(maxsize=4096)(self._encode)

    @classmethod
    def from_folder(cls, folder: Path, *, name: str, device: torch.device | str, hint: str) -> ClipScorer:
        """Read a CLIPModel folder without any network; `hint` ends the RewardError about a folder that is not there."""
        if not (folder / "config.json").is_file():
            missing = "config.json is missing in" if folder.is_dir() else "there is no folder"
            raise RewardError(f"reward {name!r}: {missing} {folder}; {hint}")
        if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
            raise RewardError(
                f"reward {name!r}: no tokenizer (tokenizer.json, or vocab.json and merges.txt) in {folder}"
            )
        kind = _read_json(folder / "config.json", name).get("model_type")
        if kind != "clip":
            raise RewardError(f"reward {name!r}: {folder} holds a {kind!r} model, not a CLIPModel (model_type 'clip')")
        resize, mean, std = _preprocessing(folder, name)
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.utils import logging

        bar = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # it would run across the library's own display
        try:
            loading: Any = CLIPModel.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
            tokenizer = cast(Any, CLIPTokenizer.from_pretrained(folder, local_files_only=True))
        except Exception as error:  # a damaged or foreign folder fails in many ways, inside transformers
            raise RewardError(f"reward {name!r}: {folder} cannot be read: {type(error).__name__}: {error}") from error
        finally:
            if bar:
                logging.enable_progress_bar()
        model, info = loading
        if info["missing_keys"]:
            raise RewardError(
                f"reward {name!r}: {len(info['missing_keys'])} weights are missing in {folder}, for example "
                f"{sorted(info['missing_keys'])[0]}; a vision or text tower alone is not enough"
            )
        longest: int = model.config.text_config.max_position_embeddings

        def tokenize(prompt: str) -> list[int]:
            return cast(list[int], tokenizer(prompt, truncation=True, max_length=longest)["input_ids"])

        return cls(model.to(device), tokenize, name=name, resize=resize, mean=mean, std=std)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, 3, H, W) in [0, 1] and B prompts -> (B,) float32, with the graph to the pictures if gradients are on."""
        features: Tensor = self.model.get_image_features(pixel_values=self.preprocess(images)).pooler_output
        text = torch.stack([self._text(prompt) for prompt in prompts])
        return self._scale * (F.normalize(features, dim=-1) * text).sum(-1)

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, S, S), resized, cropped and normalised for a model of input size S."""
        pixels = images.to(device=self._mean.device, dtype=torch.float32)
        height, width = pixels.shape[2:]
        short = min(height, width)
        if short != self._resize:
            size = (int(self._resize * height / short), int(self._resize * width / short))
            # Bicubic overshoots at edges; PIL clips there, and so do we.
            pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (pixels.shape[2] - self._size) // 2, (pixels.shape[3] - self._size) // 2
        pixels = pixels[:, :, top : top + self._size, left : left + self._size]
        return (pixels - self._mean) / self._std

    def _encode(self, prompt: str) -> Tensor:
        """Normalised text features (D,) of one prompt; alone, so that no padding and no neighbour can change them."""
        with torch.no_grad():
            tokens = torch.tensor([self._tokenize(prompt)], device=self._scale.device)
            output = self.model.get_text_features(input_ids=tokens, attention_mask=torch.ones_like(tokens))
            features: Tensor = output.pooler_output
            return F.normalize(features[0], dim=-1)


def _preprocessing(folder: Path, name: str) -> tuple[int | None, tuple[float, ...], tuple[float, ...]]:
    """(shorter side, mean, std) from preprocessor_config.json; CLIP's own where it does not say."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise RewardError(
            f"reward {name!r}: {path} is missing; it says how pictures are normalised (image_mean, image_std)"
        )
    config = _read_json(path, name)
    size = config.get("size")
    if isinstance(size, dict):
        sides = cast(dict[str, int], size)
        size = sides.get("shortest_edge") or min(sides.get("height", 0), sides.get("width", 0))
    mean, std = config.get("image_mean", _OPENAI_MEAN), config.get("image_std", _OPENAI_STD)
    return cast(int | None, size or None), cast(tuple[float, ...], mean), cast(tuple[float, ...], std)


def _read_json(path: Path, name: str) -> dict[str, object]:
    try:
        return cast(dict[str, object], json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise RewardError(f"reward {name!r}: {path} is not valid JSON: {error}") from error
