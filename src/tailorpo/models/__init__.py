"""What tailorpo needs of a text-to-image model, and the `model` section of a run file.

Model families know nothing of algorithms: they encode prompts and pictures, predict, decode, and switch their adapter
off for the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from tailorpo.prediction import PredictionType
from tailorpo.schedule import Schedule

DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts and the encoded empty prompt of classifier-free guidance.

    Attributes:
        positive: (B, L, E).
        negative: (B, L, E).
    """

    positive: Tensor
    negative: Tensor

    def __len__(self) -> int:
        return len(self.positive)

    def repeat(self, times: int) -> Conditioning:
        """The whole batch `times` times in a row: rows 0..B-1, then 0..B-1 again."""
        return Conditioning(self.positive.repeat(times, 1, 1), self.negative.repeat(times, 1, 1))

    def rows(self, index: Tensor | slice) -> Conditioning:
        """A selection of the batch."""
        return Conditioning(self.positive[index], self.negative[index])


class DiffusionModel(Protocol):
    """One text-to-image model with a trainable adapter.

    Attributes:
        latent_shape: (C, h, w).
        picture_shape: (3, H, W) of what `decode` returns.
        device: where the weights are.
        prediction_type: what the network predicts.
        alphas_cumprod: abar, the share of signal in the variance at each training time, (T,) float64.
        evaluations: latents given to `predict` since construction, whatever its guidance needs inside.
    """

    latent_shape: tuple[int, int, int]
    picture_shape: tuple[int, int, int]
    device: torch.device
    prediction_type: PredictionType
    alphas_cumprod: Tensor
    evaluations: int

    def schedule(self, steps: int) -> Schedule:
        """The model's noise levels over the given number of denoising steps."""
        ...

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Text embeddings, (B, L, E); each distinct prompt is encoded once and kept."""
        ...

    def encode_images(self, images: Tensor) -> Tensor:
        """Clean latents, (B, C, h, w) float32, of pictures (B, *picture_shape) in [0, 1]: the mean of the encoder's
        posterior in the scale that the network was trained with. Without a gradient."""
        ...

    def predict(self, latents: Tensor, time: int | Tensor, cond: Conditioning, *, guidance_scale: float) -> Tensor:
        """The guided network output at (B, C, h, w) float32 latents, float32.

        `time` is one training time for all rows, or one for each, (B,) int64.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W) float32, of clean latents; differentiable."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Within it the adapter is off: the frozen model that training started from."""
        ...

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained parameters under names that do not change between runs."""
        ...

    def save_lora(self, folder: Path) -> None:
        """Write the adapter as diffusers' standard `pytorch_lora_weights.safetensors`."""
        ...

    def load_lora(self, folder: Path) -> None:
        """Read what `save_lora` wrote into the adapter."""
        ...


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """A low-rank adapter (Hu et al. 2021, arXiv 2106.09685) on the denoising network.

    Attributes:
        rank: rank of each update.
        alpha: scale of the update is alpha / rank; None is alpha = rank.
        targets: "attention" (query, key, value, output projections, as the paper's line of work does), or
            "attention+conv": also the convolutions of the residual blocks, needed where the network has little
            attention.
    """

    rank: int = 4
    alpha: float | None = None
    targets: Literal["attention", "attention+conv"] = "attention"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The `model` section of a run file.

    Attributes:
        family: "sd" for Stable Diffusion 1.x and 2.x.
        path: "emoji" for the bundled miniature, otherwise a local folder in diffusers' format.
        dtype: of the network's weights and activations; log-ratios are always float32.
        lora: the trained adapter; null for a model that is only sampled.
    """

    family: Literal["sd"] = "sd"
    path: str
    dtype: DType = "float32"
    lora: LoRA | None = LoRA()

    def load(self, device: torch.device | str, *, seed: int = 0) -> DiffusionModel:
        """Load the weights and attach a fresh adapter, whose initialisation `seed` fixes.

        Raises:
            UserError: there is no usable model at `path`.
        """
        from tailorpo.models.sd import StableDiffusion  # diffusers takes seconds to import

        return StableDiffusion.load(self, torch.device(device), seed=seed)
