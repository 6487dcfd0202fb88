"""Tiny Stable Diffusions with random weights, built from configs: the real classes, only the sizes are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

ZERO_SNR: dict[str, Any] = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
"""Settings of a scheduler that begins at pure noise."""


def save_tiny_tokenizer(folder: Path) -> None:
    """A CLIPTokenizer whose vocabulary is the letters; merges are not needed for random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    save_tiny_tokenizer(folder)
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def tiny_unet(**changes: Any) -> UNet2DConditionModel:
    """8x8x4 latents, two levels, attention at the second."""
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**settings, **changes})


def tiny_vae(**changes: Any) -> AutoencoderKL:
    """16x16 pictures to 8x8x4 latents."""
    settings: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    return AutoencoderKL(**{**settings, **changes})


def save_tiny_taesd(folder: Path, seed: int = 5) -> Path:
    """A tiny AutoencoderTiny for the same latents."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ).save_pretrained(str(folder))
    return folder


def tiny_text(tokenizer: CLIPTokenizer, **changes: Any) -> CLIPTextConfig:
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return CLIPTextConfig(**{**settings, **changes})


def tiny_scheduler(**changes: Any) -> DDIMScheduler:
    """The noise levels of every Stable Diffusion."""
    settings: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(**{**settings, **changes})


def tiny_pipeline(folder: Path, *, seed: int = 0, **scheduler: Any) -> StableDiffusionPipeline:
    """A random Stable Diffusion of about 100 k parameters: 16x16 pictures, 8x8x4 latents."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = tiny_unet()
        vae = tiny_vae()
        tokenizer = tiny_tokenizer(folder / "tokenizer-source")
        text_encoder = CLIPTextModel(tiny_text(tokenizer))
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=tiny_scheduler(**scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_xl_pipeline(folder: Path, *, seed: int = 0, **scheduler: Any) -> StableDiffusionXLPipeline:
    """A random SDXL: two text encoders of widths 16 and 24, pooled embeddings, time ids."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = tiny_unet(
            cross_attention_dim=40,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=12 + 6 * 8,
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
        )
        vae = tiny_vae(scaling_factor=0.13025)
        tokenizer = tiny_tokenizer(folder / "tokenizer-source")
        text_encoder = CLIPTextModel(tiny_text(tokenizer, num_hidden_layers=2))
        text_encoder_2 = CLIPTextModelWithProjection(
            tiny_text(tokenizer, hidden_size=24, num_hidden_layers=3, projection_dim=12)
        )
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=tiny_scheduler(**scheduler),
        add_watermarker=False,
    )


def save_tiny_model(folder: Path, *, seed: int = 0, **scheduler: Any) -> Path:
    """Write a tiny pipeline in diffusers' folder format and return the folder."""
    tiny_pipeline(folder, seed=seed, **scheduler).save_pretrained(str(folder))
    return folder


def save_tiny_xl_model(folder: Path, *, seed: int = 0, **scheduler: Any) -> Path:
    """The same of SDXL."""
    tiny_xl_pipeline(folder, seed=seed, **scheduler).save_pretrained(str(folder))
    return folder
