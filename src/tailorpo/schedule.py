"""How much signal and noise a latent holds before and after each denoising step.

A latent on the way from noise to picture is x_k = alpha_k x_0 + sigma_k e, e ~ N(0, I), for k = 0 (almost pure noise)
to k = K (finished). Step k leads from (alpha_k, sigma_k) to (alpha_{k+1}, sigma_{k+1}) and asks the network once, at
the time it was trained with.

Variance-preserving (DDPM, Ho et al. 2020, arXiv 2006.11239; Stable Diffusion): alpha = sqrt(abar) and
sigma = sqrt(1 - abar).

Zero terminal SNR (Lin et al. 2023, arXiv 2305.08891): abar is 0 at the last training time, so that k = 0 is pure noise,
alpha_0 = 0 exactly. A network that predicts epsilon has no x_0 there (0 / 0); v and x_0 do.

Left out: schedules of flow models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Spacing = Literal["leading", "trailing", "linspace"]


@dataclass(frozen=True)
class Schedule:
    """Signal and noise levels of K denoising steps.

    Attributes:
        alpha: signal level before each step and at the end, (K + 1,) float64, rising.
        sigma: noise level, (K + 1,) float64, falling.
        time: the time the network is told at each step, (K,) int64.
    """

    alpha: Tensor
    sigma: Tensor
    time: Tensor

    @property
    def steps(self) -> int:
        """K, the number of denoising steps."""
        return len(self.time)


def scaled_linear_alphas_cumprod(*, beta_start: float, beta_end: float, steps: int) -> Tensor:
    """abar of Stable Diffusion's training schedule: betas linear in their square root; (steps,) float64."""
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def ddpm_schedule(
    alphas_cumprod: Tensor,
    steps: int,
    *,
    spacing: Spacing = "leading",
    steps_offset: int = 1,
    final_alpha_cumprod: float | None = None,
) -> Schedule:
    """The K steps that diffusers' DDIMScheduler would take for the same settings.

    Step k ends at the level at which step k + 1 begins. diffusers ends it T_train // K training times below its own
    time instead, which is the same where K divides T_train; where it does not (trailing or linspace only), its network
    is told a time one or two off the noise that is really there.

    Args:
        alphas_cumprod: abar at each training time, (T_train,).
        steps: K, at most T_train.
        spacing: "leading" as in SD 1.x, 2.x and XL, "trailing" for zero-terminal-SNR checkpoints (arXiv 2305.08891),
            "linspace" where a checkpoint names it.
        steps_offset: added to the times under "leading"; 1 in every Stable Diffusion.
        final_alpha_cumprod: abar after the last step; None takes abar at training time 0, as `set_alpha_to_one: false`.

    Raises:
        ValueError: K is not in 1..T_train.
    """
    train_steps = len(alphas_cumprod)
    if not 1 <= steps <= train_steps:
        raise ValueError(f"the sampler's steps must be in 1..{train_steps}, got {steps}")
    abar = alphas_cumprod.to(torch.float64)
    stride = train_steps / steps
    if spacing == "leading":
        # With K = T_train the offset would lead past the last training time.
        time = (torch.arange(steps - 1, -1, -1) * (train_steps // steps) + steps_offset).clamp(max=train_steps - 1)
    elif spacing == "trailing":
        time = torch.round(torch.arange(train_steps, 0, -stride, dtype=torch.float64)).long() - 1
    else:
        time = torch.linspace(train_steps - 1, 0, steps, dtype=torch.float64).round().long()
    final = abar[0] if final_alpha_cumprod is None else torch.tensor(final_alpha_cumprod, dtype=torch.float64)
    levels = torch.cat([abar[time], final.view(1)])
    return Schedule(alpha=levels.sqrt(), sigma=(1.0 - levels).sqrt(), time=time)
