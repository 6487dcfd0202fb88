"""What tailorpo needs of a text-to-image model, and the `model` section of a run file.

Model families know nothing of algorithms: they encode prompts and pictures, predict, decode, and switch their adapter
off for the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from tailorpo.device import repeat_bits
from tailorpo.errors import UserError
from tailorpo.models.source import Family, find_model, find_tiny_vae
from tailorpo.prediction import PredictionType
from tailorpo.schedule import Schedule

DType = Literal["float32", "bfloat16", "float16"]
Pixels = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts and the encoded empty prompt of classifier-free guidance.

    Attributes:
        positive: (B, L, E).
        negative: (B, L, E).
        pooled_positive: (B, D), SDXL's pooled text embeddings; None for SD, as the two below.
        pooled_negative: (B, D).
        sizes: (B, 6), what SDXL is told of the picture's size.
    """

    positive: Tensor
    negative: Tensor
    pooled_positive: Tensor | None = None
    pooled_negative: Tensor | None = None
    sizes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.positive)

    def repeat(self, times: int) -> Conditioning:
        """The whole batch `times` times in a row: rows 0..B-1, then 0..B-1 again."""
        return self._each(lambda tensor: tensor.repeat(times, *[1] * (tensor.ndim - 1)))

    def rows(self, index: Tensor | slice) -> Conditioning:
        """A selection of the batch."""
        return self._each(lambda tensor: tensor[index])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return replace(self, **{name: change(tensor) for name, tensor in vars(self).items() if tensor is not None})


class DiffusionModel(Protocol):
    """One text-to-image model of which an adapter, or the whole network, is trained.

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

    def decode_draft(self, latents: Tensor) -> Tensor:
        """The same from the cheap decoder, if the model has one: for pictures that are only compared on the way."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Within it the model is the frozen one that training started from."""
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

    def networks(self) -> Sequence[nn.Module]:
        """The networks that `predict` calls: the trained one and, where that is another, the reference."""
        ...

    def save_unet(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the network, trained as a whole, as a `unet` folder in diffusers' format; `weights` are its values, by
        the names of `trainable`."""
        ...

    def load_unet(self, folder: Path) -> None:
        """Read what `save_unet` wrote."""
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
        family: "sd" for Stable Diffusion 1.x and 2.x, "sdxl" for XL base.
        path: "emoji" for the bundled miniature, a local folder in diffusers' format, a `.safetensors` file in the
            original layout, or a hub id.
        dtype: of the network's weights and activations; log-ratios are always float32.
        lora: the trained adapter; null with `full`, or for a model that is only sampled.
        full: train every parameter of the denoising network instead of an adapter.
        size: of the pictures, one number or [height, width]; null is what the network was trained at.
        prediction_type: what the network predicts, where the model does not say or says it wrongly.
        zero_terminal_snr: true for noise levels that begin at pure noise (arXiv 2305.08891), with trailing steps; null
            is as the model says.
        vae_path: a folder of an AutoencoderKL to use instead of the model's own.
        tiny_vae: a folder of an AutoencoderTiny (TAESD), or "emoji" for the miniature's, that decodes pictures on the
            way; finished ones are decoded in full.
        download: fetch a hub id that is not on this disk; nothing is ever fetched otherwise.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        vae_slicing: decode one picture of a batch at a time.
        vae_tiling: decode pictures larger than the VAE was trained at in overlapping tiles; approximate.
        channels_last: memory layout of the convolutions, which some GPUs like.
        deterministic: on a CUDA GPU use only kernels that give the same bits every time, so that the same seed is the
            same run, also after a resume; false for rewards with operations that have no such kernel.
    """

    family: Family = "sd"
    path: str
    dtype: DType = "float32"
    lora: LoRA | None = LoRA()
    full: bool = False
    size: Pixels | tuple[Pixels, Pixels] | None = None
    prediction_type: PredictionType | None = None
    zero_terminal_snr: bool | None = None
    vae_path: str | None = None
    tiny_vae: str | None = None
    download: bool = False
    gradient_checkpointing: bool = False
    vae_slicing: bool = False
    vae_tiling: bool = False
    channels_last: bool = False
    deterministic: bool = True

    def __post_init__(self) -> None:
        if self.full and self.lora is not None:
            raise ValueError("full trains the whole network and lora an adapter; with full: true say lora: null")
        if self.full and self.dtype == "float16":
            raise ValueError("full fine-tuning in float16 loses small gradients; use dtype bfloat16 or float32")

    @property
    def trains(self) -> bool:
        """Whether anything is trained, so that there is a reference."""
        return self.full or self.lora is not None

    def missing(self) -> list[str]:
        """What the section names and is not on this disk, one line each with the key it belongs to."""
        problems: list[str] = []
        # What would be fetched is not missing.
        if not self.download:
            try:
                find_model(self.path, family=self.family)
            except UserError as error:
                problems.append(str(error).removeprefix("model."))
        tiny = None if self.tiny_vae is None else str(find_tiny_vae(self.tiny_vae))
        for key, folder in (("vae_path", self.vae_path), ("tiny_vae", tiny)):
            if folder is not None and not Path(folder).expanduser().is_dir():
                problems.append(f"{key}: there is no folder {folder} (looked from {Path.cwd()})")
        return problems

    def load(self, device: torch.device | str, *, seed: int = 0) -> DiffusionModel:
        """Load the weights and attach a fresh adapter, whose initialisation `seed` fixes.

        Raises:
            UserError: there is no usable model at `path`.
        """
        device = torch.device(device)
        repeat_bits(device, wanted=self.deterministic)
        # diffusers takes seconds to import
        if self.family == "sdxl":
            from tailorpo.models.sdxl import StableDiffusionXL as Model
        else:
            from tailorpo.models.sd import StableDiffusion as Model
        return Model.load(self, device, seed=seed)
