"""Sampling from the base model with DDIM, eta = 1, keeping the predicted clean latents of every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from miniature.diffusion import Denoiser, make_scheduler, tokens
from miniature.tokenizer import make_tokenizer
from miniature.vae import CHANNELS


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Final latents (B, C, 8, 8), and for every step its time, the latents before it and the predicted clean ones."""

    latents: Tensor
    times: list[int]
    noisy: list[Tensor]
    clean: list[Tensor]


@torch.no_grad()
def predict_clean(
    model: Denoiser, noisy: Tensor, time: Tensor, context: Tensor, empty: Tensor, *, guidance: float
) -> Tensor:
    """The clean latents the model expects behind noisy ones, under classifier-free guidance."""
    alpha = make_scheduler().alphas_cumprod[time][:, None, None, None]
    if guidance == 1.0:
        noise = model.unet(noisy, time, context).sample
    else:
        both = model.unet(torch.cat([noisy, noisy]), time.repeat(2), torch.cat([context, empty])).sample
        with_text, without = both.chunk(2)
        noise = without + guidance * (with_text - without)
    return (noisy - (1 - alpha).sqrt() * noise) / alpha.sqrt()


@torch.no_grad()
def sample(
    model: Denoiser,
    prompts: list[str],
    *,
    seed: int,
    guidance: float,
    steps: int = 20,
    start: tuple[int, Tensor] | None = None,
) -> Trajectory:
    """Draws one picture's latents per prompt; `start` continues from the latents before a step."""
    tokenizer, scheduler = make_tokenizer(), make_scheduler()
    scheduler.set_timesteps(steps)
    rng = torch.Generator().manual_seed(seed)
    context = model.text_encoder(tokens(tokenizer, prompts)).last_hidden_state
    empty = model.text_encoder(tokens(tokenizer, [""])).last_hidden_state.expand_as(context)
    first, x = start or (0, torch.randn(len(prompts), CHANNELS, 8, 8, generator=rng))
    times, noisy, clean = [], [], []
    for t in scheduler.timesteps[first:].tolist():
        alpha = scheduler.alphas_cumprod[t]
        previous = t - 1000 // steps
        alpha_previous = scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod
        x0 = predict_clean(model, x, torch.full((len(x),), t), context, empty, guidance=guidance)
        times.append(t)
        noisy.append(x)
        clean.append(x0)
        noise = (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        variance = (1 - alpha_previous) / (1 - alpha) * (1 - alpha / alpha_previous)
        x = alpha_previous.sqrt() * x0 + (1 - alpha_previous - variance).sqrt() * noise
        x = x + variance.sqrt() * torch.randn(x.shape, generator=rng)
    return Trajectory(latents=x, times=times, noisy=noisy, clean=clean)
