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


def unmoved(branch: Branch, winner: Tensor) -> Moved:
    """Pairs that stay where they are; `winner` indexes the rows of the branch's scored candidates."""
    latents, step = branch.scored.rows(winner)
    still, none = torch.zeros_like(latents), torch.zeros_like(branch.scored.reward[winner])
    return Moved(still, still, none, accepted=torch.ones_like(none, dtype=torch.bool), latents=latents, step=step)


def move_pair(
    guidance: Guidance,
    policy: Policy,
    branch: Branch,
    trajectories: Trajectories,
    winner: Tensor,
    loser: Tensor,
    *,
    score: Score,
) -> Moved:
    """Where guidance moves the pairs of a branch, whose candidates were scored with gradients; `winner` and `loser`
    index their rows."""
    scored, gradient = branch.scored, branch.scored.gradient
    assert gradient is not None
    push, push_loser = _pushes(guidance, branch, winner, loser, gradient, progress=branch.k / policy.schedule.steps)
    # To first order; what it really is would cost a decode and a reward query.
    gain = (gradient[winner] * push).flatten(1).sum(dim=1).nan_to_num()
    gain_loser = -(gradient[loser] * push_loser).flatten(1).sum(dim=1).nan_to_num()
    latents, yes = scored.latents[winner] + push, torch.ones_like(gain, dtype=torch.bool)
    moved = Moved(push, push_loser, gain + gain_loser, accepted=yes, latents=latents, step=None)
    if guidance.accept_reject:
        return _kept_if_better(policy, branch, trajectories, winner, moved, gain_loser=gain_loser, score=score)
    return moved


def _kept_if_better(
    policy: Policy,
    branch: Branch,
    trajectories: Trajectories,
    winner: Tensor,
    moved: Moved,
    *,
    gain_loser: Tensor,
    score: Score,
) -> Moved:
    """The same where the winners' step reward really rises; the others stay where they were."""
    before, (latents, step) = branch.scored.reward[winner], branch.scored.rows(winner)
    again = score_latents(
        policy, moved.latents, k=branch.k + 1, cond=trajectories.cond, prompts=trajectories.prompts, score=score
    )
    accepted = again.reward > before  # false where either is missing
    keep = accepted.view(-1, 1, 1, 1)
    if step is not None and again.step is not None:
        mean = torch.where(keep, again.step.gaussian.mean, step.gaussian.mean)
        x0 = torch.where(keep, again.step.x0, step.x0)
        step = PolicyStep(GaussianStep(mean, step.gaussian.std), x0)
    return Moved(
        moved.push * keep,
        moved.push_loser * keep,
        torch.where(accepted, again.reward - before + gain_loser, torch.zeros_like(before)),
        accepted=accepted,
        latents=torch.where(keep, again.latents, latents),
        step=step,
    )


def _pushes(
    guidance: Guidance, branch: Branch, winner: Tensor, loser: Tensor, gradients: Tensor, *, progress: float
) -> tuple[Tensor, Tensor]:
    """x+ - x of winners and losers."""
    std = branch.step.gaussian.std
    symmetric = isinstance(guidance, SigmaGuidance) and guidance.symmetric
    gradient = gradients[winner] + gradients[loser] if symmetric else gradients[winner]
    push = guidance.push(gradient, branch.scored.reward[winner], std=std, progress=progress)
    push, push_loser = (push / 2, -push / 2) if symmetric else (push, torch.zeros_like(push))
    if isinstance(guidance, SigmaGuidance) and guidance.shell:
        noises = branch.noises.flatten(0, 1)
        push = on_shell(push, noises[winner], std=std)
        push_loser = on_shell(push_loser, noises[loser], std=std) if symmetric else push_loser
    return push, push_loser
