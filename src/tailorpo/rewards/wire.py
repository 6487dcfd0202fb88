"""What travels between the reward `remote` and `tailorpo serve-reward`: safetensors both ways, never a pickle.

    GET  /                 JSON: the version of this protocol, and of each reward its name and whether it has a gradient
    POST /score/<name>     pictures (B, 3, H, W) float32, and as JSON prompts, a time, whether the gradient is wanted;
                           answered with scores (B,) float32 and, if wanted, d score_i / d picture_i (B, 3, H, W)

Numbers travel as they are in memory, so that a remote score has the bits of a local one, NaN included. What is refused
is answered with a status of 400 to 499 and a sentence.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

PROTOCOL = 1
CONTENT_TYPE = "application/octet-stream"


@dataclass(frozen=True, kw_only=True)
class Question:
    """Pictures (B, 3, H, W) to score against B prompts.

    Attributes:
        time: of the network, where the pictures are predictions on the way; None for finished ones.
        gradient: whether d score / d picture is wanted, too.
    """

    images: Tensor
    prompts: tuple[str, ...]
    time: int | None
    gradient: bool

    def encode(self) -> bytes:
        """As the body of a request."""
        facts = {"prompts": self.prompts, "time": self.time, "gradient": self.gradient}
        return save(
            {"images": _plain(self.images), "facts": torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)}
        )

    @classmethod
    def decode(cls, body: bytes) -> Question:
        """What `encode` wrote; ValueError, in words, for anything else."""
        found = _tensors(body)
        images, facts = found.get("images"), _facts(found.get("facts"))
        prompts, time, gradient = facts.get("prompts"), facts.get("time"), facts.get("gradient")
        if images is None or images.dtype != torch.float32 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError("no tensor `images` of shape (B, 3, H, W), float32")
        if not isinstance(prompts, list) or not all(isinstance(each, str) for each in cast(list[object], prompts)):
            raise ValueError("no list of prompts")
        prompts = cast(list[str], prompts)
        if len(prompts) != len(images):
            raise ValueError(f"{len(images)} pictures came with {len(prompts)} prompts")
        if not isinstance(gradient, bool) or not (time is None or type(time) is int):
            raise ValueError("gradient has to be true or false, and time a whole number or null")
        return cls(images=images, prompts=tuple(prompts), time=time, gradient=gradient)


def encode_answer(scores: Tensor, gradient: Tensor | None) -> bytes:
    """Scores (B,), and their gradient (B, 3, H, W) if it was wanted."""
    tensors = {"scores": scores} | ({} if gradient is None else {"gradient": gradient})
    return save({name: _plain(tensor) for name, tensor in tensors.items()})


def decode_answer(body: bytes, question: Question) -> tuple[Tensor, Tensor | None]:
    """What `encode_answer` wrote, if it fits the question; ValueError, in words, for anything else."""
    found, images = _tensors(body), question.images
    wanted = {"scores": images.shape[:1]} | ({"gradient": images.shape} if question.gradient else {})
    for name, shape in wanted.items():
        if name not in found or found[name].shape != shape or found[name].dtype != torch.float32:
            got = f"{tuple(found[name].shape)}, {found[name].dtype}" if name in found else "nothing of that name"
            raise ValueError(f"something else than `{name}` of shape {tuple(shape)}, float32: {got}")
    return found["scores"], found.get("gradient")


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()


def _tensors(body: bytes) -> dict[str, Tensor]:
    try:
        return load(body)
    except SafetensorError as error:
        raise ValueError(f"something that is not safetensors: {error}") from error


def _facts(tensor: Tensor | None) -> dict[str, Any]:
    """JSON as bytes, because a safetensors file that is read from memory does not give its metadata."""
    try:
        found: object = json.loads(b"" if tensor is None else tensor.numpy().tobytes())
    except (ValueError, TypeError) as error:
        raise ValueError(f"no tensor `facts` of JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError("`facts` is not a JSON object")
    return cast(dict[str, Any], found)
