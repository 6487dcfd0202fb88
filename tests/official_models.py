"""The official networks of ImageReward and HPSv2, written again for the tests in plain torch.

They work on a dictionary of weights under the names of the official checkpoints. The shapes follow from the published
architectures (BLIP large, BERT base with cross-attention, open_clip's ViT-H-14), the forward passes from their papers
and the behaviour of timm's ViT, BERT and torch's multi-head attention; nothing here knows of the library's key maps.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

Shapes = dict[str, tuple[int, ...]]
State = dict[str, Tensor]


def _linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def image_reward_shapes(
    *,
    image: int = 224,
    patch: int = 16,
    width: int = 1024,
    depth: int = 24,
    words: int = 30524,
    positions: int = 512,
    text: int = 768,
    text_depth: int = 12,
    shared: int = 256,
) -> Shapes:
    """ImageReward.pt: BLIP (both towers, both unused projections) and the head of five linear layers."""
    eye, reader = "blip.visual_encoder", "blip.text_encoder"
    shapes: Shapes = {
        f"{eye}.cls_token": (1, 1, width),
        f"{eye}.pos_embed": (1, (image // patch) ** 2 + 1, width),
        f"{eye}.patch_embed.proj.weight": (width, 3, patch, patch),
        f"{eye}.patch_embed.proj.bias": (width,),
    }
    for block in (f"{eye}.blocks.{number}" for number in range(depth)):
        shapes |= _norm(f"{block}.norm1", width) | _linear(f"{block}.attn.qkv", 3 * width, width)
        shapes |= _linear(f"{block}.attn.proj", width, width) | _norm(f"{block}.norm2", width)
        shapes |= _linear(f"{block}.mlp.fc1", 4 * width, width) | _linear(f"{block}.mlp.fc2", width, 4 * width)
    shapes |= _norm(f"{eye}.norm", width)
    shapes |= {
        f"{reader}.embeddings.position_ids": (1, positions),
        f"{reader}.embeddings.word_embeddings.weight": (words, text),
        f"{reader}.embeddings.position_embeddings.weight": (positions, text),
        **_norm(f"{reader}.embeddings.LayerNorm", text),
    }
    for layer in (f"{reader}.encoder.layer.{number}" for number in range(text_depth)):
        for kind, source in (("attention", text), ("crossattention", width)):
            shapes |= _linear(f"{layer}.{kind}.self.query", text, text)
            shapes |= _linear(f"{layer}.{kind}.self.key", text, source)
            shapes |= _linear(f"{layer}.{kind}.self.value", text, source)
            shapes |= _linear(f"{layer}.{kind}.output.dense", text, text)
            shapes |= _norm(f"{layer}.{kind}.output.LayerNorm", text)
        shapes |= _linear(f"{layer}.intermediate.dense", 4 * text, text)
        shapes |= _linear(f"{layer}.output.dense", text, 4 * text) | _norm(f"{layer}.output.LayerNorm", text)
    shapes |= _linear("blip.vision_proj", shared, width) | _linear("blip.text_proj", shared, text)
    for number, (into, out) in zip((0, 2, 4, 6, 7), pairwise((text, 1024, 128, 64, 16, 1)), strict=True):
        shapes |= _linear(f"mlp.layers.{number}", out, into)
    return shapes


def open_clip_shapes(
    *,
    image: int = 224,
    patch: int = 14,
    width: int = 1280,
    depth: int = 32,
    words: int = 49408,
    positions: int = 77,
    text: int = 1024,
    text_depth: int = 24,
    shared: int = 1024,
) -> Shapes:
    """The state_dict of open_clip's ViT-H-14."""
    shapes: Shapes = {
        "visual.class_embedding": (width,),
        "visual.positional_embedding": ((image // patch) ** 2 + 1, width),
        "visual.proj": (width, shared),
        "visual.conv1.weight": (width, 3, patch, patch),
        **_norm("visual.ln_pre", width),
        **_norm("visual.ln_post", width),
        "token_embedding.weight": (words, text),
        "positional_embedding": (positions, text),
        **_norm("ln_final", text),
        "text_projection": (text, shared),
        "logit_scale": (),
    }
    for tower, size, count in (("visual.transformer", width, depth), ("transformer", text, text_depth)):
        for block in (f"{tower}.resblocks.{number}" for number in range(count)):
            shapes |= _norm(f"{block}.ln_1", size) | _norm(f"{block}.ln_2", size)
            shapes |= {f"{block}.attn.in_proj_weight": (3 * size, size), f"{block}.attn.in_proj_bias": (3 * size,)}
            shapes |= _linear(f"{block}.attn.out_proj", size, size)
            shapes |= _linear(f"{block}.mlp.c_fc", 4 * size, size) | _linear(f"{block}.mlp.c_proj", size, 4 * size)
    return shapes


def random_state(shapes: Shapes, *, seed: int = 0) -> State:
    """Weights of the size a trained network has; no bias is zero and no norm is one, so that every mistake shows."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("position_ids"):
            state[name] = torch.arange(shape[1])[None]
        elif name == "logit_scale":
            state[name] = torch.tensor(math.log(100.0))
        elif name.endswith("bias"):
            state[name] = 0.2 * noise
        elif name.endswith(("embedding", "embed", "token", "embedding.weight", "embeddings.weight")):
            state[name] = 0.03 * noise
        elif len(shape) == 1:
            state[name] = 1 + 0.2 * noise
        else:
            state[name] = noise / math.sqrt(math.prod(shape[1:]))
    # Small inputs, as after a trained patch embedding: there a wrong epsilon of a norm shows.
    for name in ("blip.visual_encoder.patch_embed.proj.weight", "blip.visual_encoder.patch_embed.proj.bias"):
        if name in state:
            state[name] *= 0.03
    return state


def _apply(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _normed(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Textbook attention: every head by itself."""
    parts = []
    for q, k, v in zip(*(x.chunk(heads, dim=-1) for x in (query, key, value)), strict=True):
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        parts.append(torch.softmax(scores if bias is None else scores + bias, dim=-1) @ v)
    return torch.cat(parts, dim=-1)


def image_reward(state: State, pixels: Tensor, ids: Tensor, mask: Tensor, *, heads: int, text_heads: int) -> Tensor:
    """Normalised pixels (B, 3, S, S), token ids and mask (B, L) -> scores (B,)."""
    eye = "blip.visual_encoder"
    kernel = state[f"{eye}.patch_embed.proj.weight"]
    patches = F.conv2d(pixels, kernel, state[f"{eye}.patch_embed.proj.bias"], stride=kernel.shape[-1])
    x = torch.cat([state[f"{eye}.cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
    x = x + state[f"{eye}.pos_embed"]
    number = 0
    while f"{eye}.blocks.{number}.norm1.weight" in state:
        block = f"{eye}.blocks.{number}"
        q, k, v = _apply(state, f"{block}.attn.qkv", _normed(state, f"{block}.norm1", x, 1e-6)).chunk(3, dim=-1)
        x = x + _apply(state, f"{block}.attn.proj", _attend(q, k, v, heads))
        hidden = F.gelu(_apply(state, f"{block}.mlp.fc1", _normed(state, f"{block}.norm2", x, 1e-6)))
        x = x + _apply(state, f"{block}.mlp.fc2", hidden)
        number += 1
    seen = _normed(state, f"{eye}.norm", x, 1e-6)

    reader = "blip.text_encoder"
    y = state[f"{reader}.embeddings.word_embeddings.weight"][ids]
    y = y + state[f"{reader}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    y = _normed(state, f"{reader}.embeddings.LayerNorm", y, 1e-12)
    bias = (1 - mask[:, None, :].to(y)) * -10000.0
    number = 0
    while f"{reader}.encoder.layer.{number}.output.dense.weight" in state:
        layer = f"{reader}.encoder.layer.{number}"
        for kind, source, masked in (("attention", None, bias), ("crossattention", seen, None)):
            part = f"{layer}.{kind}"
            q = _apply(state, f"{part}.self.query", y)
            k, v = (_apply(state, f"{part}.self.{name}", y if source is None else source) for name in ("key", "value"))
            out = _apply(state, f"{part}.output.dense", _attend(q, k, v, text_heads, masked))
            y = _normed(state, f"{part}.output.LayerNorm", out + y, 1e-12)
        hidden = F.gelu(_apply(state, f"{layer}.intermediate.dense", y))
        y = _normed(state, f"{layer}.output.LayerNorm", _apply(state, f"{layer}.output.dense", hidden) + y, 1e-12)
        number += 1

    score = y[:, 0]
    for number in (0, 2, 4, 6, 7):
        score = _apply(state, f"mlp.layers.{number}", score)
    return (score[:, 0] - 0.16717362830052426) / 1.0333394966054072


def _resblocks(state: State, tower: str, x: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    number = 0
    while f"{tower}.resblocks.{number}.ln_1.weight" in state:
        block = f"{tower}.resblocks.{number}"
        y = _normed(state, f"{block}.ln_1", x, 1e-5).transpose(0, 1)
        attention, _ = F.multi_head_attention_forward(
            y,
            y,
            y,
            x.shape[-1],
            heads,
            state[f"{block}.attn.in_proj_weight"],
            state[f"{block}.attn.in_proj_bias"],
            None,
            None,
            False,
            0.0,
            state[f"{block}.attn.out_proj.weight"],
            state[f"{block}.attn.out_proj.bias"],
            training=False,
            need_weights=False,
            attn_mask=mask,
        )
        x = x + attention.transpose(0, 1)
        hidden = F.gelu(_apply(state, f"{block}.mlp.c_fc", _normed(state, f"{block}.ln_2", x, 1e-5)))
        x = x + _apply(state, f"{block}.mlp.c_proj", hidden)
        number += 1
    return x


def open_clip_cosine(state: State, pixels: Tensor, ids: Tensor, *, heads: int, text_heads: int) -> Tensor:
    """Normalised pixels (B, 3, S, S) and ids (B, 77), zeros after the end token -> cosines (B,)."""
    kernel = state["visual.conv1.weight"]
    patches = F.conv2d(pixels, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(pixels), 1, -1), patches], dim=1)
    x = _normed(state, "visual.ln_pre", x + state["visual.positional_embedding"], 1e-5)
    x = _resblocks(state, "visual.transformer", x, heads, None)
    image = _normed(state, "visual.ln_post", x[:, 0], 1e-5) @ state["visual.proj"]

    length = ids.shape[1]
    y = state["token_embedding.weight"][ids] + state["positional_embedding"][:length]
    y = _resblocks(state, "transformer", y, text_heads, torch.full((length, length), -math.inf).triu(1))
    y = _normed(state, "ln_final", y, 1e-5)
    text = y[torch.arange(len(ids)), ids.argmax(-1)] @ state["text_projection"]
    return F.cosine_similarity(image, text, dim=-1)
