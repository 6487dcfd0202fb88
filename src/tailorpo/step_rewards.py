"""The reward of a noisy latent: that of its predicted clean picture (TailorPO Eq. 12).

    r_t(c, x) := E[r(c, x_0) | c, x]  is approximated by  r(c, decode(x0hat(x)))

The network evaluation behind x0hat is the one that the next denoising step needs, so it is returned for reuse. A
latent after the last step is decoded as it is, and in full; on the way the model's cheap decoder is enough.

A score with a method `at` is told the network's time at which x0hat was predicted, so that a reward that was trained
on predictions (SPO's step-aware preference model) can make use of it. Finished pictures are scored without. An ensemble
of rewards is also told which latents are siblings, because it values pictures by comparison (`rewards/ensemble.py`).

By default the Jensen gap between the two sides is ignored, as in the paper; `futures` has estimates of the left side
that cost more evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from tailorpo.futures import Continuations, Draw, End, Lookahead, StepReward
from tailorpo.models import Conditioning
from tailorpo.policy import Policy, PolicyStep
from tailorpo.rewards.ensemble_scorer import Comparison, EnsembleScorer

Score = Callable[[Tensor, Sequence[str]], Tensor]
GradientPath = Literal["none", "full", "free"]


@runtime_checkable
class StepAwareScore(Protocol):
    """A score that wants to know at which time of the network a clean picture was predicted; `Scorer` is one."""

    def __call__(self, images: Tensor, prompts: Sequence[str], /) -> Tensor: ...

    def at(self, time: int, /) -> Score:
        """The score of predictions at this time."""
        ...


@dataclass(frozen=True)
class Scored:
    """Latents x_k with their step rewards.

    Attributes:
        latents: (B, C, h, w).
        step: the network's step from them, without a graph; None after the last step.
        pictures: the predicted clean pictures, (B, 3, H, W); of several continuations the first one's.
        reward: (B,), NaN where the reward was invalid.
        gradient: d reward / d latents, (B, C, h, w), if it was asked for.
        comparison: how the reward came about.
    """

    latents: Tensor
    step: PolicyStep | None
    pictures: Tensor
    reward: Tensor
    gradient: Tensor | None
    comparison: Comparison

    def rows(self, index: Tensor) -> tuple[Tensor, PolicyStep | None]:
        """Some of the latents, and the step from them."""
        return self.latents[index], self.step.rows(index) if self.step else None


def compare(score: Score, pictures: Tensor, prompts: Sequence[str], *, siblings: int, time: int | None) -> Comparison:
    """Score pictures (n B, 3, H, W), sibling by sibling.

    Args:
        score: the reward.
        pictures: predicted at the network's `time`, or finished where that is None.
        prompts: of the same rows.
        siblings: n.
        time: told to a score that wants it.
    """
    if isinstance(score, EnsembleScorer):
        return score.compare(pictures, prompts, siblings=siblings, time=time)
    if isinstance(score, StepAwareScore) and time is not None:
        score = score.at(time)
    return Comparison.single(score(pictures, prompts))


def score_latents(
    policy: Policy,
    latents: Tensor,
    *,
    k: int,
    cond: Conditioning,
    prompts: Sequence[str],
    score: Score,
    gradient: GradientPath = "none",
    siblings: int = 1,
    step_reward: StepReward = "predicted",
    draw: Draw | None = None,
) -> Scored:
    """Score x_k = latents, with one network evaluation each (none where k is the end), and those of looking ahead.

    Args:
        policy: the model under its sampler.
        latents: (B, C, h, w).
        k: how many steps lie behind the latents, 1..K.
        cond: encoded prompts of the same B rows.
        prompts: the B prompts.
        score: the reward.
        gradient: "full" through reward, decoder and network; "free" without the network's Jacobian, d x0hat / d x
            taken as 1 / alpha, which costs no backward through the network and keeps directions that the true Jacobian
            filters.
        siblings: how many candidates each trajectory has among the latents.
        step_reward: the clean picture predicted at x_k, or a look ahead, which has no gradient.
        draw: the noise of continuations; needed for these alone.

    Raises:
        ValueError: a gradient of a look ahead, or continuations without `draw`.
    """

    def judge(pictures: Tensor, time: int | None) -> Comparison:
        return compare(score, pictures, prompts, siblings=siblings, time=time)

    time = None if k == policy.schedule.steps else int(policy.schedule.time[k])
    if step_reward != "predicted" and time is not None:
        if gradient != "none":
            raise ValueError(f"the step reward {step_reward} has no gradient")
        return _score_ahead(policy, latents, judge, k=k, cond=cond, step_reward=step_reward, draw=draw)
    leaf = latents.detach().requires_grad_(gradient != "none")
    with torch.set_grad_enabled(gradient == "full"):
        step = None if time is None else policy.step(leaf, k, cond)
        clean = leaf if step is None else step.x0
    if gradient == "free":
        leaf = clean = clean.detach().requires_grad_()
    with torch.set_grad_enabled(gradient != "none"):
        decode = policy.model.decode if time is None else policy.model.decode_draft
        pictures = decode(clean)
        compared = judge(pictures, time)
    direction = None
    if gradient != "none":
        # Rows do not interact, so one backward of the sum gives every row's own gradient.
        (direction,) = torch.autograd.grad(compared.objective.sum(), leaf)
        if gradient == "free" and time is not None:
            direction = direction / float(policy.schedule.alpha[k])
    known = step.detach() if step else None
    return Scored(latents.detach(), known, pictures.detach(), compared.reward, direction, compared)


@torch.no_grad()
def _score_ahead(
    policy: Policy,
    latents: Tensor,
    judge: Callable[[Tensor, int | None], Comparison],
    *,
    k: int,
    cond: Conditioning,
    step_reward: Lookahead | Continuations,
    draw: Draw | None,
) -> Scored:
    """Score x_k = latents, k before the end, by where a look ahead ends."""
    step = policy.step(latents, k, cond)
    if isinstance(step_reward, Lookahead):
        ends: Iterable[End] = [step_reward.look(policy, latents, step, k=k, cond=cond)]
    elif draw is None:
        raise ValueError("continuations need the noise that they draw")
    else:
        ends = step_reward.look(policy, latents, step, k=k, cond=cond, draw=draw)
    shown: Tensor | None = None
    found: list[Comparison] = []
    for end in ends:
        decode = policy.model.decode if end.time is None else policy.model.decode_draft
        pictures = decode(end.clean)
        found.append(judge(pictures, end.time))
        shown = pictures if shown is None else shown
    assert shown is not None
    compared = found[0]
    if len(found) > 1:
        compared = Comparison.single(torch.stack([each.total for each in found]).mean(dim=0))
    return Scored(latents.detach(), step, shown, compared.reward, None, compared)
