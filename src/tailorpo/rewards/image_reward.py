"""ImageReward v1.0: what people prefer of several pictures of a prompt (Xu et al. 2023, arXiv 2304.05977).

    score(x, c) = (head(h) - 0.16717...) / 1.03334...,   h = the [CLS] state of BLIP's text encoder reading c with
                                                             cross-attention to all states of BLIP's ViT-L/16 on x

The official checkpoint goes into transformers' BlipVisionModel and BlipTextModel after renaming (`to_blip`). [CLS]
stays [CLS]: BLIP's own [ENC] token is not used. Prompts are cut at 35 tokens and padded to the longest of a batch, not
to 35; the padding is masked, so that the score is the same.

Left out: BLIP's projections of both towers, which the checkpoint holds and the score does not use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from tailorpo.errors import RewardError
from tailorpo.rewards.affine_head import AffineHead
from tailorpo.rewards.clip import CHUNK
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

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""What the official code takes off the head's output, and what it divides by."""

LONGEST = 35
"""Tokens of a prompt that are read, with [CLS] and [SEP]."""

VISION: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}
"""BLIP large's ViT-L/16. The eps is timm's; transformers' default for BLIP is another."""

TEXT: Mapping[str, Any] = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "encoder_hidden_size": 1024,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "is_decoder": True,  # gives every layer its cross-attention; the forward pass stays bidirectional
}
"""BERT base with cross-attention to the width of the ViT."""

_VISION_NAMES = (
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"norm\.", "post_layernorm."),
)
_UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids")


@dataclass(frozen=True, kw_only=True)
class ImageReward:
    """What people prefer of several pictures of a prompt: ImageReward v1.0, about -2.3 to 2."""

    name: Literal["image_reward"] = "image_reward"
    path: str
    dtype: Dtype = "float32"
    differentiable = True
    needs = "path: a folder with ImageReward.pt and bert-base-uncased's vocab.txt (1.8 GB)"
    units = "preference, standardised by its authors, about -2.3 to 2"
    source = "Xu et al. 2023, arXiv 2304.05977"
    downloads = (
        Download(
            repository="THUDM/ImageReward",
            files=("ImageReward.pt|ImageReward.safetensors",),
            size="1.8 GB",
            licence="Apache-2.0",
        ),
        Download(repository="google-bert/bert-base-uncased", files=("vocab.txt",), size="0.2 MB", licence="Apache-2.0"),
    )

    def missing(self) -> list[str]:
        """What is not there yet, one line each, with the command that fetches it."""
        return missing_downloads(Path(self.path).expanduser(), self.downloads)

    def load(self, device: torch.device | str) -> ImageRewardScorer:
        """Read the folder; RewardError if something is missing, damaged or of another model."""
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        folder = check(self)
        source = first_present(folder, self.downloads[0].files[0])
        vision, text, head = to_blip(read_weights(source, name=self.name))
        return ImageRewardScorer(
            build_strictly(BlipVisionModel, BlipVisionConfig(**VISION), vision, name=self.name, source=source),
            build_strictly(
                BlipTextModel, BlipTextConfig(**TEXT), text, name=self.name, source=source, add_pooling_layer=False
            ),
            AffineHead.of(head, TEXT["hidden_size"], name=self.name, source=source),
            tokenizer=_tokenizer(folder / "vocab.txt", size=TEXT["vocab_size"], name=self.name),
            name=self.name,
            device=device,
            dtype=DTYPES[self.dtype],
        )


def to_blip(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The official weights under the names of BlipVisionModel, of BlipTextModel, and of the head (`layers.N...`).

    Names that belong to none of them stay as they are among the first, for the strict loading to complain about.
    """
    vision, text, head = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    for key, value in state.items():
        if key.startswith("mlp."):
            head[key.removeprefix("mlp.")] = value
        elif key.startswith("blip.text_encoder.") and not _UNUSED.fullmatch(key):
            text[key.removeprefix("blip.text_encoder.")] = value
        elif not _UNUSED.fullmatch(key):
            vision[_vision_name(key.removeprefix("blip.visual_encoder."))] = value
    return vision, text, head


def _vision_name(key: str) -> str:
    for pattern, replacement in _VISION_NAMES:
        if re.match(pattern, key):
            return re.sub(f"^{pattern}", replacement, key)
    return key


def _tokenizer(path: Path, *, size: int, name: str) -> Any:
    """BERT's uncased tokenizer of a vocab.txt."""
    from transformers import BertTokenizer

    try:
        words = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(f"reward {name!r}: {path} cannot be read: {error}") from error
    missing = [word for word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if word not in words]
    if missing or len(words) > size:
        raise RewardError(
            f"reward {name!r}: {path} is not the vocabulary of bert-base-uncased: {len(words):,} lines, "
            f"{f'without {missing[0]}' if missing else f'more than the {size:,} the model knows'}"
        )
    return BertTokenizer(vocab={word: number for number, word in enumerate(words)})


class ImageRewardScorer:
    """The loaded model; frozen, in eval mode. No score depends on what else is in the batch."""

    differentiable = True

    def __init__(
        self,
        vision: Any,
        text: Any,
        head: AffineHead,
        *,
        tokenizer: Any,
        name: str,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Take a BlipVisionModel, a BlipTextModel with cross-attention to it, the head, and BERT's tokenizer."""
        self.name = name
        self.vision = vision.to(device, dtype).eval().requires_grad_(False)
        self.text = text.to(device, dtype).eval().requires_grad_(False)
        # The official preprocessing is torchvision's, on a Pillow picture.
        self.preprocess = Preprocess(size=vision.config.image_size, crop_rounding="nearest")
        self._head = head.to(device)
        self._tokenizer = tokenizer

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, 3, H, W) in [0, 1] and B prompts -> (B,) float32, with the graph to the pictures if gradients are on."""
        device = self._head.weight.device
        tokens = self._tokenizer(list(prompts), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
        ids, mask = (cast(Tensor, tokens[key]).to(device) for key in ("input_ids", "attention_mask"))
        parts = zip(*(torch.split(each, CHUNK) for each in (images, ids, mask)), strict=True)
        return torch.cat([self._score(part.to(device), i, m) for part, i, m in parts])

    def _score(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        seen = self.vision(pixel_values=self.preprocess(images)).last_hidden_state
        read = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        return (self._head(read[:, 0]) - MEAN) / STD
