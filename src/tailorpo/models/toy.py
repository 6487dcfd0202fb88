"""A diffusion model without a network: the exact denoiser of a Gaussian mixture.

For x_0 ~ sum_j w_j N(m_j, S_j) and x = alpha x_0 + sigma e, with P_j = alpha^2 S_j + sigma^2 I and
G_j = alpha S_j P_j^-1,

    E[x_0 | x] = sum_j r_j(x) (m_j + G_j (x - alpha m_j)),     r_j(x) ~ w_j N(x; alpha m_j, P_j)

Weights and means can be trained; covariances are fixed. Tilting the mixture by exp(a . x_0) keeps it in this family
(w_j grows by exp(a . m_j + a S_j a / 2), m_j moves by S_j a), so the optimum of an alignment with a linear reward is
known in closed form and can be reached: what every algorithm is tested on before it sees a network.

Latents are (B, d, 1, 1); `decode` and `encode_images` return them unchanged, so a reward sees x_0 itself. Prompts are
ignored. Left out: guidance (there is no unconditional model to guide away from) and writing the adapter to files.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from tailorpo.errors import UserError
from tailorpo.models import Conditioning
from tailorpo.prediction import PredictionType
from tailorpo.schedule import Schedule, ddpm_schedule, scaled_linear_alphas_cumprod


class GaussianMixture:
    """The exact denoiser of a mixture; see `tailorpo.models.DiffusionModel` for the meaning of each member.

    Args:
        weights: (n,), positive; normalised here.
        means: (n, d).
        covariances: (n, d, d), positive definite.
        train_weights: whether the weights are trained besides the means.
    """

    device = torch.device("cpu")
    prediction_type: PredictionType = "sample"

    def __init__(self, weights: Tensor, means: Tensor, *, covariances: Tensor, train_weights: bool = True) -> None:
        self.latent_shape = self.picture_shape = (means.shape[1], 1, 1)
        self.evaluations = 0
        self.covariances = covariances.float()
        self._initial = {"logits": weights.log().float(), "means": means.float()}
        self._current = {
            "logits": nn.Parameter(self._initial["logits"].clone(), requires_grad=train_weights),
            "means": nn.Parameter(self._initial["means"].clone()),
        }
        self._is_reference = False
        self.alphas_cumprod = scaled_linear_alphas_cumprod(beta_start=0.00085, beta_end=0.012, steps=1000)
        self._constants: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def schedule(self, steps: int) -> Schedule:
        return ddpm_schedule(self.alphas_cumprod, steps)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        nothing = torch.zeros(len(prompts), 1, 1)
        return Conditioning(nothing, nothing)

    def encode_images(self, images: Tensor) -> Tensor:
        return images

    def predict(self, latents: Tensor, time: int | Tensor, cond: Conditioning, *, guidance_scale: float) -> Tensor:
        if guidance_scale != 1.0:
            raise UserError(f"the Gaussian mixture has no guidance: guidance_scale must be 1, got {guidance_scale}")
        self.evaluations += len(latents)
        # One row of constants for every latent, or one for all.
        times = [int(each) for each in time] if isinstance(time, Tensor) else [time]
        alpha, gain, precision, log_volume = map(torch.stack, zip(*map(self._at, times), strict=True))
        active = self._initial if self._is_reference else self._current
        logits, means = active["logits"], active["means"]
        offset = latents.flatten(1)[:, None] - alpha.view(-1, 1, 1) * means
        log_density = -torch.einsum("nja,njab,njb->nj", offset, precision, offset) / 2 - log_volume
        responsibility = torch.softmax(logits + log_density, dim=1)
        component = means + torch.einsum("njab,njb->nja", gain, offset)
        return torch.einsum("nj,nja->na", responsibility, component).view_as(latents)

    def _at(self, time: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, G_j, P_j^-1 and half the log-determinant of P_j at a training time; none of them is trained."""
        if time not in self._constants:
            abar = float(self.alphas_cumprod[time])
            marginal = abar * self.covariances + (1 - abar) * torch.eye(self.latent_shape[0])
            precision: Tensor = torch.inverse(marginal)
            gain: Tensor = abar**0.5 * self.covariances @ precision
            self._constants[time] = (torch.tensor(abar**0.5), gain, precision, torch.logdet(marginal) / 2)
        return self._constants[time]

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def decode_draft(self, latents: Tensor) -> Tensor:
        return latents

    @contextmanager
    def reference(self) -> Generator[None]:
        self._is_reference = True
        try:
            yield
        finally:
            self._is_reference = False

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self._current.items() if parameter.requires_grad}

    def save_lora(self, folder: Path) -> None:
        raise UserError(f"the Gaussian mixture has no LoRA to write to {folder}")

    def load_lora(self, folder: Path) -> None:
        raise UserError(f"the Gaussian mixture has no LoRA to read from {folder}")

    def networks(self) -> Sequence[nn.Module]:
        return ()

    def save_unet(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        raise UserError(f"the Gaussian mixture has no network to write to {folder}")

    def load_unet(self, folder: Path) -> None:
        raise UserError(f"the Gaussian mixture has no network to read from {folder}")
