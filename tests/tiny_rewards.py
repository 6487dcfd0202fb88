"""Tiny files of the rewards with weights, under the names of the official ones; random, but for what must not be."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from official_models import State, image_reward_shapes, open_clip_shapes, random_state
from safetensors.torch import save_file
from tiny import tiny_tokenizer
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from tailorpo.rewards import hpsv2, image_reward
from tailorpo.rewards.aesthetic import HEAD

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
PROMPTS = ("a cat", "red horse", "dog", "a snail")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "red", "horse", "snail", "hill", "dog", "##s"]


def pictures(count: int = 4, size: int = 32, *, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def save_tiny_clip(folder: Path, *, size: int = 32, seed: int = 0) -> Path:
    """A CLIPModel folder as `clip_preference` reads it; biases and norms random too, so that mistakes show."""
    tokenizer = tiny_tokenizer(folder / "source")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPConfig(
        text_config={**sizes, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config={**sizes, "image_size": size, "patch_size": 8},
        projection_dim=24,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    preprocessing = {"image_mean": MEAN, "image_std": STD, "size": {"shortest_edge": size}}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


def save_head(path: Path, widths: tuple[int, ...] = (24, 16, 8, 1), *, seed: int = 3) -> State:
    """Weights in the names and gaps of the aesthetic predictor's file."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for number, (before, after) in enumerate(pairwise(widths)):
        state[f"layers.{2 * number}.weight"] = torch.randn(after, before, generator=generator)
        state[f"layers.{2 * number}.bias"] = torch.randn(after, generator=generator)
    torch.save(state, path)
    return state


def save_tiny_aesthetic(folder: Path) -> Path:
    save_head(save_tiny_clip(folder) / HEAD)
    return folder


# ImageReward: the ViT 32 wide with 4 heads on pictures of 32 x 32, the reader 24 wide with 3 heads.
EYE = {"image": 32, "patch": 8, "width": 32, "depth": 2}
READER = {"words": 20, "positions": 40, "text": 24, "text_depth": 2}
HEADS, TEXT_HEADS = 4, 3


def save_tiny_image_reward(folder: Path) -> State:
    """ImageReward.pt and vocab.txt; returns the weights."""
    state = random_state(image_reward_shapes(**EYE, **READER))
    torch.save(state, folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return state


def shrink_image_reward(patch: pytest.MonkeyPatch, *, vision: Any = None, text: Any = None) -> None:
    """Make the reward expect the tiny files; with settings of its two configs changed."""
    eye = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    reader = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": TEXT_HEADS}
    eye |= {"image_size": 32, "patch_size": 8}
    reader |= {"vocab_size": 20, "max_position_embeddings": 40, "encoder_hidden_size": 32}
    tokens = {
        "bos_token_id": 2,
        "eos_token_id": 3,
        "sep_token_id": 3,
    }  # those of WORDS
    patch.setattr(image_reward, "VISION", {**image_reward.VISION, **eye, **(vision or {})})
    patch.setattr(image_reward, "TEXT", {**image_reward.TEXT, **reader, **tokens, **(text or {})})


# HPSv2: the ViT 40 wide with 4 heads on pictures of 28 x 28, the text tower as wide as the common space, so that a
# projection the wrong way round has the right shape.
TOWERS = {"image": 28, "patch": 7, "width": 40, "depth": 2, "positions": 16, "text": 24, "text_depth": 2, "shared": 24}


def save_tiny_hpsv2(folder: Path) -> State:
    """HPS_v2.1_compressed.pt (float16, as the official one), another v2, the tokenizer; returns v2.1's weights.

    The other one is v2.1 with the sign of all scores turned.
    """
    tokenizer = tiny_tokenizer(folder)
    tokenizer.save_pretrained(folder)
    state = random_state(open_clip_shapes(**TOWERS, words=len(tokenizer)))
    halves = {name: value.half() for name, value in state.items()}
    torch.save({"state_dict": halves, "epoch": 0}, folder / "HPS_v2.1_compressed.pt")
    save_file(halves | {"visual.proj": -halves["visual.proj"]}, folder / "HPS_v2_compressed.safetensors")
    return {name: value.float() for name, value in halves.items()}


def shrink_hpsv2(patch: pytest.MonkeyPatch, *, hidden_act: str = "gelu") -> None:
    """Make the reward expect the tiny files."""
    sizes = {"num_hidden_layers": 2, "hidden_act": hidden_act}
    text = {"hidden_size": 24, "intermediate_size": 96, "num_attention_heads": TEXT_HEADS}
    text |= {"max_position_embeddings": 16, "vocab_size": 54}
    text |= {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    vision = {"hidden_size": 40, "intermediate_size": 160, "num_attention_heads": HEADS}
    vision |= {"image_size": 28, "patch_size": 7}
    config = {"projection_dim": 24, "text_config": {**sizes, **text}, "vision_config": {**sizes, **vision}}
    patch.setattr(hpsv2, "CONFIG", config)
