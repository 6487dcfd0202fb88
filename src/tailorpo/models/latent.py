"""What Stable Diffusion 1.x, 2.x and XL share: one UNet between latents, a decoder, and guidance by an empty prompt.

The guided output is m = m_uncond + w (m_cond - m_uncond) (Ho and Salimans 2022, arXiv 2207.12598); both halves are one
network call, and gradients flow through both.

The decoder's output is clamped to [0, 1] with a straight-through gradient: a plain clamp has gradient zero on white
and black, which are most of a clean picture, and would stop a reward's gradient there.

Left out: the safety checker (it judges finished pictures and has no part in training), and training of the text
encoders.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from tailorpo.errors import UserError
from tailorpo.models import Conditioning, ModelConfig
from tailorpo.models.loading import DTYPES, Parts, load_parts
from tailorpo.models.trained import Adapter, Frozen, Full, Trained
from tailorpo.prediction import PredictionType
from tailorpo.schedule import Schedule, Spacing, ddpm_schedule

SPACINGS: dict[str, Spacing] = {"leading": "leading", "trailing": "trailing", "linspace": "linspace"}


class LatentDiffusion(ABC):
    """A latent diffusion model; see `tailorpo.models.DiffusionModel` for the meaning of each member."""

    def __init__(self, parts: Parts, config: ModelConfig, *, seed: int) -> None:
        self.parts = parts
        self.vae = parts.vae
        self.scheduler = parts.scheduler
        self.tiny_vae = parts.tiny_vae
        self.device = next(parts.unet.parameters()).device
        self.dtype = DTYPES[config.dtype]
        self.prediction_type: PredictionType = self.scheduler.config["prediction_type"]
        factor = 2 ** (len(self.vae.config["block_out_channels"]) - 1)
        height, width = _latent_size(config.size, parts.unet.config["sample_size"], factor)
        self.latent_shape: tuple[int, int, int] = (int(parts.unet.config["in_channels"]), height, width)
        self.picture_shape: tuple[int, int, int] = (3, height * factor, width * factor)
        self.alphas_cumprod = self.scheduler.alphas_cumprod.double()
        self.evaluations = 0
        self._encoded: dict[str, tuple[Tensor, ...]] = {}
        self._set_up(config)
        self.trained: Trained = Frozen(parts.unet)
        if config.lora is not None:
            self.trained = Adapter(parts.unet, config.lora, seed=seed)
        elif config.full:
            self.trained = Full(parts.unet)

    @classmethod
    def load(cls, config: ModelConfig, device: torch.device, *, seed: int = 0) -> Self:
        """Load what `config.path` names.

        Raises:
            UserError: it is missing, damaged, or something else than this family.
        """
        return cls(load_parts(config, device), config, seed=seed)

    @property
    def unet(self) -> UNet2DConditionModel:
        """The network that predicts now."""
        return self.trained.unet

    @abstractmethod
    def encode_texts(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Embeddings (B, L, E), and what else the family takes from its text encoders, (B, ...) each."""

    @abstractmethod
    def conditioning(self, positive: tuple[Tensor, ...], empty: tuple[Tensor, ...]) -> Conditioning:
        """What `encode_texts` gave of B prompts and of the empty one, (1, ...) each, for `predict`."""

    def added_conditions(self, cond: Conditioning, *, guided: bool) -> dict[str, Tensor] | None:
        """What the network takes besides embeddings; with guidance the empty prompt's rows come first."""
        return None

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        # One by one: on a GPU the bits of a row depend on the size of its batch, and which prompts are new on the run.
        for prompt in dict.fromkeys(("", *prompts)):
            if prompt not in self._encoded:
                self._encoded[prompt] = tuple(each[0] for each in self.encode_texts([prompt]))
        positive = map(torch.stack, zip(*(self._encoded[prompt] for prompt in prompts), strict=True))
        return self.conditioning(tuple(positive), tuple(each[None] for each in self._encoded[""]))

    def schedule(self, steps: int) -> Schedule:
        settings = self.scheduler.config
        schedule = ddpm_schedule(
            self.alphas_cumprod,
            steps,
            spacing=SPACINGS[settings["timestep_spacing"]],
            steps_offset=int(settings["steps_offset"]),
            final_alpha_cumprod=1.0 if settings["set_alpha_to_one"] else None,
        )
        if self.prediction_type == "epsilon" and float(schedule.alpha[0]) == 0:
            raise UserError(
                "the model's noise levels begin at pure noise (zero terminal SNR), where a network that predicts the"
                " noise says nothing about the picture; such models predict v: set model.prediction_type: v_prediction"
                " if this one does, otherwise model.zero_terminal_snr: false"
            )
        return schedule

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        posterior = self.vae.encode((2 * images - 1).to(self.device, self.vae.dtype), return_dict=False)[0]
        return posterior.mode().float() * self.vae.config["scaling_factor"]

    def predict(self, latents: Tensor, time: int | Tensor, cond: Conditioning, *, guidance_scale: float) -> Tensor:
        self.evaluations += len(latents)
        x, guided = latents.to(self.dtype), guidance_scale != 1.0
        if isinstance(time, int):  # filled on the device: a number would be copied there, and the copy waited for
            time = torch.full((1,), time, device=self.device)
        embeddings, added = cond.positive, self.added_conditions(cond, guided=guided)
        if guided:
            x, embeddings = torch.cat([x, x]), torch.cat([cond.negative, cond.positive])
            time = time.repeat(2) if len(time) > 1 else time
        with self.trained.precision():
            outputs = self.unet(x, time, encoder_hidden_states=embeddings, added_cond_kwargs=added, return_dict=False)
        output = outputs[0].float()
        if not guided:
            return output
        unconditional, conditional = output.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def decode(self, latents: Tensor) -> Tensor:
        return _decode(self.vae, latents)

    def decode_draft(self, latents: Tensor) -> Tensor:
        return _decode(self.tiny_vae or self.vae, latents)

    def reference(self) -> AbstractContextManager[None]:
        return self.trained.reference()

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.unet.named_parameters() if parameter.requires_grad}

    def save_lora(self, folder: Path) -> None:
        self._adapter().save(folder)

    def load_lora(self, folder: Path) -> None:
        self._adapter().load(folder)

    def networks(self) -> Sequence[nn.Module]:
        return self.trained.networks

    def save_unet(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        self._full().save(folder, weights)

    def load_unet(self, folder: Path) -> None:
        self._full().load(folder)

    def _adapter(self) -> Adapter:
        if not isinstance(self.trained, Adapter):
            raise UserError("the model has no adapter to save or to load a LoRA into: set model.lora")
        return self.trained

    def _full(self) -> Full:
        if not isinstance(self.trained, Full):
            raise UserError("the network is not trained as a whole: set model.full")
        return self.trained

    def _set_up(self, config: ModelConfig) -> None:
        """The switches for memory and speed; a copy of the network that is made later has them too."""
        if self.device.type == "cuda":
            attend_plainly(self.vae)
        unet: Any = self.parts.unet
        decoders: list[Any] = [self.vae, *([self.tiny_vae] if self.tiny_vae else [])]
        for network in (unet, *decoders):
            if config.gradient_checkpointing:
                network.enable_gradient_checkpointing()
            if config.channels_last:
                network.to(memory_format=torch.channels_last)
        for decoder in decoders:
            if config.vae_slicing:
                decoder.enable_slicing()
            if config.vae_tiling:
                decoder.enable_tiling()


def attend_plainly(vae: AutoencoderKL) -> None:
    """Compute the decoder's one attention as two matrix products.

    Its single head is wider than the fast kernels take. Forward and backward of 4,096 tokens in bfloat16 take 6.2 ms on
    an H200 by the kernel that is left, 99 where it has to repeat its bits, and 2.6 so, with the same bits every time.
    """
    vae.set_attn_processor(AttnProcessor())


def token_ids(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """(B, L) token numbers, cut or padded to the tokenizer's length."""
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return tokens.input_ids


def _decode(vae: AutoencoderKL | AutoencoderTiny, latents: Tensor) -> Tensor:
    scaled = latents / vae.config["scaling_factor"]
    pictures = vae.decode(scaled.to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5
    return pictures + (pictures.clamp(0, 1) - pictures).detach()


def _latent_size(size: int | tuple[int, int] | None, sample_size: Any, factor: int) -> tuple[int, int]:
    """(h, w) of the latents of pictures of `size`, or of the size the network was trained at."""
    if size is None:
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        return int(height), int(width)
    height, width = (size, size) if isinstance(size, int) else size
    if height % factor or width % factor:
        raise UserError(
            f"model.size must be multiples of {factor} (one latent is {factor} pixels), got {height} x {width}"
        )
    return height // factor, width // factor
