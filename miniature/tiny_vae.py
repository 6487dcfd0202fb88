"""The draft decoder: a small autoencoder in TAESD's form that imitates the shipped one, for pictures on the way.

Step rewards and guidance look at the picture behind a predicted clean latent, two for every trained step. The full
decoder spends most of its time at 64x64 pixels; this one has 16 channels and no residual block there. It learns from
the full decoder's own pictures, of the latents it will meet: the base model's guesses at all times under the guidance
of the recipes, and real pictures' latents, a little disturbed. The encoder, which nothing here uses, learns the way
back.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor
from torch.nn import functional as F

from miniature.data import caption, draw, load_glyphs, random_glyph, sample_view
from miniature.diffusion import load_exported, make_scheduler, tokens
from miniature.place import ASSETS, CACHE, length
from miniature.sampling import predict_clean
from miniature.tokenizer import make_tokenizer
from miniature.training import cosine, load, save, set_lr
from miniature.vae import CHANNELS, reconstruction_loss

WIDTH = 16
VIEWS = length(6_144, quick=128)
STEPS = length(10_000)
BATCH = 16
LR = 3e-3
GUIDANCE = 1.5
NAME = "emoji_tiny_vae"


def make_tiny_vae() -> AutoencoderTiny:
    """The untrained pair."""
    return AutoencoderTiny(
        latent_channels=CHANNELS,
        encoder_block_out_channels=(WIDTH,) * 4,
        decoder_block_out_channels=(WIDTH,) * 4,
        num_encoder_blocks=(0, 1, 1, 1),
        num_decoder_blocks=(3, 3, 1, 0),
    )


@torch.no_grad()
def lesson(seed: int, n: int) -> tuple[Tensor, Tensor]:
    """Latents (n, C, 8, 8), and what the full decoder makes of them: (n, 3, 64, 64) in [-1, 1], both in fp16.

    A quarter are real pictures' latents with noise of up to 0.2; the others are guesses from a time of their own.
    """
    (vae, denoiser), glyphs, tokenizer = load_exported(), load_glyphs(), make_tokenizer()
    empty = denoiser.text_encoder(tokens(tokenizer, [""])).last_hidden_state
    latents, shown = [], []
    for part in range(0, n, 64):
        rng, noise = np.random.default_rng((seed, part)), torch.Generator().manual_seed(seed * 1_000_000 + part)
        views = [sample_view(rng, random_glyph(rng, glyphs)) for _ in range(64)]
        drawn = torch.from_numpy(np.stack([draw(view, glyphs) for view in views])).permute(0, 3, 1, 2)
        real = vae.encode(drawn.float() / 127.5 - 1).latent_dist.mean
        times = ((torch.arange(48) + torch.rand(48, generator=noise)) * 1000 / 48).long()
        alpha = make_scheduler().alphas_cumprod[times][:, None, None, None]
        noisy = alpha.sqrt() * real[:48] + (1 - alpha).sqrt() * torch.randn(real[:48].shape, generator=noise)
        texts = denoiser.text_encoder(tokens(tokenizer, [caption(rng, view, glyphs) for view in views[:48]]))
        context = texts.last_hidden_state
        guesses = predict_clean(denoiser, noisy, times, context, empty.expand_as(context), guidance=GUIDANCE)
        level = torch.rand(16, 1, 1, 1, generator=noise) * 0.2
        disturbed = real[48:] + level * torch.randn(real[48:].shape, generator=noise)
        both = torch.cat([guesses, disturbed])
        latents.append(both.half())
        shown.append(vae.decode(both).sample.clamp(-1, 1).half())
    return torch.cat(latents)[:n], torch.cat(shown)[:n]


def train_tiny_vae() -> None:
    """Imitates the shipped decoder and writes `assets/emoji_tiny_vae`."""
    if (CACHE / "tiny_vae.pt").exists():
        return
    torch.manual_seed(2)
    vae = make_tiny_vae()
    data = load(CACHE / "tiny_vae_lesson.pt")
    if data is None:
        latents, shown = lesson(8, VIEWS)
        data = {"latents": latents, "shown": shown}
        save(CACHE / "tiny_vae_lesson.pt", data)
    optimizer = torch.optim.AdamW(vae.parameters(), LR, betas=(0.9, 0.99), weight_decay=1e-4)
    start, clock, errors = 0, time.time(), []
    if state := load(CACHE / "tiny_vae_train.pt"):
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    for step in range(start, STEPS):
        index = torch.from_numpy(np.random.default_rng((9, step)).choice(VIEWS, BATCH, replace=False))
        latents, shown = data["latents"][index].float(), data["shown"][index].float()
        set_lr(optimizer, LR * cosine(step, STEPS, warmup=100))
        output = vae.decode(latents).sample
        # The encoder works in [-1, 1], like the decoder's pictures.
        loss = reconstruction_loss(output, shown) + F.mse_loss(vae.encode(shown).latents, latents)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        errors.append(F.mse_loss(output.detach(), shown).item() / 4)
        if step % 200 == 199:
            print(
                f"tiny vae {step + 1}/{STEPS} psnr {-10 * np.log10(np.mean(errors)):.2f} {time.time() - clock:.0f} s",
                flush=True,
            )
            errors = []
        if step % 500 == 499:
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            save(CACHE / "tiny_vae_train.pt", state)
    save(CACHE / "tiny_vae.pt", vae.state_dict())
    vae.half().save_pretrained(ASSETS / NAME)


def load_tiny_vae() -> AutoencoderTiny:
    """As it ships, in fp32."""
    vae = AutoencoderTiny.from_pretrained(ASSETS / NAME, torch_dtype=torch.float32)
    return vae.eval().requires_grad_(False)


if __name__ == "__main__":
    train_tiny_vae()
