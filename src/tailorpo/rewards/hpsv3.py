"""HPSv3: a vision-language model that says how much people prefer a picture (Ma et al. 2025, arXiv 2508.03789).

    score(x, c) = MLP(h)_0,   h = Qwen2-VL's last hidden state at <|Reward|> in "[picture] instruction(c) <|Reward|>"

The MLP is Linear(3584, 1024), ReLU, Linear(1024, 16), ReLU, Linear(16, 2): mean and spread of the preference, of which
the mean is the score. What the official code does, and a plain port on today's transformers would not:

  - its forward hands the language model no positions, which meant 0, 1, 2, ... on all three axes, and not Qwen2-VL's
    two-dimensional positions of the picture;
  - it casts the model to bfloat16 with its rotary frequencies, and was trained so: the frequencies of the text are
    rounded to bfloat16, and in the vision tower the angles, their cosines and sines are, too. This is kept whatever
    `dtype` is.

The pictures are preprocessed on tensors, so that the gradient reaches them. Left out: the text after <|Reward|> and
the language model's output layer, on which the score does not depend; the spread; rounding to 8 bits, which has no
gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from tailorpo.errors import RewardError
from tailorpo.rewards.preprocess import OPENAI_MEAN, OPENAI_STD, pillow_bicubic
from tailorpo.rewards.weights import Download, check, load_strictly, missing_downloads, read_weights

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PIXELS = 256 * 28 * 28
"""Every picture is resized to about this many, in multiples of 28: 512 x 512 becomes 448 x 448."""

_CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
)
"""Qwen2-VL's chat template around one picture."""
_PROMPT = Path(__file__).resolve().parents[1] / "assets" / "hpsv3" / "prompt.txt"
"""The instruction of hpsv3 1.0.0, byte for byte (MIT, assets/LICENSES/MIT-HPSv3.txt)."""
_REWARD = "<|Reward|>"
_PATCH, _MERGE = 14, 2


@dataclass(frozen=True, kw_only=True)
class HPSv3:
    """Human preference, read off by a 7B vision-language model: HPSv3.

    `path` is one folder with the weights of HPSv3 and the configuration and tokenizer of Qwen2-VL-7B-Instruct. `dtype`
    is that of the body; the head is always float32.
    """

    name: Literal["hpsv3"] = "hpsv3"
    path: str
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    differentiable = True
    needs = "path: MizzenAI/HPSv3 (16.6 GB) with the tokenizer of Qwen/Qwen2-VL-7B-Instruct (7 MB)"
    units = "mean of a preference, unbounded; bad pictures below 0, good ones about 10"
    source = "Ma et al. 2025 (HPSv3), arXiv 2508.03789"
    downloads = (
        Download(repository="MizzenAI/HPSv3", files=("HPSv3.safetensors",), size="16.6 GB", licence="MIT"),
        Download(
            repository="Qwen/Qwen2-VL-7B-Instruct",
            files=("config.json", "tokenizer.json"),
            size="7 MB",
            licence="Apache-2.0",
        ),
    )

    def missing(self) -> list[str]:
        """What is not there yet, one line each, with the command that fetches it."""
        return missing_downloads(Path(self.path).expanduser(), self.downloads)

    def load(self, device: torch.device | str) -> HPSv3Scorer:
        """Read the folder; RewardError if something is missing or does not fit."""
        folder = check(self)
        from tokenizers import AddedToken, Tokenizer
        from transformers import Qwen2VLConfig

        source = folder / "HPSv3.safetensors"
        body, head = split_state(read_weights(source, name=self.name))
        tokenizer = _read(folder, "tokenizer.json", lambda file: Tokenizer.from_file(str(file)))
        tokenizer.add_special_tokens([AddedToken(_REWARD, special=True, normalized=False)])
        config: Any = _read(folder, "config.json", lambda file: Qwen2VLConfig.from_pretrained(file))
        embedding = body.get("language_model.embed_tokens.weight")
        if embedding is None or len(embedding) != tokenizer.get_vocab_size():
            found = "no embedding of tokens" if embedding is None else f"{len(embedding)} tokens"
            raise RewardError(
                f"reward {self.name!r}: {source} holds {found}, the tokenizer beside it has "
                f"{tokenizer.get_vocab_size()} with {_REWARD}; it has to be that of Qwen/Qwen2-VL-7B-Instruct"
            )
        config.text_config.vocab_size = len(embedding)  # that of the folder is padded to a round number
        model = make_body(config, getattr(torch, self.dtype))
        load_strictly(model, body, name=self.name, source=source)
        place_rotary(model)
        with torch.device("meta"):
            rating = make_head(config.text_config.hidden_size)
        load_strictly(rating, head, name=self.name, source=source)
        return HPSv3Scorer(model.to(device), rating.to(device), tokenizer, name=self.name)


def _read(folder: Path, file: str, read: Callable[[Path], Any]) -> Any:
    try:
        return read(folder / file)
    except Exception as error:  # a damaged file fails in many ways, inside the libraries
        raise RewardError(f"reward 'hpsv3': {folder / file} cannot be read: {type(error).__name__}: {error}") from error


