"""The autoencoder: 64x64 pixels to 8x8 latents of 12 channels and back.

Trained in two stages. First both halves on the messy world; then the encoder is frozen (the diffusion model may start
on its latents) and the decoder alone is polished on clean and slightly disturbed latents.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from miniature.data import Glyphs, draw, load_glyphs, random_glyph, sample_view
from miniature.place import CACHE, length
from miniature.training import cosine, load, save, set_lr

CHANNELS = 12
STEPS = length(3400)
POLISH_STEPS = length(1200)
POLISH_LR = 8e-4
BATCH = 16
LR = 1.5e-3


def make_vae() -> AutoencoderKL:
    """The untrained autoencoder; attention is left out because 8x8 latents of icons do not repay it."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        latent_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=1.0,
    )


def pictures(rng: np.random.Generator, glyphs: Glyphs, n: int, *, clean: float) -> Tensor:
    """A batch of pictures in [-1, 1]; a share `clean` of them is surely undamaged."""
    batch = [
        draw(sample_view(rng, random_glyph(rng, glyphs), damage="none" if rng.random() < clean else None), glyphs)
        for _ in range(n)
    ]
    return torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).float() / 127.5 - 1


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 and squared error, and L1 of horizontal and vertical differences, which keeps edges sharp."""
    edges = sum(F.l1_loss(output.diff(dim=d), target.diff(dim=d)) for d in (2, 3))
    return F.l1_loss(output, target) + 2 * F.mse_loss(output, target) + 0.5 * edges


def train_vae() -> None:
    """Stage 1: both halves. Ends with the whitened autoencoder in the cache."""
    if (CACHE / "vae.pt").exists():
        return
    torch.manual_seed(0)
    glyphs, vae = load_glyphs(), make_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), LR, betas=(0.9, 0.99), weight_decay=1e-4)
    start = 0
    if state := load(CACHE / "vae_train.pt"):
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    clock = time.time()
    for step in range(start, STEPS):
        batch = pictures(np.random.default_rng((1, step)), glyphs, BATCH, clean=0.3)
        set_lr(optimizer, LR * cosine(step, STEPS, warmup=100))
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            output = vae.decode(posterior.sample()).sample.float()
        loss = reconstruction_loss(output, batch) + 5e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            psnr = -10 * F.mse_loss(output, batch).div(4).log10().item()
            print(
                f"vae {step + 1}/{STEPS} loss {loss.item():.4f} psnr {psnr:.2f} {time.time() - clock:.0f} s", flush=True
            )
        if step % 500 == 499:
            save(
                CACHE / "vae_train.pt", {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            )
    whiten(vae, pictures(np.random.default_rng(2), glyphs, 2048, clean=0.0))
    save(CACHE / "vae.pt", vae.state_dict())


def polish_decoder() -> None:
    """Stage 2: the decoder alone, on frozen latents with a little noise, such as a diffusion model's samples carry."""
    from miniature.diffusion import VIEWS, load_latents  # the diffusion model needs only stage 1

    if (CACHE / "vae_polished.pt").exists():
        return
    torch.manual_seed(1)
    glyphs, vae, data = load_glyphs(), load_vae(polished=False), load_latents()
    half = (vae.decoder.requires_grad_(True), vae.post_quant_conv.requires_grad_(True))
    params = [p for part in half for p in part.parameters()]
    optimizer = torch.optim.AdamW(params, POLISH_LR, betas=(0.9, 0.99), weight_decay=1e-4)
    start, clock, errors = 0, time.time(), []
    if state := load(CACHE / "vae_polish_train.pt"):
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    for step in range(start, POLISH_STEPS):
        rng = np.random.default_rng((6, step))
        index = rng.choice(VIEWS, BATCH)
        target = (
            torch.from_numpy(np.stack([draw(data.views[i], glyphs) for i in index])).permute(0, 3, 1, 2).float() / 127.5
            - 1
        )
        noise = torch.from_numpy(
            rng.normal(0, 1, (BATCH, CHANNELS, 8, 8)) * rng.uniform(0, 0.2, (BATCH, 1, 1, 1))
        ).float()
        set_lr(optimizer, POLISH_LR * cosine(step, POLISH_STEPS, warmup=100))
        with torch.autocast("cpu", torch.bfloat16):
            output = vae.decode(data.means[index].float() + noise).sample.float()
        loss = reconstruction_loss(output, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        errors.append(F.mse_loss(output.detach(), target).item() / 4)
        if step % 200 == 199:
            decibels = -10 * np.log10(np.mean(errors))
            errors = []
            print(f"polish {step + 1}/{POLISH_STEPS} psnr {decibels:.2f} {time.time() - clock:.0f} s", flush=True)
        if step % 500 == 499:
            save(
                CACHE / "vae_polish_train.pt",
                {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1},
            )
    save(CACHE / "vae_polished.pt", vae.state_dict())


@torch.no_grad()
def whiten(vae: AutoencoderKL, batch: Tensor) -> None:
    """Gives every latent channel mean 0 and variance 1, by a change of the 1x1 convolutions around the latents."""
    means = torch.cat([vae.encode(part).latent_dist.mean for part in batch.split(64)])
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
    print("latent mean", mean, "std", std, flush=True)
    quant, post = vae.quant_conv, vae.post_quant_conv
    n = CHANNELS
    quant.bias[:n] = (quant.bias[:n] - mean) / std
    quant.weight[:n] /= std[:, None, None, None]
    quant.bias[n:] -= 2 * std.log()  # the second half is the log-variance
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]


@torch.no_grad()
def psnr(vae: AutoencoderKL, batch: Tensor) -> float:
    """Mean over pictures of the reconstruction's peak signal-to-noise ratio in decibels."""
    errors = []
    for part in batch.split(64):
        output = vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1)
        errors.append(F.mse_loss(output, part, reduction="none").mean((1, 2, 3)) / 4)
    return float((-10 * torch.cat(errors).log10()).mean())


def load_vae(*, polished: bool) -> AutoencoderKL:
    """The trained autoencoder, with the decoder of the last finished polish if asked for and there is one."""
    state = load(CACHE / "vae_polished.pt") if polished else None
    if polished and state is None and (unfinished := load(CACHE / "vae_polish_train.pt")):
        state = unfinished["vae"]
    vae = make_vae()
    vae.load_state_dict(state or load(CACHE / "vae.pt") or {})
    return vae.eval().requires_grad_(False)


if __name__ == "__main__":
    train_vae()
    polish_decoder()
