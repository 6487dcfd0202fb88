"""Samplers: the Gaussian of the next latent, as a pure function of the current one and the network's prediction.

DDIM (Song et al. 2021, arXiv 2010.02502, Eq. 12 and 16), with a = alpha^2 at step k and a' at step k + 1:

    std^2 = eta^2 (1 - a') / (1 - a) (1 - a / a')
    mean  = sqrt(a') x0 + sqrt(1 - a' - std^2) epsilon

eta = 1 is ancestral DDPM sampling: mean and std are those of the Bayes posterior q(x_{k+1} | x_k, x0).
eta = 0 is the deterministic sampler.

Left out: clipping and thresholding of x0 (latents have no range to clip to), and the mutable state of diffusers'
schedulers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tailorpo.gaussian_step import GaussianStep
from tailorpo.prediction import PredictionType
from tailorpo.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class DDIM:
    """The `sampler` section of a run file.

    Attributes:
        steps: number of denoising steps, K of the schedule (T in the paper).
        eta: 1 for ancestral noise, 0 for none; training needs eta > 0.
        guidance_scale: weight of classifier-free guidance, the same in sampling and training; 1 is no guidance.
    """

    name: Literal["ddim"] = "ddim"
    steps: int = 20
    eta: float = 1.0
    guidance_scale: float = 5.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in 0..1, got {self.eta}")
        if not self.guidance_scale >= 1:
            raise ValueError(f"guidance_scale must be at least 1 (1 is no guidance), got {self.guidance_scale}")

    @property
    def evaluations_per_forward(self) -> int:
        """Latents that go through the network for one forward of one latent: two with guidance, one without."""
        return 1 if self.guidance_scale == 1 else 2

    def std(self, schedule: Schedule, k: int) -> float:
        """Standard deviation of step k."""
        a, a_next = float(schedule.alpha[k]) ** 2, float(schedule.alpha[k + 1]) ** 2
        variance = (1 - a_next) / (1 - a) * (1 - a / a_next)
        return self.eta * math.sqrt(max(variance, 0.0))

    def noise_weight(self, schedule: Schedule, k: int, *, kind: PredictionType = "epsilon") -> float:
        """|d mean / d output| / std at step k: the weight with which the step turns a network change into nats.

        For epsilon about 0.6 to 1.1 for 20 steps of SD 1.5, but 5.4 at t = 51.
        """
        alpha, sigma = float(schedule.alpha[k]), float(schedule.sigma[k])
        alpha_next, sigma_next = float(schedule.alpha[k + 1]), float(schedule.sigma[k + 1])
        std = self.std(schedule, k)
        of_v = abs(alpha * math.sqrt(max(sigma_next**2 - std**2, 0.0)) - alpha_next * sigma) / std
        # d v = d epsilon / alpha = -d x0 / sigma at a fixed x_k.
        return of_v / {"epsilon": alpha, "v_prediction": 1.0, "sample": sigma}[kind]

    def step(self, x0: Tensor, epsilon: Tensor, schedule: Schedule, *, k: int) -> GaussianStep:
        """The Gaussian of x_{k+1} given the prediction at x_k; x0 and epsilon are (B, C, h, w)."""
        std = self.std(schedule, k)
        alpha_next, sigma_next = float(schedule.alpha[k + 1]), float(schedule.sigma[k + 1])
        direction = math.sqrt(max(sigma_next**2 - std**2, 0.0))
        return GaussianStep(mean=alpha_next * x0 + direction * epsilon, std=std)
