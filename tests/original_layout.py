"""diffusers' state dicts under the names of the original Stable Diffusion files: the way back from the loader's.

Written from the layout of the CompVis and Stability checkpoints: blocks are numbered through (input_blocks.N,
output_blocks.N), a level is its residual blocks, each with its attention, then a change of size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def original_unet(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    places: dict[str, str] = dict(OUTER)
    for i in range(levels):
        attends = "CrossAttn" in config["up_block_types"][i]
        first_down, first_up = i * (layers + 1) + 1, i * (layers + 1)
        for j in range(layers):
            places[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{first_down + j}.0"
            places[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{first_down + j}.1"
        places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{first_down + layers}.0.op"
        for j in range(layers + 1):
            places[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{first_up + j}.0"
            places[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{first_up + j}.1"
        places[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{first_up + layers}.{2 if attends else 1}"
    places |= {
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    return {f"model.diffusion_model.{name}": tensor for name, tensor in _moved(state, places, RESIDUAL)}


def original_vae(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    places: dict[str, str] = {}
    for side in ("encoder", "decoder"):
        places[f"{side}.mid_block.resnets.0"] = f"{side}.mid.block_1"
        places[f"{side}.mid_block.attentions.0"] = f"{side}.mid.attn_1"
        places[f"{side}.mid_block.resnets.1"] = f"{side}.mid.block_2"
        places[f"{side}.conv_norm_out"] = f"{side}.norm_out"
    for i in range(levels):
        up = levels - 1 - i
        for j in range(layers):
            places[f"encoder.down_blocks.{i}.resnets.{j}"] = f"encoder.down.{i}.block.{j}"
        for j in range(layers + 1):
            places[f"decoder.up_blocks.{i}.resnets.{j}"] = f"decoder.up.{up}.block.{j}"
        places[f"encoder.down_blocks.{i}.downsamplers.0"] = f"encoder.down.{i}.downsample"
        places[f"decoder.up_blocks.{i}.upsamplers.0"] = f"decoder.up.{up}.upsample"
    inner = {
        "conv_shortcut": "nin_shortcut",
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }
    renamed = dict(_moved(state, places, inner))
    for name, tensor in renamed.items():  # attention was written as 1x1 convolutions
        if ".attn_1." in name and tensor.ndim == 2:
            renamed[name] = tensor[:, :, None, None]
    return {f"first_stage_model.{name}": tensor for name, tensor in renamed.items()}


def original_clip(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """OpenAI's CLIP kept the names of transformers, among them the numbers of the positions."""
    names = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    length = names["embeddings.position_embedding.weight"].shape[0]
    names["embeddings.position_ids"] = torch.arange(length)[None]
    return {f"{prefix}text_model.{name}": tensor for name, tensor in names.items()}


def original_open_clip(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    names = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    simple = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    width = names["final_layer_norm.weight"].shape[0]
    # Pretrained files have it in SD 2.x too, where nothing reads it.
    projection = names.get("text_projection.weight", torch.zeros(width, width))
    result = {"text_projection": projection.T.contiguous(), "logit_scale": torch.tensor(4.6)}
    layers = 1 + max(int(name.split(".")[2]) for name in names if name.startswith("encoder.layers."))
    for old, new in simple.items():
        result[new] = names[old]
    inner = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    for i in range(layers):
        old, new = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            parts = [names[f"{old}self_attn.{each}_proj.{kind}"] for each in "qkv"]
            result[f"{new}attn.in_proj_{kind}"] = torch.cat(parts)
            for before, after in inner.items():
                result[f"{new}{after}.{kind}"] = names[f"{old}{before}.{kind}"]
    return {prefix + name: tensor for name, tensor in result.items()}


def _moved(
    state: Mapping[str, Tensor], places: Mapping[str, str], inner: Mapping[str, str]
) -> list[tuple[str, Tensor]]:
    """Every tensor under its new name: the longest place that fits, then names inside of it."""
    by_length: Callable[[str], int] = len
    result: list[tuple[str, Tensor]] = []
    for name, tensor in state.items():
        place = next((each for each in sorted(places, key=by_length, reverse=True) if name.startswith(each + ".")), "")
        rest = name[len(place) :]
        # A transformer block inside of an attention has norms and projections of the same names, which stay.
        for old, new in inner.items() if "transformer_blocks" not in name else ():
            rest = rest.replace(f".{old}.", f".{new}.")
        result.append((places.get(place, "") + rest, tensor))
    return result
