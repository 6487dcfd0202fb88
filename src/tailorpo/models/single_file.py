"""Stable Diffusion as one `.safetensors` file in the original layout, as people share it; fully offline.

diffusers renames the tensors. It would fetch each network's sizes and the tokenizer from the hub; here they come from
the package: `assets/layouts` (sizes of SD 1.x, 2.x and XL) and `assets/clip_tokenizer` (CLIP's merge table, which all
of them share).

A file does not say what its network predicts, unless it holds the empty tensors `v_pred` and `ztsnr`, a convention of
SDXL fine-tunes. SD 2.x comes in both kinds, so for it `model.prediction_type` must be said.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers.loaders.single_file_utils import (
    create_diffusers_clip_model_from_ldm,  # pyright: ignore[reportUnknownVariableType]
    infer_diffusers_model_type,  # pyright: ignore[reportUnknownVariableType]
)
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor
from transformers import CLIPTokenizer

from tailorpo.errors import UserError
from tailorpo.models import ModelConfig
from tailorpo.models.loading import TEXT_MODELS, Parts, load_tiny_vae, load_vae, make_scheduler
from tailorpo.models.source import assets, read_config

LAYOUTS = {"v1": ("sd", "sd1"), "v2": ("sd", "sd2"), "xl_base": ("sdxl", "sdxl")}
"""What diffusers calls the layout of a file: the family, and the folder of its sizes in `assets/layouts`."""

Network = TypeVar("Network", AutoencoderKL, UNet2DConditionModel)

_FIRST_WEIGHT = "model.diffusion_model.input_blocks.0.0.weight"


def load_single_file(file: Path, config: ModelConfig, dtype: torch.dtype) -> Parts:
    """The parts of a model in one file.

    Raises:
        UserError: it is damaged, incomplete, or holds another kind of model.
    """
    try:
        checkpoint = load_file(file)
    except SafetensorError as error:
        raise UserError(f"model.path: {file} is not a readable safetensors file ({error})") from error
    layout = assets("layouts") / _layout(checkpoint, file, config)
    scheduler = make_scheduler(_noise(checkpoint, file, config, layout.name), config)
    names = list(TEXT_MODELS)[: 2 if config.family == "sdxl" else 1]
    conversion: dict[str, Any] = {"config": str(layout), "local_files_only": True, "torch_dtype": dtype}

    def convert(kind: type[Network], subfolder: str) -> Network:
        loader: Any = kind  # whose annotation knows paths alone
        try:
            return loader.from_single_file(checkpoint, subfolder=subfolder, **conversion)
        except NotImplementedError as error:  # a weight was left without data
            raise UserError(f"model.path: {file} lacks weights of its {kind.__name__}; it is cut or pruned") from error

    if config.vae_path is None:
        vae = convert(AutoencoderKL, "vae")
    else:
        vae = load_vae(Path(config.vae_path).expanduser(), dtype, key="model.vae_path")
    encoders: list[Any] = [
        create_diffusers_clip_model_from_ldm(TEXT_MODELS[name], checkpoint, subfolder=name, **conversion)
        for name in names
    ]
    parts = Parts(
        unet=convert(UNet2DConditionModel, "unet"),
        vae=vae,
        tiny_vae=load_tiny_vae(config.tiny_vae, dtype),
        text_encoders=tuple(encoders),
        # SD 2.x and the second encoder of SDXL were trained with "!" (token 0) as padding.
        tokenizers=tuple(
            clip_tokenizer(pad="!" if layout.name == "sd2" or name == "text_encoder_2" else "<|endoftext|>")
            for name in names
        ),
        scheduler=scheduler,
        zeros_for_empty=config.family == "sdxl",
    )
    for encoder in parts.text_encoders:
        if any(tensor.is_meta for tensor in encoder.parameters()):
            raise UserError(f"model.path: {file} lacks weights of its {type(encoder).__name__}; it is cut or pruned")
    return parts


def clip_tokenizer(*, pad: str) -> Any:
    """CLIP's tokenizer: 256 bytes, each also as the end of a word, 48,894 merges and two marks."""
    lines = (assets("clip_tokenizer") / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    merges = [tuple(line.split()) for line in lines]
    alphabet = _byte_alphabet()
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    kind: Any = CLIPTokenizer  # the annotation of `merges` says text, the code wants pairs
    return kind(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=77)


def _byte_alphabet() -> list[str]:
    """A visible character for each byte, in CLIP's order: printable ones for themselves, the rest from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    return [*map(chr, printable), *(chr(0x100 + number) for number in range(256 - len(printable)))]


def _layout(checkpoint: dict[str, Tensor], file: Path, config: ModelConfig) -> str:
    """The folder of the sizes, for what the file holds."""
    found = str(cast(Any, infer_diffusers_model_type(checkpoint)))
    # "v1" is also diffusers' word for whatever it does not know.
    if found not in LAYOUTS or _FIRST_WEIGHT not in checkpoint:
        lora = any("lora" in name for name in checkpoint)
        words = "a LoRA" if lora else "no Stable Diffusion" if found == "v1" else f"a model of the kind {found!r}"
        raise UserError(
            f"model.path: {file} holds {words}; accepted are Stable Diffusion 1.x, 2.x and XL base in the original"
            " layout (no inpainting, no refiner, no ControlNet, no SD3 or Flux)"
        )
    family, layout = LAYOUTS[found]
    if family != config.family:
        raise UserError(f"model.path: {file} holds a model of family {family}; set model.family: {family}")
    return layout


def _noise(checkpoint: dict[str, Tensor], file: Path, config: ModelConfig, layout: str) -> dict[str, Any]:
    """The settings of the noise levels: those all Stable Diffusions share, and what the file says of itself."""
    settings = read_config(assets("layouts") / "scheduler", "scheduler_config.json")
    if "v_pred" in checkpoint:
        settings["prediction_type"] = "v_prediction"
    elif layout == "sd2" and config.prediction_type is None:
        raise UserError(
            f"model.path: {file} is a Stable Diffusion 2.x, which comes in two kinds that the file does not tell apart;"
            " set model.prediction_type: epsilon (the 512 base models) or v_prediction (the 768 models, size 768)"
        )
    if "ztsnr" in checkpoint:
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return settings
