"""A tiny Qwen2-VL for the tests of HPSv3: configuration, tokenizer, and weights and pictures by formula.

Nothing here depends on a random generator or a version: tests/fixtures/make_hpsv3_official.py uses it under an old
transformers, and the numbers have to be the same.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

REWARD = "<|Reward|>"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
PROMPTS = ("a cat", "two red apples on a {blue} table, oil painting, café")
CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
    "image_token_id": 261,
    "vision_start_token_id": 259,
    "vision_end_token_id": 260,
    "video_token_id": 300,
}


def tokenizer() -> Tokenizer:
    """Every byte is a token, and so is each control token of Qwen2-VL that is needed."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE(vocab={character: number for number, character in enumerate(alphabet)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return tokens


def fill(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Weights like random ones, biases and norms included, by a formula of their name and place."""
    state: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        count = math.prod(shape)
        seed = sum((place + 1) * ord(letter) for place, letter in enumerate(name)) % 9973
        values = np.arange(1, count + 1, dtype=np.float64) * 12.9898 + seed * 78.233
        noise = np.sin(values) * 43758.5453
        noise = (noise - np.floor(noise)) * 2 - 1
        norm = "norm" in name or "ln_q" in name
        if len(shape) == 1 and norm and name.endswith("weight"):
            values = 1 + 0.3 * noise
        elif len(shape) == 1:
            values = 0.3 * noise
        elif "embed_tokens" in name:
            values = noise
        else:
            values = noise * math.sqrt(3 / math.prod(shape[1:])) * (1.5 if "attn" in name else 1.0)
        state[name] = torch.from_numpy(values.reshape(shape)).float()
    return state


def pixels(height: int, width: int, number: int) -> np.ndarray:
    """A picture (H, W, 3) uint8 of smooth waves and a hard edge."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    waves = np.stack([np.sin(x / (9 + number) + y / 17), np.cos(x / 13), np.sin(y / (5 + number))], axis=-1)
    waves[height // 3 : height // 2, width // 4 : width // 2] = (1.0, -1.0, 0.3)
    return ((waves + 1) * 127.5).round().astype(np.uint8)


def save_tiny_hpsv3(folder: Path, *, vocabulary: int = 263) -> Path:
    """The folder that the reward wants, its weights under the names of transformers 4.45."""
    from safetensors.torch import save_file
    from transformers import Qwen2VLConfig

    from tailorpo.rewards.hpsv3 import make_body, make_head

    config = Qwen2VLConfig(**CONFIG)
    config.text_config.vocab_size = vocabulary
    body = {name: list(value.shape) for name, value in make_body(config, torch.float32).state_dict().items()}
    shapes = {name.replace("language_model.", "model.", 1): shape for name, shape in body.items()}
    shapes |= {f"rm_head.{name}": list(value.shape) for name, value in make_head(64).state_dict().items()}
    save_file(fill({**shapes, "lm_head.weight": [vocabulary, 64]}), folder / "HPSv3.safetensors")
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_vl", "vocab_size": 300, **CONFIG}))
    return folder
