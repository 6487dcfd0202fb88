"""A preference model that knows how noisy the step was whose predicted clean picture it scores.

    score(x0hat, c, t) = exp(logit_scale + s(t)) * cos(image_features(x0hat, t), text_features(c))

SPO's step-aware preference model (Liang et al. 2024, arXiv 2406.04314) on any transformers CLIPModel. Time enters at
two places. A learned vector v(t) is added to the embedding of every token of the picture, class token and patches
alike, before the first layer: so the tower can read the same pixels as "still blurred" or as "will stay blurred". And
the number s(t) scales the score: early guesses say little about the finished picture, so their gaps should be small,
which a cosine alone can hardly express. Both are zero before training: then the model is the one it was made from.

    (v, s)(t) = W silu(U [cos(j pi t / 1000), sin(j pi t / 1000)]_{j=1..8})

Only slow waves, so that a time between those seen in training is read as lying between them.

Left out: SPO's adaptive layer norms in every layer of the tower (six vectors each; a shift and a scale are enough for
a model of this size), and a time condition of the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn
from torch.nn import functional as F

from tailorpo.errors import RewardError
from tailorpo.rewards.clip import ClipScorer
from tailorpo.rewards.clip_preference import bundled_clip

TIME_FILE = "time_condition.safetensors"
WAVES, HIDDEN = 8, 128


@dataclass(frozen=True, kw_only=True)
class EmojiStepPreference:
    """The bundled step-aware preference: emoji_preference, trained on to score noisy steps by what they will become."""

    name: Literal["emoji_step_preference"] = "emoji_step_preference"
    differentiable = True
    needs = "nothing (bundled)"
    units = "nats of preference: a gap of 1 means the finished picture is preferred in 73 % of comparisons"
    source = "docs/miniature.md; SPO, arXiv 2406.04314"

    def load(self, device: torch.device | str) -> StepClipScorer:
        """Read the bundled folder."""
        clip, folder = bundled_clip(self.name, device)
        return StepClipScorer(clip, load_condition(folder / TIME_FILE, clip, name=self.name))


class TimeCondition(nn.Module):
    """What the model is told about time t in 0..1000: a vector for every token, and the log of the score's factor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(2 * WAVES, HIDDEN)
        self.shift = nn.Linear(HIDDEN, width)
        self.sharpness = nn.Linear(HIDDEN, 1)
        for layer in (self.shift, self.sharpness):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) -> (B, width) and (B,)."""
        phase = math.pi / 1000 * time[:, None] * torch.arange(1, WAVES + 1, device=time.device)
        hidden = F.silu(self.inner(torch.cat([phase.cos(), phase.sin()], dim=1)))
        return self.shift(hidden), self.sharpness(hidden)[:, 0]


def timed_features(model: Any, pixels: Tensor, shift: Tensor) -> Tensor:
    """Normalised image features (B, D) of a CLIPModel with (B, width) added to the embedding of every token.

    Args:
        model: a transformers CLIPModel.
        pixels: preprocessed pictures, (B, 3, S, S).
        shift: (B, width).
    """
    vision: Any = model.vision_model
    tokens: Tensor = vision.pre_layrnorm(vision.embeddings(pixels) + shift[:, None])
    last: Tensor = vision.encoder(inputs_embeds=tokens).last_hidden_state
    features: Tensor = model.visual_projection(vision.post_layernorm(last[:, 0]))
    return F.normalize(features.float(), dim=-1)


def load_condition(path: Path, clip: ClipScorer, *, name: str) -> TimeCondition:
    """Read the time condition of a model; RewardError if it is missing or made for another."""
    condition = TimeCondition(clip.model.config.vision_config.hidden_size)
    try:
        condition.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    except (OSError, RuntimeError, SafetensorError) as error:
        raise RewardError(f"reward {name!r}: {path} cannot be read as its time condition: {error}") from error
    return condition.to(clip.device).eval().requires_grad_(False)


class StepClipScorer:
    """A ClipScorer under a time condition; called as it is, it takes pictures to be finished (time 0)."""

    differentiable = True

    def __init__(self, clip: ClipScorer, condition: TimeCondition, *, time: int = 0) -> None:
        self.name = clip.name
        self.clip = clip
        self.condition = condition
        with torch.no_grad():
            self._shift, self._sharpness = condition(torch.tensor([float(time)], device=clip.device))

    def at(self, time: int) -> StepClipScorer:
        """The same model for predicted clean pictures of the given time, 0 (finished) to 1000 (noise)."""
        return StepClipScorer(self.clip, self.condition, time=time)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, 3, H, W) in [0, 1] and B prompts -> (B,) float32, with the graph to the pictures if gradients are on."""
        pixels = self.clip.preprocess(images.to(self.clip.device))
        features = timed_features(self.clip.model, pixels, self._shift.expand(len(images), -1))
        return self.clip.scale * self._sharpness.exp() * (features * self.clip.text(prompts)).sum(-1)
