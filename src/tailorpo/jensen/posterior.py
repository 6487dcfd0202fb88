"""How uncertain x_0 still is at x_k, and how the reward bends there.

For x = alpha x_0 + sigma e the second-order Tweedie formula says Cov[x_0 | x] = (sigma^2 / alpha) d x0hat / d x. The
mean of its trace over x_k is found in three ways:

    probes       (sigma^2 / alpha) E_v v' J' v, v of random signs (Hutchinson 1989)
    denoising    E |x_0 - x0hat(alpha x_0 + sigma e)|^2 on the model's own samples x_0
    increments   sum_{j >= k} |x0hat(x_{j+1}) - x0hat(x_j)|^2 along trajectories, which cost nothing extra: x0hat is a
                 martingale of the exact reverse process, so its increments are uncorrelated

J' v is one backward pass. The trace of J and of its transpose are the same, so no forward-mode derivative is needed
(fused attention has none), nor finite differences of the network (two evaluations a probe, and rounding).

All of this holds for the network WITHOUT guidance, as E[x_0 | x_k, prompt]: a guided x0hat is nobody's posterior mean.
The second way exceeds the truth by the network's own error; the third falls short of it at few steps, because a DDIM
step puts x0hat in the place of x_0 and so leaves out its variance within the step. x_0 is the last x0hat of a
trajectory, since the finished latent still holds noise.

Constants of a neural reward are measured where the posterior is: at x0hat, by differences of the gradient over steps of
the posterior's own scale, since a network of ReLUs has no curvature at a point. They are local, hence estimates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tailorpo.device import sent
from tailorpo.gaussian_step import per_sample_sum
from tailorpo.jensen.settings import POWER_ITERATIONS
from tailorpo.jensen.siblings import Walk, scores
from tailorpo.noise import Noise
from tailorpo.policy import Policy
from tailorpo.step_rewards import Score, compare

LEAST_SCALE = 1e-3
"""Differences of the gradient are taken over at least this, in units of the latent: below it is rounding."""


@dataclass(frozen=True)
class LocalReward:
    """A reward at x0hat, (S,) each.

    Attributes:
        slope: norm of its gradient by the latent.
        curvature: largest absolute eigenvalue of its Hessian, from below (power iteration from the gradient).
        directional: posterior variance of the linearised reward, w' Cov w with w the gradient.
        second: tr(H Cov) / 2, the gap to second order.
    """

    slope: Tensor
    curvature: Tensor
    directional: Tensor
    second: Tensor


@dataclass(frozen=True)
class Posterior:
    """S states x_k.

    Attributes:
        trace: tr Cov by each probe, (probes, S).
        denoising: squared error of a sample noised to this level, (S,).
        increments: squared increments from here to the end, summed, (S,).
        guess: r(x0hat), by reward, (S,).
        local: by reward that has a gradient.
    """

    trace: Tensor
    denoising: Tensor
    increments: Tensor
    guess: Mapping[str, Tensor]
    local: Mapping[str, LocalReward]


def increments(walked: Walk, k: int) -> Tensor:
    """Squared increments of x0hat from x_k to the last step, summed, (S,)."""
    path = [step.x0 for step in walked.steps[k:]]
    total = torch.zeros(len(walked.prompts), device=path[0].device)
    return sum((per_sample_sum((after - before) ** 2) for before, after in pairwise(path)), total)


def posterior(
    policy: Policy,
    walked: Walk,
    *,
    k: int,
    rewards: Mapping[str, Score],
    differentiable: Sequence[str],
    noise: Noise,
    probes: int,
) -> Posterior:
    """Measure the states x_k of trajectories.

    Args:
        policy: the model without guidance.
        walked: its trajectories.
        k: how many steps lie behind the states, 1..K-1.
        rewards: by name.
        differentiable: the names of those that have a gradient.
        noise: the run's random numbers.
        probes: random vectors per state.
    """
    schedule, model = policy.schedule, policy.model
    alpha, sigma = float(schedule.alpha[k]), float(schedule.sigma[k])
    shape, time = walked.latents[k].shape[1:], int(schedule.time[k])
    clean = walked.steps[-1].x0
    with torch.no_grad():
        noised = alpha * clean + sigma * sent(noise.normals(shape, walked.keys, "noised", k), model.device)
        denoising = per_sample_sum((clean - policy.step(noised, k, walked.cond).x0) ** 2)
        x0 = walked.steps[k].x0
        guess = scores(rewards, model.decode_draft(x0), walked.prompts, time=time)
    with torch.enable_grad():
        leaf = walked.latents[k].detach().requires_grad_()
        predicted = policy.step(leaf, k, walked.cond).x0

    def covariance_times(vector: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(predicted, leaf, vector, retain_graph=True)
        return product * (sigma**2 / alpha)

    vectors = [sent(noise.normals(shape, walked.keys, "probe", k, i).sign(), model.device) for i in range(probes)]
    products = [covariance_times(vector) for vector in vectors]
    trace = torch.stack([per_sample_sum(v * p) for v, p in zip(vectors, products, strict=True)])
    scale = (trace.mean(0).clamp(min=0) / math.prod(shape)).sqrt().clamp(min=LEAST_SCALE)
    local: dict[str, LocalReward] = {}
    for name in differentiable:
        field = _GradientField(policy, rewards[name], walked.prompts, time=time, scale=scale)
        local[name] = _local(field, x0, covariance_times, list(zip(vectors, products, strict=True)))
    return Posterior(trace, denoising, increments(walked, k), dict(zip(rewards, guess, strict=True)), local)


@dataclass(frozen=True)
class _GradientField:
    """The gradient of a reward by the clean latent, row by row, and differences of it."""

    policy: Policy
    score: Score
    prompts: Sequence[str]
    time: int
    scale: Tensor

    def at(self, latents: Tensor) -> Tensor:
        """(S, C, h, w)."""
        with torch.enable_grad():
            leaf = latents.detach().requires_grad_()
            pictures = self.policy.model.decode_draft(leaf)
            objective = compare(self.score, pictures, self.prompts, siblings=1, time=self.time).objective
            (gradient,) = torch.autograd.grad(objective.sum(), leaf)
        return gradient

    def hessian_times(self, latents: Tensor, vectors: Tensor) -> Tensor:
        """H v for vectors with entries about 1, over steps of the posterior's scale to either side."""
        move = self.scale.view(-1, *[1] * (latents.ndim - 1)) * vectors
        difference = self.at(latents + move) - self.at(latents - move)
        return difference / (2 * self.scale.view(-1, *[1] * (latents.ndim - 1)))


def _local(
    field: _GradientField,
    x0: Tensor,
    covariance_times: Callable[[Tensor], Tensor],
    probes: Sequence[tuple[Tensor, Tensor]],
) -> LocalReward:
    """Measure a reward at x0; probes are (v, Cov v)."""
    gradient = field.at(x0)
    second = torch.stack([per_sample_sum(field.hessian_times(x0, v) * product) / 2 for v, product in probes]).mean(0)
    size = math.sqrt(math.prod(x0.shape[1:]))
    curvature, vector = torch.zeros(len(x0), device=x0.device), gradient
    for _ in range(POWER_ITERATIONS):
        # Entries about 1 for the step's length, and the result back to what a unit vector gives.
        vector = field.hessian_times(x0, size * _unit(vector)) / size
        curvature = torch.maximum(curvature, per_sample_sum(vector**2).sqrt())
    return LocalReward(
        slope=per_sample_sum(gradient**2).sqrt(),
        curvature=curvature,
        directional=per_sample_sum(gradient * covariance_times(gradient)),
        second=second,
    )


def _unit(vectors: Tensor) -> Tensor:
    norm = per_sample_sum(vectors**2).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return vectors / norm.view(-1, *[1] * (vectors.ndim - 1))
