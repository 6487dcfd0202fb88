"""The KL of a step that is not trained, as something to penalise: what `kl_penalty` acts on between the pairs.

A change of the network that pairs at some steps ask for changes the other steps, too, and there its KL can be many
times larger: in the last but one of 20 DDIM steps of SD 1.5 one change of epsilon makes some 30 times the nats of one
in the middle (`DDIM.noise_weight`, squared).
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import Tensor

from tailorpo.algorithms.base import Shown
from tailorpo.gaussian_step import GaussianStep
from tailorpo.models import Conditioning
from tailorpo.policy import Policy, PolicyStep
from tailorpo.rollout import Branch, ChainStep, Trajectories


@dataclass
class KLStep:
    """One step of a batch of trajectories, with its KL when it was walked, (B,); `step` carries the graph of the
    rollout, or is None if a later evaluation makes it."""

    k: int
    latents: Tensor
    cond: Conditioning
    _: KW_ONLY
    kl: Tensor
    step: PolicyStep | None
    reference: GaussianStep

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
    step: None = None

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


@torch.no_grad()
def penalised_step(policy: Policy, trajectories: Trajectories, walked: ChainStep, *, graph: bool) -> KLStep:
    """What there is to train at a step between the trained ones, at one evaluation of the reference.

    Args:
        policy: the model under its sampler.
        trajectories: those that take the step.
        walked: the step.
        graph: whether the step's graph serves the loss.
    """
    reference = policy.reference_step(walked.latents, walked.k, trajectories.cond)
    return KLStep(
        walked.k,
        walked.latents,
        trajectories.cond,
        kl=walked.step.detach().gaussian.kl(reference),
        step=walked.step if graph else None,
        reference=reference,
    )


@torch.no_grad()
def note_kl(policy: Policy, trajectories: Trajectories, at: Branch | ChainStep, *, known: Tensor | None) -> None:
    """Note a step's KL to the base model: the known one to the loss's reference where that is the base model,
    otherwise that of the measured trajectories, by evaluations of the base model."""
    if known is not None and policy.moving is None:
        trajectories.kl[at.k] = known
    elif trajectories.measured:
        rows = torch.arange(trajectories.measured, device=at.latents.device)
        gaussian = at.step.detach().rows(rows).gaussian
        trajectories.kl[at.k] = policy.measured_kl(gaussian, at.latents[rows], at.k, trajectories.cond.rows(rows))
