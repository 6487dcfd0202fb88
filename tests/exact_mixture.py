"""What is known in closed form of a Gaussian mixture seen through noise: posteriors and expectations of three rewards.

x_0 ~ sum_j w_j N(m_j, S_j), x = alpha x_0 + sigma e. The posterior is again a mixture, with weights ~
w_j N(x; alpha m_j, P_j), means m_j + G_j (x - alpha m_j) and covariances S_j - alpha G_j S_j, where
P_j = alpha^2 S_j + sigma^2 I and G_j = alpha S_j P_j^-1. Everything in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tailorpo.models.toy import GaussianMixture


@dataclass(frozen=True)
class ExactPosterior:
    """Mixtures of x_0 given N states: weights (N, J), means (N, J, d), covariances (J, d, d)."""

    weights: Tensor
    means: Tensor
    covariances: Tensor

    @classmethod
    def of(cls, model: GaussianMixture, latents: Tensor, *, alpha: float, sigma: float) -> ExactPosterior:
        x = latents.flatten(1).double()
        prior, means, spread = (
            model._initial["logits"].double().softmax(0),
            model._initial["means"].double(),
            model.covariances.double(),
        )
        marginal = alpha**2 * spread + sigma**2 * torch.eye(x.shape[1], dtype=torch.float64)
        density = [
            torch.distributions.MultivariateNormal(alpha * m, p).log_prob(x)
            for m, p in zip(means, marginal, strict=True)
        ]
        weights = (prior.log() + torch.stack(density, dim=1)).softmax(1)
        gain = alpha * spread @ torch.linalg.inv(marginal)
        shifted = means + torch.einsum("jab,njb->nja", gain, x[:, None] - alpha * means)
        return cls(weights, shifted, spread - alpha * gain @ spread)

    @property
    def mean(self) -> Tensor:
        return torch.einsum("nj,nja->na", self.weights, self.means)

    @property
    def covariance(self) -> Tensor:
        """(N, d, d), by the law of total variance."""
        apart = self.means - self.mean[:, None]
        between = torch.einsum("nj,nja,njb->nab", self.weights, apart, apart)
        return between + torch.einsum("nj,jab->nab", self.weights, self.covariances)

    def expect(self, reward: ExactReward) -> Tensor:
        return (self.weights * reward.component(self.means, self.covariances)).sum(1)


@dataclass(frozen=True)
class ExactReward:
    """A reward r(x_0), its expectation over N(m, C) and the constants that bound it.

    Attributes:
        value: of (..., d).
        component: of means (N, J, d) and covariances (J, d, d), (N, J).
        curvature: the largest absolute eigenvalue of its Hessian anywhere.
        slope: the largest norm of its gradient anywhere; infinite for a quadratic.
        direction: w of a ridge reward h(w . x); None where it is none.
        ridge: sup|h''| and sup|h'| of that.
    """

    value: Callable[[Tensor], Tensor]
    component: Callable[[Tensor, Tensor], Tensor]
    curvature: float
    slope: float
    direction: Tensor | None = None
    ridge: tuple[float, float] | None = None

    def __call__(self, pictures: Tensor, prompts: object) -> Tensor:
        """As a score of the library."""
        return self.value(pictures.flatten(1).double()).float()


def quadratic(matrix: Tensor, centre: Tensor) -> ExactReward:
    """-(x - b)' A (x - b), A positive semi-definite."""

    def value(x: Tensor) -> Tensor:
        return -torch.einsum("...a,ab,...b->...", x - centre, matrix, x - centre)

    def component(means: Tensor, covariances: Tensor) -> Tensor:
        return value(means) - torch.einsum("ab,jba->j", matrix, covariances)

    return ExactReward(value, component, 2 * float(torch.linalg.eigvalsh(matrix)[-1]), math.inf)


def sine(direction: Tensor, phase: float) -> ExactReward:
    """sin(w . x + f)."""

    def component(means: Tensor, covariances: Tensor) -> Tensor:
        q = torch.einsum("a,jab,b->j", direction, covariances, direction)
        return torch.exp(-q / 2) * torch.sin(means @ direction + phase)

    norm = float(direction.norm())
    return ExactReward(
        lambda x: torch.sin(x @ direction + phase), component, norm**2, norm, direction=direction, ridge=(1.0, 1.0)
    )


def probit(direction: Tensor, offset: float) -> ExactReward:
    """Phi(g . x + b): |h'| <= 1 / sqrt(2 pi), |h''| <= phi(1)."""
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)

    def component(means: Tensor, covariances: Tensor) -> Tensor:
        q = torch.einsum("a,jab,b->j", direction, covariances, direction)
        return normal.cdf((means @ direction + offset) / (1 + q).sqrt())

    norm, first, second = float(direction.norm()), 1 / math.sqrt(2 * math.pi), math.exp(-0.5) / math.sqrt(2 * math.pi)
    return ExactReward(
        lambda x: normal.cdf(x @ direction + offset),
        component,
        second * norm**2,
        first * norm,
        direction=direction,
        ridge=(second, first),
    )
