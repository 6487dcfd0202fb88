"""The one place where the network is called: for rollout, loss and reference alike.

Because all three go through `Policy.step`, "ratio = 1 and loss = log 2 before the first update" holds to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tailorpo.gaussian_step import GaussianStep
from tailorpo.models import Conditioning, DiffusionModel
from tailorpo.moving_reference import ParameterCopy
from tailorpo.prediction import to_x0_and_epsilon
from tailorpo.samplers import DDIM


@dataclass(frozen=True)
class PolicyStep:
    """What one network evaluation at x_k says.

    Attributes:
        gaussian: the distribution of x_{k+1}.
        x0: the predicted clean latent, (B, C, h, w).
    """

    gaussian: GaussianStep
    x0: Tensor

    def detach(self) -> PolicyStep:
        """The same numbers without their graph."""
        return PolicyStep(GaussianStep(self.gaussian.mean.detach(), self.gaussian.std), self.x0.detach())

    def rows(self, index: Tensor) -> PolicyStep:
        """A selection of the batch."""
        return PolicyStep(GaussianStep(self.gaussian.mean[index], self.gaussian.std), self.x0[index])


class Policy:
    """A model under a sampler: the Markov decision process of denoising.

    Attributes:
        model: the network with its adapter.
        sampler: how a prediction becomes a step.
        evaluations: latents that went through the network so far; those of a guided forward count twice.
        measuring: the same of evaluations that only a measurement needs; on an account of their own.
        moving: the parameters of the loss's reference where that is not the base model.
    """

    def __init__(self, model: DiffusionModel, sampler: DDIM) -> None:
        self.model = model
        self.sampler = sampler
        self.evaluations = 0
        self.measuring = 0
        self.moving: ParameterCopy | None = None
        self.schedule = model.schedule(sampler.steps)

    @property
    def forwards(self) -> int:
        """The same in the unit of every cost: forwards of one latent under the run's own guidance. Two evaluations
        without guidance are one guided forward."""
        return self.evaluations // self.sampler.evaluations_per_forward

    def predict_plain(self, latents: Tensor, times: Tensor, cond: Conditioning) -> Tensor:
        """The network's output without guidance, (B, C, h, w), at one training time for each row, (B,): what the
        model was trained with."""
        self.evaluations += len(latents)
        return self.model.predict(latents, times, cond, guidance_scale=1.0)

    def step(self, latents: Tensor, k: int, cond: Conditioning) -> PolicyStep:
        """Step k from x_k = latents (B, C, h, w), float32; gradients flow where they are enabled."""
        self.evaluations += len(latents) * self.sampler.evaluations_per_forward
        output = self.model.predict(
            latents, int(self.schedule.time[k]), cond, guidance_scale=self.sampler.guidance_scale
        )
        x0, epsilon = to_x0_and_epsilon(
            output,
            latents,
            alpha=float(self.schedule.alpha[k]),
            sigma=float(self.schedule.sigma[k]),
            kind=self.model.prediction_type,
        )
        return PolicyStep(self.sampler.step(x0, epsilon, self.schedule, k=k), x0)

    def origin(self, latents: Tensor, k: int) -> Tensor:
        """The part of step k's mean that no network changes: mean = origin + (a number) * epsilon, or * x0 where
        x_k is pure noise (alpha 0)."""
        alpha = float(self.schedule.alpha[k])
        return latents * (float(self.schedule.alpha[k + 1]) / alpha if alpha > 0 else 0.0)

    def reference_step(self, latents: Tensor, k: int, cond: Conditioning) -> GaussianStep:
        """The same step of the loss's reference, without gradients: the base model, unless the reference moves."""
        with torch.no_grad(), self.model.reference() if self.moving is None else self.moving.in_place():
            return self.step(latents, k, cond).gaussian

    def measured_kl(self, gaussian: GaussianStep, latents: Tensor, k: int, cond: Conditioning) -> Tensor:
        """KL of a step from x_k = latents to the base model's in nats, (B,), at one evaluation of the base model."""
        before = self.evaluations
        with torch.no_grad(), self.model.reference():
            base = self.step(latents, k, cond).gaussian
        self.evaluations, spent = before, self.evaluations - before
        self.measuring += spent
        return gaussian.kl(base)