def split_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The official names (transformers 4.45) as those of a Qwen2VLModel of today, and the head apart."""
    body = {
        f"language_{key}" if key.startswith("model.") else key: value
        for key, value in state.items()
        if not key.startswith(("rm_head.", "lm_head."))
    }
    return body, {key.removeprefix("rm_head."): value for key, value in state.items() if key.startswith("rm_head.")}


def make_body(config: Any, dtype: torch.dtype) -> Any:
    """A Qwen2VLModel without storage, to be filled."""
    from transformers import Qwen2VLModel

    with torch.device("meta"):
        return Qwen2VLModel._from_config(config, dtype=dtype).eval().requires_grad_(False)  # pyright: ignore[reportPrivateUsage]


def make_head(width: int) -> nn.Sequential:
    """The head with the official numbering; its dropout is off."""
    layers = nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    return nn.Sequential(*layers).eval().requires_grad_(False)


def place_rotary(model: Any) -> None:
    """Give a body from `make_body` its rotary embeddings, which no file holds, with the official rounding."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding

    text: Any = Qwen2VLRotaryEmbedding(config=model.config.text_config)
    text.inv_freq = text.inv_freq.bfloat16()
    model.language_model.rotary_emb = text
    vision = model.config.vision_config
    model.visual.rotary_pos_emb = VisionRotary(vision.embed_dim // vision.num_heads)


class VisionRotary(nn.Module):
    """Cosine and sine of each patch's row and column times falling frequencies, in bfloat16 as in the official code."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        exponent = torch.arange(0, width // 2, 2, dtype=torch.float32) / (width // 2)
        self.register_buffer("frequencies", (1.0 / 10000.0**exponent).bfloat16(), persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 2) positions -> two times (N, width of a head)."""
        angles = (position_ids[..., None].bfloat16() * self.frequencies).flatten(1).repeat(1, 2)
        return angles.cos(), angles.sin()


def resized(height: int, width: int) -> tuple[int, int]:
    """The size nearest to PIXELS in multiples of 28 and nearly in shape: Qwen's smart_resize.

    Raises:
        RewardError: one side is more than 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise RewardError(f"reward 'hpsv3': a picture of {height} x {width} is too long; 200 : 1 is the most")
    unit = _PATCH * _MERGE
    rows, columns = (max(1, round(side / unit)) for side in (height, width))
    if rows * columns * unit * unit == PIXELS:
        return rows * unit, columns * unit
    factor = math.sqrt(PIXELS / (height * width))
    to_whole = math.floor if rows * columns * unit * unit > PIXELS else math.ceil
    return to_whole(height * factor / unit) * unit, to_whole(width * factor / unit) * unit


def to_patches(images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """(B, 3, H, W) in [0, 1] -> normalised patches (B, N, 3 * 2 * 14 * 14) float32, and their rows and columns.

    Qwen2-VL's order: the four patches that the tower merges stand together, and each patch comes twice, as two frames.
    """
    height, width = resized(*images.shape[2:])
    pixels = pillow_bicubic(images.float(), (height, width))
    mean, std = (pixels.new_tensor(each).view(1, 3, 1, 1) for each in (OPENAI_MEAN, OPENAI_STD))
    rows, columns = height // _PATCH, width // _PATCH
    shape = (len(pixels), 3, rows // _MERGE, _MERGE, _PATCH, columns // _MERGE, _MERGE, _PATCH)
    blocks = ((pixels - mean) / std).view(shape).permute(0, 2, 5, 3, 6, 1, 4, 7)
    frames = blocks.unsqueeze(6).expand(*blocks.shape[:6], 2, *blocks.shape[6:])
    return frames.reshape(len(pixels), rows * columns, -1), (rows, columns)


class HPSv3Scorer:
    """The loaded model: frozen, in eval mode. No score depends on what else is in the batch, but for rounding."""

    differentiable = True

    def __init__(self, model: Any, head: nn.Module, tokenizer: Tokenizer, *, name: str) -> None:
        """Take a Qwen2VLModel with `place_rotary`, the head, and a tokenizer that knows <|Reward|>."""
        self.name = name
        self.model = model
        self.head = head
        self._instruction = _PROMPT.read_bytes().decode().partition(_REWARD)[0] + _REWARD
        self._tokenizer = tokenizer
        self._tokens = lru_cache(maxsize=4096)(self._tokenize)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, 3, H, W) in [0, 1] and B prompts -> (B,) float32, with the graph to the pictures if gradients are on."""
        device = self.model.device
        patches, (rows, columns) = to_patches(images.to(device))
        ids = [self._tokens(prompt, rows * columns // _MERGE**2) for prompt in prompts]
        last = torch.tensor([len(row) - 1 for row in ids], device=device)
        # Padding stands behind <|Reward|>, where no token that counts can see it: no mask is needed.
        length = max(map(len, ids))
        padded = torch.tensor([[*row, *[0] * (length - len(row))] for row in ids], device=device)
        hidden: Tensor = self.model(
            input_ids=padded,
            pixel_values=patches.flatten(0, 1),
            image_grid_thw=torch.tensor([[1, rows, columns]] * len(ids), device=device),
            position_ids=torch.arange(length, device=device).expand(3, len(ids), length),
            use_cache=False,
        ).last_hidden_state
        return self.head(hidden[torch.arange(len(ids), device=device), last].float())[:, 0]

    def _tokenize(self, prompt: str, count: int) -> tuple[int, ...]:
        """Token ids up to and with <|Reward|>, the placeholder of the picture `count` times."""
        text = _CHAT + self._instruction.replace("{text_prompt}", prompt)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        image: int = self.model.config.image_token_id
        if ids.count(image) != 1 or ids.count(ids[-1]) != 1:
            raise RewardError(
                f"reward {self.name!r}: the prompt {prompt!r} holds a control token of the model (<|...|>)"
            )
        at = ids.index(image)
        return (*ids[:at], *[image] * count, *ids[at + 1 :])
