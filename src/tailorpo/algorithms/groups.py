"""k candidates from the same x_k in the order of their rewards: what a listwise loss trains on.

With z_i the noise that made candidate i, its log-ratio is s_i + c with

    s_i = (z_i - z_k) . (mean - mean_ref) / sigma,     s_k = 0

and c common to all candidates of the step, so that a softmax over them needs one policy and one reference evaluation
for any k. Counting from the worst candidate leaves k - 1 differences of noises, and in a buffer k - 1 numbers for the
reference: for k = 2 exactly what a pair is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tailorpo.algorithms.pairs import Pair
from tailorpo.gaussian_step import GaussianStep
from tailorpo.models import Conditioning
from tailorpo.policy import Policy


@dataclass
class Group(Pair):
    """A pair of the best and the worst candidate, and all that stand between them.

    `noise_differences` are z_i - z_k after guidance, best first, (k - 1, B, C, h, w); `targets` (B, k - 1, k) what each
    stage of the loss should choose.
    """

    noise_differences: Tensor
    targets: Tensor

    def stored(self, policy: Policy) -> StoredGroups:
        """What a later epoch needs of it."""
        origin = policy.origin(self.latents, self.k)
        return StoredGroups(
            k=self.k,
            latents=self.latents,
            cond=self.cond,
            noise_differences=self.noise_differences,
            targets=self.targets,
            valid=self.valid,
            reference_projections=torch.stack([self.reference.projection(z, origin) for z in self.noise_differences]),
            reference=self.reference if self.keep_reference else None,
        )


@dataclass(frozen=True)
class StoredGroups:
    """The part of a group that a later epoch needs: no graph, no pictures, k - 1 numbers for the reference."""

    k: int
    latents: Tensor
    cond: Conditioning
    noise_differences: Tensor
    targets: Tensor
    valid: Tensor
    reference_projections: Tensor
    reference: GaussianStep | None = None
    step: None = None

    def __len__(self) -> int:
        return len(self.latents)

    def rows(self, index: Tensor) -> StoredGroups:
        """A selection of the batch."""
        return replace(
            self,
            latents=self.latents[index],
            cond=self.cond.rows(index),
            noise_differences=self.noise_differences[:, index],
            targets=self.targets[index],
            valid=self.valid[index],
            reference_projections=self.reference_projections[:, index],
            reference=self.reference and GaussianStep(self.reference.mean[index], self.reference.std),
        )


def group_of(pair: Pair, noises: Tensor, *, targets: Tensor) -> Group:
    """The pair with all that stand between its two; `noises` are those of all, best first,
    (k, B, C, h, w)."""
    return Group(**vars(pair), noise_differences=noises[:-1] - noises[-1], targets=targets)


def group_scores(policy: Policy, group: Group | StoredGroups, gaussian: GaussianStep) -> Tensor:
    """s_i of every candidate in nats, best first, (B, k), of the policy's step from x_k (`pairs.current_step`)."""
    if isinstance(group, StoredGroups):
        origin = policy.origin(group.latents, group.k)
        own = torch.stack([gaussian.projection(z, origin) for z in group.noise_differences])
        scores = own - group.reference_projections
    else:
        scores = torch.stack([gaussian.pair_logit(z, group.reference) for z in group.noise_differences])
    return torch.cat([scores, torch.zeros_like(scores[:1])]).T
