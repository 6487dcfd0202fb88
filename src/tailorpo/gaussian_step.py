"""One denoising step as a Gaussian, and the closed forms that preference losses need of it.

    x_{k+1} ~ N(mean, std^2 I)

For two candidates drawn from the SAME x_k the quadratic terms of the four log-densities cancel exactly
(d = x_w - x_l, all sums over the D dimensions of a latent):

    log-ratio(x_w) - log-ratio(x_l) = d . (mean - mean_ref) / std^2
    log-ratio(x)                    = (x - (mean + mean_ref) / 2) . (mean - mean_ref) / std^2
    KL(step || reference step)      = |mean - mean_ref|^2 / (2 std^2)

Written with the noise z = (x - behaviour mean) / std that made a candidate, the first is
(z_w - z_l) . (mean - mean_ref) / std: the mean of the policy that drew the candidates drops out, so a pair stays exact
after the policy has moved on.
Subtracting four log-densities instead loses 13 % at KL = 1e-4 in float32 and everything in half precision.

Everything is computed in float32 or wider and is in nats of the SUM over dimensions: the log-ratio of the densities.
(D3PO, DDPO and SPO take the mean, which divides beta by D = 16384 for SD 1.5.)

Left out: a covariance other than std^2 I, which no sampler here has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def per_sample_sum(x: Tensor) -> Tensor:
    """Sum over all dimensions but the first: (B, ...) -> (B,), accumulated in float32 or wider."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide.flatten(1).sum(dim=1)


@dataclass(frozen=True)
class GaussianStep:
    """The distribution N(mean, std^2 I) of the next latent.

    Attributes:
        mean: (B, C, h, w), float32 or float64.
        std: one number for the whole step; 0 for a deterministic step, which can be sampled but has no density.
    """

    mean: Tensor
    std: float

    def sample(self, noise: Tensor) -> Tensor:
        """The latent that this standard normal noise makes: mean + std * noise, of the noise's shape."""
        return self.mean + self.std * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of x in nats, (B,)."""
        std = self._positive_std()
        dimensions = x[0].numel()
        return -per_sample_sum((x - self.mean) ** 2) / (2 * std**2) - dimensions * math.log(
            std * math.sqrt(2 * math.pi)
        )

    def log_ratio(self, x: Tensor, reference: GaussianStep) -> Tensor:
        """log p(x) - log p_ref(x) in nats, (B,)."""
        std = self._common_std(reference)
        centred = (x - (self.mean + reference.mean) / 2) / std
        return per_sample_sum(centred * ((self.mean - reference.mean) / std))

    def pair_logit(self, noise_difference: Tensor, reference: GaussianStep) -> Tensor:
        """Log-ratio of the winner minus that of the loser in nats, (B,).

        Args:
            noise_difference: z_w - z_l = (x_w - x_l) / std, of the mean's shape.
            reference: the reference policy's step from the same x_k.
        """
        std = self._common_std(reference)
        return per_sample_sum(noise_difference * ((self.mean - reference.mean) / std))

    def projection(self, noise_difference: Tensor, origin: Tensor) -> Tensor:
        """noise_difference . (mean - origin) / std, (B,): of policy minus reference it is `pair_logit`.

        With an origin that both share, one number per pair stands for the reference's whole mean, so that later epochs
        need neither its network evaluation nor its tensor.
        """
        return per_sample_sum(noise_difference * ((self.mean - origin) / self._positive_std()))

    def kl(self, reference: GaussianStep) -> Tensor:
        """KL(self || reference) in nats, (B,)."""
        std = self._common_std(reference)
        return per_sample_sum(((self.mean - reference.mean) / std) ** 2) / 2

    def _positive_std(self) -> float:
        if not self.std > 0:
            raise ValueError("a deterministic step (std 0, eta 0) has no density; use eta > 0")
        return self.std

    def _common_std(self, reference: GaussianStep) -> float:
        if self.std != reference.std:
            raise ValueError(f"the closed forms need one std, got {self.std} and {reference.std}")
        return self._positive_std()
