"""What every reward on CLIP's two towers shares: reading a local transformers folder, and the scorer.

    cos(x, c) = image_features(x) . text_features(c) / (|image_features(x)| |text_features(c)|),    score = f(cos)

with f the model's own exp(logit_scale) * cos if the reward does not say otherwise. Prompts are encoded one by one, so
that no padding and no neighbour can change them, and kept.

Left out: the B x B matrix of all pictures against all prompts, of which a reward needs the diagonal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from tailorpo.device import sent
from tailorpo.errors import RewardError
from tailorpo.rewards.preprocess import OPENAI_MEAN, OPENAI_STD, Preprocess
from tailorpo.rewards.weights import quiet

CHUNK = 32
"""Pictures that go through a tower at once; more are scored in turns, so that a large batch needs no more memory."""

Tokenize = Callable[[str], list[int]]
"""From a prompt to its token ids, with the start and the end token."""


class ClipScorer:
    """A loaded CLIPModel as reward; frozen, in eval mode. No score depends on what else is in the batch."""

    differentiable = True

    def __init__(
        self,
        model: Any,
        preprocess: Preprocess,
        *,
        tokenize: Tokenize,
        name: str,
        formula: Callable[[Tensor], Tensor] | None = None,
        good_threshold: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Take a transformers CLIPModel where it is to stay, and what makes it a reward.

        Args:
            model: the CLIPModel.
            preprocess: what its vision tower reads.
            tokenize: what its text tower reads.
            name: of the reward.
            formula: from cosines (B,) to scores; None is exp(logit_scale) * cos.
            good_threshold: the score from which evaluation counts a picture as good; None where nobody says.
            dtype: of the weights and the towers' arithmetic; features and scores are float32.
        """
        self.name = name
        self.good_threshold = good_threshold
        self.model = model.to(dtype).eval().requires_grad_(False)
        """The transformers CLIPModel."""
        self.preprocess = preprocess
        self.scale: Tensor = model.logit_scale.detach().float().exp()
        """exp(logit_scale), a scalar."""
        self._tokenize = tokenize
        self._formula = formula
        self._text = lru_cache(maxsize=4096)(self._encode)

    @classmethod
    def from_folder(
        cls, folder: Path, *, name: str, device: torch.device | str, hint: str, dtype: torch.dtype = torch.float32
    ) -> ClipScorer:
        """Read a CLIPModel folder without any network; `hint` ends the RewardError about a folder that is not there."""
        model = load_clip(folder, "both", name=name, hint=hint)
        preprocess = read_preprocess(folder, model.config.vision_config.image_size, name=name)
        tokenize = read_tokenizer(folder, longest=model.config.text_config.max_position_embeddings, name=name)
        return cls(model.to(device), preprocess, tokenize=tokenize, name=name, dtype=dtype)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, 3, H, W) in [0, 1] and B prompts -> (B,) float32, with the graph to the pictures if gradients are on."""
        cosine = (self.embed(images) * self.text(prompts)).sum(-1)
        return self.scale * cosine if self._formula is None else self._formula(cosine)

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> normalised image features (B, D); evaluation measures diversity in them."""
        pixels = (self.preprocess(part.to(self.device)) for part in torch.split(images, CHUNK))
        features = [self.model.get_image_features(pixel_values=part).pooler_output.float() for part in pixels]
        return F.normalize(torch.cat(features), dim=-1)

    def text(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> normalised text features (B, D), without a graph."""
        return torch.stack([self._text(prompt) for prompt in prompts])

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.scale.device

    def _encode(self, prompt: str) -> Tensor:
        """Normalised text features (D,) of one prompt."""
        with torch.no_grad():
            tokens = sent(torch.tensor([self._tokenize(prompt)]), self.device)
            output = self.model.get_text_features(input_ids=tokens, attention_mask=torch.ones_like(tokens))
            features: Tensor = output.pooler_output.float()
            return F.normalize(features[0], dim=-1)


def load_clip(folder: Path, tower: Literal["both", "vision"], *, name: str, hint: str = "") -> Any:
    """The CLIPModel in a folder, or its vision tower with the projection: frozen, in eval mode, float32, on the CPU.

    Nothing is downloaded. Raises RewardError: the folder is missing (the message ends with `hint`), damaged, of another
    architecture, or lacks weights.
    """
    if not (folder / "config.json").is_file():
        missing = "config.json is missing in" if folder.is_dir() else "there is no folder"
        raise RewardError(f"reward {name!r}: {missing} {folder}; {hint}")
    kind = read_json(folder / "config.json", name=name).get("model_type")
    if kind != "clip":
        raise RewardError(f"reward {name!r}: {folder} holds a {kind!r} model, not a CLIPModel (model_type 'clip')")
    from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection

    architecture = CLIPModel if tower == "both" else CLIPVisionModelWithProjection
    try:
        with quiet():  # a vision tower alone leaves the text weights over, as it should
            whole: Any = CLIPConfig.from_pretrained(folder, local_files_only=True)
            config = whole if tower == "both" else whole.vision_config
            config.projection_dim = whole.projection_dim  # the tower's own copy of it may be the default
            loaded: Any = architecture.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # a damaged or foreign folder fails in many ways, inside transformers
        raise RewardError(f"reward {name!r}: {folder} cannot be read: {type(error).__name__}: {error}") from error
    model, info = loaded
    if info["missing_keys"]:
        raise RewardError(
            f"reward {name!r}: {len(info['missing_keys'])} weights are missing in {folder}, for example "
            f"{sorted(info['missing_keys'])[0]}"
        )
    return model.eval().requires_grad_(False)


def read_preprocess(folder: Path, size: int, *, name: str) -> Preprocess:
    """As preprocessor_config.json says, with CLIP's own mean and std where it does not; RewardError without it."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise RewardError(f"reward {name!r}: {path} is missing; it holds image_mean, image_std and size")
    config = read_json(path, name=name)
    shorter = config.get("size")
    if isinstance(shorter, dict):
        sides = cast(dict[str, int], shorter)
        shorter = sides.get("shortest_edge") or min(sides.get("height", 0), sides.get("width", 0))
    mean, std = (tuple(cast(Any, config.get(key, default))) for key, default in _STATISTICS)
    try:
        return Preprocess(
            size=size, shorter_side=cast(int | None, shorter) or None, mean=cast(Any, mean), std=cast(Any, std)
        )
    except ValueError as error:
        raise RewardError(f"reward {name!r}: {path}: {error}") from error


_STATISTICS = (("image_mean", OPENAI_MEAN), ("image_std", OPENAI_STD))


def read_tokenizer(folder: Path, *, longest: int, name: str) -> Tokenize:
    """The CLIPTokenizer in a folder, cutting prompts at `longest` tokens; RewardError if there is none."""
    # Without merges.txt a vocab.json would be read as an alphabet, and every prompt as single letters.
    whole, parts = folder / "tokenizer.json", (folder / "vocab.json", folder / "merges.txt")
    if not whole.is_file() and not all(file.is_file() for file in parts):
        raise RewardError(f"reward {name!r}: no tokenizer (tokenizer.json, or vocab.json and merges.txt) in {folder}")
    from transformers import CLIPTokenizer

    try:
        tokenizer = cast(Any, CLIPTokenizer.from_pretrained(folder, local_files_only=True))
    except Exception as error:  # a damaged file fails in many ways, inside tokenizers
        raise RewardError(f"reward {name!r}: the tokenizer in {folder} cannot be read: {error}") from error

    def tokenize(prompt: str) -> list[int]:
        return cast(list[int], tokenizer(prompt, truncation=True, max_length=longest)["input_ids"])

    return tokenize


def read_json(path: Path, *, name: str) -> dict[str, object]:
    """A JSON object; RewardError if it is none."""
    try:
        return cast(dict[str, object], json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise RewardError(f"reward {name!r}: {path} is not valid JSON: {error}") from error
