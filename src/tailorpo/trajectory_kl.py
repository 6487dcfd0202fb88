"""The exact KL of whole trajectories: that of every step's Gaussians, along trajectories that the policy draws.

    KL(trajectory) = sum_k E[KL_k],   KL_k = |mean_k - mean_ref,k|^2 / (2 sigma_k^2)

by the chain rule; the same measure for methods that log a KL of their own and for those that do not. One reference
evaluation per step and row. A step without noise has no density and counts as 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tailorpo.device import sent
from tailorpo.noise import Noise
from tailorpo.policy import Policy
from tailorpo.rollout import Trajectories, walk_chains


@torch.no_grad()
def walk_with_kl(policy: Policy, trajectories: Trajectories, *, noise: Noise, rows: Sequence[int]) -> Tensor:
    """Sample to the end and return the KL of every step in nats, (K, len(rows)), on the CPU.

    Args:
        policy: draws; the reference is its model without the adapter.
        trajectories: where to start; advanced in place to the finished latents.
        noise: the run's random numbers.
        rows: which trajectories' KL is measured.
    """
    device = trajectories.latents.device
    index = sent(torch.tensor(list(rows), dtype=torch.long), device)
    steps: list[Tensor] = []
    for at in walk_chains(policy, trajectories, noise=noise):
        step = at.step.rows(index).gaussian
        if not len(index) or step.std == 0:
            steps.append(torch.zeros(len(index), device=device))
            continue
        reference = policy.reference_step(at.latents[index], at.k, trajectories.cond.rows(index))
        steps.append(step.kl(reference))
    return torch.stack(steps).cpu()
