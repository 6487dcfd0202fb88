"""What the Scorer says when a reward is not what it should be: what was got, and how to go on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def no_gradient(name: str) -> str:
    """A gradient was asked for of a reward without one."""
    return (
        f"reward {name!r} has no gradient, and one was asked for. Take a differentiable reward "
        "(`tailorpo rewards` lists them) or an algorithm without reward gradients (algorithm.guidance=null)."
    )


def no_graph(name: str) -> str:
    """A gradient was promised, and the score does not depend on the pictures."""
    return (
        f"reward {name!r} says it is differentiable, but its score does not depend on the pictures through "
        "autograd. Look for detach(), item(), numpy or PIL, torch.no_grad() or inference_mode() in it, or set its "
        "`differentiable` to False."
    )


def raised(name: str, error: Exception, images: Tensor, prompts: Sequence[str]) -> str:
    """A reward raised something of its own."""
    return (
        f"reward {name!r} raised {type(error).__name__}: {error}\n"
        f"  it was given {describe(images)} and {len(prompts)} prompts, the first {prompts[:1]}\n"
        "  it has to accept any batch size; try it alone on torch.rand(2, 3, 64, 64) and two prompts."
        + (
            "\n  model.deterministic: false allows that operation."
            if "deterministic implementation" in str(error)
            else ""
        )
    )


def wrong_result(name: str, score: object, images: Tensor, prompts: Sequence[str]) -> str:
    """A reward returned something else than a floating (B,) tensor."""
    return (
        f"reward {name!r} has to return one floating-point number per picture, a tensor of shape "
        f"({len(images)},); {_wrong_shape(score, len(images))}\n"
        f"  it was given {describe(images)} and {len(prompts)} prompts"
    )


def diverged(broken: Tensor, prompts: Sequence[str]) -> str:
    """Some of the pictures themselves, `broken` (B,), are not finite."""
    return (
        f"{int(broken.sum())} of {len(broken)} pictures to score hold values that are not finite, the first "
        f"for the prompt {prompts[int(broken.nonzero()[0, 0])]!r}: the model diverged. Lower the learning "
        "rate; the last checkpoint is kept"
    )


def _wrong_shape(score: object, count: int) -> str:
    """What is wrong with a score that is not a floating (count,) tensor."""
    if not isinstance(score, Tensor):
        return f"it returned a {type(score).__name__}. Return torch.tensor([...]) or stack the single scores."
    got = f"it returned shape {tuple(score.shape)}, dtype {score.dtype}."
    if score.shape == (count,):
        return f"{got} Add .float() to it."
    if score.numel() == count:
        return f"{got} Add .flatten() to it."
    return f"{got} One number per picture: a mean over the batch is not enough to rank two pictures."


def not_finite(name: str, score: Tensor, wrong: Tensor, images: Tensor, prompts: Sequence[str]) -> str:
    """The scores of some rows, `wrong` (B,), are not finite."""
    first = int(wrong.nonzero()[0, 0])
    return (
        f"reward {name!r} returned {float(score[first])} for {int(wrong.sum())} of {len(score)} pictures, the first "
        f"for the prompt {prompts[first]!r}\n  it was given {describe(images)}\n"
        "  mend the reward, or leave such pictures out and count them: on_invalid_reward: skip"
    )


def describe(images: Tensor) -> str:
    """Pictures in words: shape, dtype, and the range of their values."""
    text = f"pictures of shape {tuple(images.shape)}, dtype {images.dtype}"
    if images.numel() == 0:
        return text
    low, high = torch.aminmax(images.detach())
    return f"{text}, values {float(low):.4g} to {float(high):.4g}"
