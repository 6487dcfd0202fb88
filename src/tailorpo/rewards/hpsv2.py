"""Human Preference Score v2 and v2.1: which of two pictures of a prompt people prefer.

    score(x, c) = cos(image_features(x), text_features(c))                 (Wu et al. 2023, arXiv 2306.09341)

without CLIP's logit scale. The official network is open_clip's ViT-H-14; its checkpoint goes into transformers'
CLIPModel after renaming (`to_clip`). The official preprocessing works on a tensor: the longer side becomes 224, zeros
fill up the square, nothing is clipped. Whether torchvision's resizing antialiases a tensor changed in its version 0.17;
`antialias` says which is meant. Prompts are cleaned as open_clip cleans them. The official code runs in float16
autocast, so its numbers have about three digits.

Left out: times 100, as papers' tables have it; the scores of 2.0 and 2.1 cannot be compared in any unit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tailorpo.errors import RewardError
from tailorpo.rewards.clean_text import clean_text, missing_ftfy
from tailorpo.rewards.clip import ClipScorer, read_tokenizer
from tailorpo.rewards.preprocess import Preprocess
from tailorpo.rewards.weights import (
    DTYPES,
    Download,
    Dtype,
    build_strictly,
    check,
    first_present,
    missing_downloads,
    read_weights,
)

CONFIG: Mapping[str, Any] = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "hidden_act": "gelu",
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
}
"""ViT-H-14. open_clip's own models use the exact GELU; OpenAI's, and transformers' default, an approximation."""

_TOKENIZER = Download(
    repository="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    files=("tokenizer.json|vocab.json",),
    size="2 MB",
    licence="MIT",
)


def _checkpoint(stem: str) -> Download:
    return Download(
        repository="xswu/HPSv2", files=(f"{stem}.pt|{stem}.safetensors",), size="2.0 GB", licence="Apache-2.0"
    )


_CHECKPOINTS = {"2.1": _checkpoint("HPS_v2.1_compressed"), "2.0": _checkpoint("HPS_v2_compressed")}


@dataclass(frozen=True, kw_only=True)
class HPSv2:
    """Which of two pictures of a prompt people prefer: Human Preference Score v2.1, about 0.13 to 0.34, or v2.0.

    `antialias=False` resizes as the official code did under torchvision before 0.17.
    """

    name: Literal["hpsv2"] = "hpsv2"
    path: str
    version: Literal["2.1", "2.0"] = "2.1"
    antialias: bool = True
    dtype: Dtype = "float32"
    differentiable = True
    needs = "path: a folder with HPS_v2.1_compressed.pt (or v2) and a CLIP tokenizer (2.0 GB); pip install ftfy"
    units = "cosine; v2.1 about 0.13 to 0.34, v2.0 about 0.23 to 0.29"
    source = "Wu et al. 2023, arXiv 2306.09341"
    downloads = (*_CHECKPOINTS.values(), _TOKENIZER)

    def missing(self) -> list[str]:
        """What is not there yet, one line each, with the command that fetches it."""
        wanted = (_CHECKPOINTS[self.version], _TOKENIZER)
        return missing_downloads(Path(self.path).expanduser(), wanted) + missing_ftfy()

    def load(self, device: torch.device | str) -> ClipScorer:
        """Read the folder; RewardError if something is missing, damaged or of another model."""
        from transformers import CLIPConfig, CLIPModel

        folder = check(self)
        source = first_present(folder, _CHECKPOINTS[self.version].files[0])
        state = to_clip(read_weights(source, name=self.name))
        config: Any = CLIPConfig(**CONFIG)
        model = build_strictly(CLIPModel, config, state, name=self.name, source=source)
        tokenize = read_tokenizer(folder, longest=config.text_config.max_position_embeddings, name=self.name)
        if tokenize("")[-1] != config.text_config.eos_token_id:  # the network reads the prompt off this token
            raise RewardError(
                f"reward {self.name!r}: the tokenizer in {folder} is not CLIP's: it ends prompts otherwise"
            )
        return ClipScorer(
            model.to(device),
            Preprocess(size=config.vision_config.image_size, fit="pad", resize="tensor", antialias=self.antialias),
            tokenize=lambda prompt: tokenize(clean_text(prompt)),
            name=self.name,
            formula=lambda cosine: cosine,
            dtype=DTYPES[self.dtype],
        )


_BLOCKS = {"visual.transformer.resblocks.": "vision_model.", "transformer.resblocks.": "text_model."}
_IN_BLOCKS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_ELSEWHERE = {
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # so spelt in transformers
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_BLOCK = re.compile(r"((?:visual\.)?transformer\.resblocks\.)(\d+)\.(.+)[._](weight|bias)")


def to_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's weights under the names of transformers' CLIPModel.

    open_clip stacks the projections of query, key and value, and multiplies by its output projections from the right.
    Names that are not open_clip's stay as they are, for the strict loading to complain about.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        block = _BLOCK.fullmatch(key)
        if block is None:
            transposed = key in _TRANSPOSED
            renamed[_TRANSPOSED.get(key, _ELSEWHERE.get(key, key))] = value.T.contiguous() if transposed else value
            continue
        tower, number, layer, kind = block.groups()
        prefix = f"{_BLOCKS[tower]}encoder.layers.{number}."
        if layer == "attn.in_proj" and value.ndim and len(value) % 3 == 0:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{prefix}self_attn.{part}_proj.{kind}"] = third
        else:
            renamed[f"{prefix}{_IN_BLOCKS.get(layer, layer)}.{kind}"] = value
    return renamed
