"""The KL of a step that is not trained, as something to penalise: what `kl_penalty` acts on between the pairs.

A change of the network that pairs at some steps ask for changes the other steps, too, and there its KL can be many
times larger: in the last but one of 20 DDIM steps of SD 1.5 one change of epsilon makes some 30 times the nats of one
in the middle (`DDIM.noise_weight`, squared).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tailorpo.algorithms.base import Shown
from tailorpo.gaussian_step import GaussianStep
from tailorpo.models import Conditioning
from tailorpo.policy import Policy, PolicyStep
from tailorpo.rollout import ChainStep, Trajectories


@dataclass
class KLStep:
    """One step of a batch of trajectories; `step` carries the graph of the rollout, or is None if a later evaluation
    makes it. The rest is what `Pair` has, too."""

    k: int
    prompts: Sequence[str]
    latents: Tensor
    cond: Conditioning
    step: PolicyStep | None
    reference: GaussianStep
    next_latents: Tensor
    next_step: None = None

    def figures(self) -> dict[str, Tensor]:
        """Nothing: its KL is logged with that of its trajectory."""
        return {}

    def shown(self) -> Shown | None:
        """Nothing was compared."""
        return None

    def stored(self, policy: Policy) -> StoredKLStep:
        """What a later epoch needs of it."""
        return StoredKLStep(self.k, self.latents, self.cond, self.reference)


@dataclass(frozen=True)
class StoredKLStep:
    """The part that a later epoch needs."""

    k: int
    latents: Tensor
    cond: Conditioning
    reference: GaussianStep

    def __len__(self) -> int:
        return len(self.latents)

    def rows(self, index: Tensor) -> StoredKLStep:
        """A selection of the batch."""
        mean = self.reference.mean[index]
        return replace(
            self,
            latents=self.latents[index],
            cond=self.cond.rows(index),
            reference=GaussianStep(mean, self.reference.std),
        )


def step_kl(policy: Policy, sample: KLStep | StoredKLStep) -> Tensor:
    """KL to the loss's reference in nats, (B,), with the graph that the rollout left or from a new evaluation."""
    known = sample.step if isinstance(sample, KLStep) else None
    return (known or policy.step(sample.latents, sample.k, sample.cond)).gaussian.kl(sample.reference)


@torch.no_grad()
def see_step(
    policy: Policy, trajectories: Trajectories, walked: ChainStep, *, penalised: bool, measured: bool, graph: bool
) -> KLStep | None:
    """What there is to train at a step between the trained ones, whose KL to the base model is noted on the way.

    Args:
        policy: the model under its sampler.
        trajectories: those that take the step.
        walked: the step.
        penalised: whether its KL is penalised, for one evaluation of the reference.
        measured: whether to note anything.
        graph: whether the step's graph serves the loss.
    """
    if policy.sampler.std(policy.schedule, walked.k) == 0:  # no density: the last step of some schedulers
        return None
    if not penalised:
        if measured:
            note_kl(policy, trajectories, walked.k, walked.latents, walked.step)
        return None
    reference = policy.reference_step(walked.latents, walked.k, trajectories.cond)
    if measured:
        kl = walked.step.detach().gaussian.kl(reference)
        note_kl(policy, trajectories, walked.k, walked.latents, walked.step, known=kl)
    return KLStep(
        k=walked.k,
        prompts=trajectories.prompts,
        latents=walked.latents,
        cond=trajectories.cond,
        step=walked.step if graph else None,
        reference=reference,
        next_latents=walked.next_latents,
    )


@torch.no_grad()
def note_kl(
    policy: Policy,
    trajectories: Trajectories,
    k: int,
    latents: Tensor,
    step: PolicyStep,
    *,
    known: Tensor | None = None,
) -> None:
    """Note the KL of step k to the base model: the known one to the loss's reference where that is the base model,
    otherwise that of the measured trajectories, by evaluations of the base model."""
    if known is not None and policy.moving is None:
        trajectories.kl[k] = known
    elif trajectories.measured:
        rows = torch.arange(trajectories.measured, device=latents.device)
        gaussian = step.detach().rows(rows).gaussian
        trajectories.kl[k] = policy.measured_kl(gaussian, latents[rows], k, trajectories.cond.rows(rows))
