"""Guidance at work in a rollout: the pairs of a branch, moved along their reward's gradient (`guidance.py`)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from tailorpo.gaussian_step import GaussianStep
from tailorpo.guidance import Guidance, SigmaGuidance, on_shell
from tailorpo.policy import Policy, PolicyStep
from tailorpo.rollout import Branch, Trajectories
from tailorpo.step_rewards import Score, score_latents


@dataclass(frozen=True)
class Moved:
    """Pairs after guidance: how far winner and loser moved, by what reward that widened their gap, where the winners
    are now, and the policy's step from there if it is known."""

    push: Tensor
    push_loser: Tensor
    gain: Tensor
    _: KW_ONLY
    accepted: Tensor
    latents: Tensor
    step: PolicyStep | None


def move_pair(
    guidance: Guidance | None,
    policy: Policy,
    branch: Branch,
    trajectories: Trajectories,
    winner: Tensor,
    loser: Tensor,
    *,
    score: Score,
) -> Moved:
    """Where guidance moves the pairs of a branch; `winner` and `loser` index the rows of its scored candidates."""
    scored = branch.scored
    latents, reward = scored.latents[winner], scored.reward[winner]
    step = scored.step.rows(winner) if scored.step else None
    zero, yes = torch.zeros_like(reward), torch.ones_like(reward, dtype=torch.bool)
    if guidance is None or scored.gradient is None:
        still = torch.zeros_like(latents)
        return Moved(still, still, zero, accepted=yes, latents=latents, step=step)
    push, push_loser = _pushes(guidance, branch, winner, loser, progress=branch.k / policy.schedule.steps)
    # To first order; what it really is would cost a decode and a reward query.
    gain = (scored.gradient[winner] * push).flatten(1).sum(dim=1).nan_to_num()
    gain_loser = -(scored.gradient[loser] * push_loser).flatten(1).sum(dim=1).nan_to_num()
    if not guidance.accept_reject:
        return Moved(push, push_loser, gain + gain_loser, accepted=yes, latents=latents + push, step=None)
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
        push_loser * keep,
        torch.where(accepted, again.reward - reward + gain_loser, zero),
        accepted=accepted,
        latents=torch.where(keep, again.latents, latents),
        step=step,
    )


def _pushes(
    guidance: Guidance, branch: Branch, winner: Tensor, loser: Tensor, *, progress: float
) -> tuple[Tensor, Tensor]:
    """x+ - x of winners and losers."""
    gradients, std = branch.scored.gradient, branch.step.gaussian.std
    assert gradients is not None
    symmetric = isinstance(guidance, SigmaGuidance) and guidance.symmetric
    gradient = gradients[winner] + gradients[loser] if symmetric else gradients[winner]
    push = guidance.push(gradient, branch.scored.reward[winner], std=std, progress=progress)
    push, push_loser = (push / 2, -push / 2) if symmetric else (push, torch.zeros_like(push))
    if isinstance(guidance, SigmaGuidance) and guidance.shell:
        noises = branch.noises.flatten(0, 1)
        push = on_shell(push, noises[winner], std=std)
        push_loser = on_shell(push_loser, noises[loser], std=std) if symmetric else push_loser
    return push, push_loser
