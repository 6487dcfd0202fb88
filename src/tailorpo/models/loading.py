"""A model's networks from a folder in diffusers' format or from one file, on a device, in the dtype of the run.

Weights are read from safetensors alone. Where a folder holds half-precision files only (`*.fp16.safetensors`), those
are taken. The dtype of the decoder is its family's matter: see `sdxl`.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from tailorpo.errors import UserError
from tailorpo.models import ModelConfig
from tailorpo.models.source import INDEX, find_model, find_tiny_vae, read_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TEXT_MODELS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a text-to-image model is made of.

    Attributes:
        unet: the denoising network.
        vae: between pictures and latents.
        tiny_vae: a small decoder for drafts; None where there is none.
        text_encoders: one for SD, two for SDXL.
        tokenizers: one for each text encoder.
        scheduler: its configuration and noise levels; it takes no step.
        zeros_for_empty: whether the empty prompt of guidance is zeros (SDXL).
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    tiny_vae: AutoencoderTiny | None
    text_encoders: tuple[CLIPTextModel | CLIPTextModelWithProjection, ...]
    tokenizers: tuple[Any, ...]
    scheduler: DDIMScheduler
    zeros_for_empty: bool


def load_parts(config: ModelConfig, device: torch.device) -> Parts:
    """Everything that `config` names, frozen and in evaluation mode.

    Raises:
        UserError: something is missing, damaged, or of another kind than the family's.
    """
    source = find_model(config.path, family=config.family, download=config.download)
    dtype = DTYPES[config.dtype]
    try:
        with quiet():
            if source.is_file():
                from tailorpo.models.single_file import load_single_file

                parts = load_single_file(source, config, dtype)
            else:
                parts = _load_folder(source, config, dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"the model in {source} cannot be loaded: {error}") from error
    _check(parts, source)
    for network in (parts.unet, parts.vae, parts.tiny_vae, *parts.text_encoders):
        if network is not None:
            nn.Module.to(network, device).eval().requires_grad_(False)
    return parts


def load_vae(folder: Path, dtype: torch.dtype, *, key: str) -> AutoencoderKL:
    """An AutoencoderKL from its own folder; `key` is how the run file calls it."""
    _expect(folder, "AutoencoderKL", key)
    return AutoencoderKL.from_pretrained(folder, torch_dtype=dtype, **_weights(folder))


def load_tiny_vae(path: str | None, dtype: torch.dtype) -> AutoencoderTiny | None:
    """An AutoencoderTiny (TAESD) from a folder, or a bundled one."""
    if path is None:
        return None
    folder = find_tiny_vae(path)
    _expect(folder, "AutoencoderTiny", "model.tiny_vae")
    return AutoencoderTiny.from_pretrained(folder, torch_dtype=dtype, **_weights(folder))


def make_scheduler(settings: dict[str, Any], config: ModelConfig) -> DDIMScheduler:
    """Noise levels by a scheduler's configuration, under what the run file says instead.

    Whatever sampler a model names, its noise levels read as DDIM's.

    Raises:
        UserError: the configuration is of another kind of noise.
    """
    kind = str(settings.get("_class_name", ""))
    if "Flow" in kind or "EDM" in kind:
        raise UserError(
            f"the model's scheduler is {kind}; only the noise levels of DDPM are supported (DDIM, PNDM, ...)"
        )
    changes: dict[str, Any] = {}
    if config.prediction_type is not None:
        changes["prediction_type"] = config.prediction_type
    if config.zero_terminal_snr is not None:
        changes["rescale_betas_zero_snr"] = config.zero_terminal_snr
    if config.zero_terminal_snr:
        changes["timestep_spacing"] = "trailing"  # the only one that starts from pure noise (arXiv 2305.08891)
    return cast(DDIMScheduler, DDIMScheduler.from_config(settings, **changes))


@contextmanager
def quiet() -> Generator[None]:
    """Without the progress bars and notices that the loaders print for every component."""
    bars = transformers_logging.is_progress_bar_enabled()
    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])
        if bars:
            transformers_logging.enable_progress_bar()


def _load_folder(folder: Path, config: ModelConfig, dtype: torch.dtype) -> Parts:
    _expect(folder / "unet", "UNet2DConditionModel", "model.path")
    names = list(TEXT_MODELS)[: 2 if config.family == "sdxl" else 1]
    tokenizers: list[Any] = [
        CLIPTokenizer.from_pretrained(  # pyright: ignore[reportUnknownVariableType]
            folder, subfolder=name.replace("text_encoder", "tokenizer"), local_files_only=True
        )
        for name in names
    ]
    vae = folder / "vae" if config.vae_path is None else Path(config.vae_path).expanduser()
    return Parts(
        unet=UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype, **_weights(folder / "unet")),
        vae=load_vae(vae, dtype, key="model.path" if config.vae_path is None else "model.vae_path"),
        tiny_vae=load_tiny_vae(config.tiny_vae, dtype),
        text_encoders=tuple(
            TEXT_MODELS[name].from_pretrained(folder / name, dtype=dtype, **_weights(folder / name)) for name in names
        ),
        tokenizers=tuple(tokenizers),
        scheduler=make_scheduler(read_config(folder / "scheduler", "scheduler_config.json"), config),
        zeros_for_empty=bool(read_config(folder, INDEX).get("force_zeros_for_empty_prompt", config.family == "sdxl")),
    )


def _weights(folder: Path) -> dict[str, Any]:
    """How to read the weights in a folder: safetensors, and the half-precision files if there are no others.

    Raises:
        UserError: there are only pickles, or nothing.
    """
    names = [file.name for file in folder.glob("*.safetensors")]
    whole = [name for name in names if ".fp16." not in name and not name.startswith("openvino")]
    if not names:
        pickles = sorted(file.name for file in folder.glob("*.bin"))
        found = f"only the pickle {pickles[0]}, and opening one runs whatever code it holds" if pickles else "none"
        raise UserError(f"{folder} holds no weights in safetensors format ({found})")
    return {"use_safetensors": True, "local_files_only": True, "variant": None if whole else "fp16"}


def _expect(folder: Path, kind: str, key: str) -> None:
    """Refuse a folder of another kind of network, by name."""
    found = read_config(folder).get("_class_name")
    if found != kind:
        raise UserError(f"{key}: {folder} holds a {found}, expected a folder of an {kind}")


def _check(parts: Parts, source: Path) -> None:
    """Refuse networks that need more than a noisy latent, a time and a prompt."""
    channels, latents = int(parts.unet.config["in_channels"]), int(parts.vae.config["latent_channels"])
    if channels != latents:
        raise UserError(
            f"{source}: the network takes {channels} channels and the VAE gives {latents};"
            " inpainting and image-conditioned models are not supported"
        )
    if parts.unet.config["time_cond_proj_dim"] is not None:
        raise UserError(
            f"{source}: the network takes its guidance scale as an input (LCM); take the model it came from"
        )
    if parts.vae.config.get("latents_mean") is not None:
        raise UserError(f"{source}: the VAE normalises its latents channel by channel, which is not supported")
    if parts.tiny_vae is not None and int(parts.tiny_vae.config["latent_channels"]) != latents:
        raise UserError(
            f"model.tiny_vae takes {parts.tiny_vae.config['latent_channels']} channels, the model has {latents}"
        )
