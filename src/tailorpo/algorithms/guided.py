"""Guidance at work in a rollout: the winners of a branch, moved along their reward's gradient (`guidance.py`)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from tailorpo.gaussian_step import GaussianStep
from tailorpo.guidance import Guidance
from tailorpo.policy import Policy, PolicyStep
from tailorpo.rollout import Branch, Trajectories
from tailorpo.step_rewards import Score, score_latents


@dataclass(frozen=True)
class Moved:
    """Winners after guidance: how far they moved, what reward that gained, and the policy's step from there if it is
    known."""

    push: Tensor
    gain: Tensor
    _: KW_ONLY
    accepted: Tensor
    latents: Tensor
    step: PolicyStep | None


def move_winner(
    guidance: Guidance | None,
    policy: Policy,
    branch: Branch,
    trajectories: Trajectories,
    winner: Tensor,
    *,
    score: Score,
) -> Moved:
    """Where guidance moves the winners of a branch; `winner` indexes the rows of its scored candidates."""
    scored = branch.scored
    latents, reward = scored.latents[winner], scored.reward[winner]
    step = scored.step.rows(winner) if scored.step else None
    zero, yes = torch.zeros_like(reward), torch.ones_like(reward, dtype=torch.bool)
    if guidance is None or scored.gradient is None:
        return Moved(torch.zeros_like(latents), zero, accepted=yes, latents=latents, step=step)
    gradient = scored.gradient[winner]
    push = guidance.push(gradient, reward, std=branch.step.gaussian.std, progress=branch.k / policy.schedule.steps)
    if not guidance.accept_reject:
        # To first order; what it really is would cost a decode and a reward query.
        gain = (gradient * push).flatten(1).sum(dim=1)
        return Moved(push, gain.nan_to_num(), accepted=yes, latents=latents + push, step=None)
    again = score_latents(
        policy, latents + push, k=branch.k + 1, cond=trajectories.cond, prompts=trajectories.prompts, score=score
    )
    accepted = again.reward > reward  # false where either is missing
    keep = accepted.view(-1, 1, 1, 1)
    if step is not None and again.step is not None:
        mean = torch.where(keep, again.step.gaussian.mean, step.gaussian.mean)
        x0 = torch.where(keep, again.step.x0, step.x0)
        step = PolicyStep(GaussianStep(mean, step.gaussian.std), x0)
    return Moved(
        push * keep,
        torch.where(accepted, again.reward - reward, zero),
        accepted=accepted,
        latents=torch.where(keep, again.latents, latents),
        step=step,
    )
