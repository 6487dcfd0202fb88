"""The text encoder and the UNet: latent diffusion with epsilon prediction and Stable Diffusion 1.5's noise schedule."""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from miniature.data import View, caption, draw, load_glyphs, random_glyph, sample_view
from miniature.muon import Muon
from miniature.place import ASSETS, CACHE, length
from miniature.tokenizer import LENGTH, make_tokenizer
from miniature.training import Average, cosine, load, save, set_lr
from miniature.vae import CHANNELS, load_vae

WIDTH = 128
VIEWS = length(49_152, quick=2048)
SHARD = min(4096, VIEWS)
STEPS = length(7_400)
EARLY = length(4_000)
"""The step whose half-trained model is kept: the reward models learn from its failures too."""
BATCH = 64
LR = 2e-3
ADAM_LR = 1e-3
EMPTY = 0.1
"""Share of empty captions, which classifier-free guidance needs."""


def make_scheduler() -> DDIMScheduler:
    """DDIM with the noise schedule of Stable Diffusion 1.5."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
        timestep_spacing="leading",
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text encoder of two layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_unet() -> UNet2DConditionModel:
    """An untrained UNet. The caption enters by cross-attention at 4x4 and, pooled, with the time in every block."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(80, 112),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


@dataclass(frozen=True, kw_only=True)
class Latents:
    """The cached training set: whitened latent means of many views, and for each its view."""

    means: Tensor
    views: list[View]


def training_view(index: int) -> View:
    """The view behind latent number `index`, always the same."""
    rng = np.random.default_rng((3, index))
    return sample_view(rng, random_glyph(rng, load_glyphs()))


@torch.no_grad()
def encode_shard(number: int, vae: AutoencoderKL) -> Tensor:
    """The latent means of one shard of the training set, from the cache where they are there already."""
    path, glyphs, means = CACHE / "latents" / f"{number:03}.pt", load_glyphs(), []
    if not path.exists():
        for first in range(number * SHARD, (number + 1) * SHARD, 64):
            batch = np.stack([draw(training_view(i), glyphs) for i in range(first, first + 64)])
            pixels = torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 127.5 - 1
            with torch.autocast("cpu", torch.bfloat16):
                means.append(vae.encode(pixels).latent_dist.mean.half())
        save(path, {"means": torch.cat(means)})
        print(f"latents: shard {number}", flush=True)
    return torch.load(path)["means"]


def load_latents() -> Latents:
    """Encodes the training set once, shard by shard, and reads it from the cache."""
    vae = load_vae(polished=False)
    means = torch.cat([encode_shard(number, vae) for number in range(VIEWS // SHARD)])
    return Latents(means=means, views=[training_view(i) for i in range(VIEWS)])


def tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids of captions, padded to the full length."""
    return torch.tensor(tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True).input_ids)


class Denoiser(nn.Module):
    """Text encoder and UNet as one module, for training."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder = make_text_encoder(tokenizer)
        self.unet = make_unet()

    def forward(self, noisy: Tensor, time_steps: Tensor, ids: Tensor) -> Tensor:
        """The predicted noise."""
        with torch.autocast("cpu", torch.bfloat16):
            context = self.text_encoder(ids).last_hidden_state
            return self.unet(noisy, time_steps, context).sample.float()


def make_optimizers(model: Denoiser, *, muon: bool = True) -> list[torch.optim.Optimizer]:
    """Muon for the weights inside the UNet, AdamW for embeddings, norms, biases, the two ends and the text encoder."""
    inner, rest = [], []
    for name, p in model.named_parameters():
        inside = (
            name.startswith("unet.")
            and p.ndim >= 2
            and not name.startswith(("unet.conv_in", "unet.conv_out", "unet.add_"))
        )
        (inner if inside and muon else rest).append(p)
    adam = torch.optim.AdamW(rest, ADAM_LR, betas=(0.9, 0.99), weight_decay=1e-3)
    return [adam, Muon(inner, LR)] if inner else [adam]


def train_diffusion(name: str = "diffusion", *, muon: bool = True, steps: int = STEPS) -> None:
    """Trains text encoder and UNet together; the exponential average of the weights is the result."""
    if (CACHE / f"{name}.pt").exists():
        return
    torch.manual_seed(0)
    data, glyphs, tokenizer = load_latents(), load_glyphs(), make_tokenizer()
    means, model = data.means.float(), Denoiser(tokenizer)
    # Two wordings of every caption; drawing afresh each time would cost more than a training step's worth of Python.
    wordings = [
        tokens(tokenizer, [caption(np.random.default_rng((4, w, i)), v, glyphs) for i, v in enumerate(data.views)])
        for w in (0, 1)
    ]
    empty = tokens(tokenizer, [""])
    alphas = make_scheduler().alphas_cumprod
    weights = (alphas / (1 - alphas)).clamp(max=5) / (alphas / (1 - alphas))
    average, optimizers, start = Average(model, 0.999), make_optimizers(model, muon=muon), 0
    if state := load(CACHE / f"{name}_train.pt"):
        model.load_state_dict(state["model"])
        average.values = state["average"]
        for optimizer, values in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        start = state["step"]
    clock, losses = time.time(), []
    for step in range(start, steps):
        noise_rng = torch.Generator().manual_seed(step)
        epoch, position = divmod(step * BATCH, VIEWS)
        order = torch.randperm(VIEWS, generator=torch.Generator().manual_seed(-1 - epoch))
        index = order[position : position + BATCH]
        ids = torch.where(torch.rand(BATCH, 1, generator=noise_rng) < 0.5, wordings[0][index], wordings[1][index])
        ids = torch.where(torch.rand(BATCH, 1, generator=noise_rng) < EMPTY, empty, ids)
        clean = means[index]
        # Stratified over the batch: one time step from each of BATCH equal parts of the schedule.
        time_steps = ((torch.arange(BATCH) + torch.rand(BATCH, generator=noise_rng)) * 1000 / BATCH).long()
        noise = torch.randn(clean.shape, generator=noise_rng)
        alpha = alphas[time_steps][:, None, None, None]
        predicted = model(alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, time_steps, ids)
        loss = (F.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3)) * weights[time_steps]).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = cosine(step, steps, warmup=200)
        for optimizer, lr in zip(optimizers, (ADAM_LR, LR), strict=False):
            set_lr(optimizer, lr * factor)
            optimizer.step()
            optimizer.zero_grad()
        average.update(model, step)
        losses.append((loss.item(), F.mse_loss(predicted.detach(), noise).item()))
        if step % 100 == 99:
            weighted, plain = np.mean(losses, 0)
            losses = []
            print(
                f"{name} {step + 1}/{steps} weighted {weighted:.4f} mse {plain:.4f} {time.time() - clock:.0f} s",
                flush=True,
            )
        if step % 500 == 499:
            state = {"model": model.state_dict(), "average": average.values, "step": step + 1}
            save(CACHE / f"{name}_train.pt", state | {"optimizers": [o.state_dict() for o in optimizers]})
        if step + 1 == EARLY:
            save(CACHE / f"{name}_early.pt", {"average": average.values})
    save(CACHE / f"{name}.pt", {"average": average.values})


def load_denoiser(name: str = "diffusion") -> Denoiser:
    """The trained text encoder and UNet (averaged weights); while training still runs, those of its last checkpoint."""
    model, average = Denoiser(make_tokenizer()), Average(nn.Module(), 0.0)
    state = load(CACHE / f"{name}.pt") or load(CACHE / f"{name}_train.pt")
    assert state is not None, f"{name} is not trained yet"
    average.values = state["average"]
    average.copy_to(model)
    return model.eval().requires_grad_(False)


def load_exported() -> tuple[AutoencoderKL, Denoiser]:
    """The autoencoder and the denoiser as they ship, in fp32."""
    folder, model = ASSETS / "emoji", Denoiser(make_tokenizer())
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    model.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    model.unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    return vae.eval().requires_grad_(False), model.eval().requires_grad_(False)


def export(name: str = "diffusion") -> None:
    """Writes the whole pipeline in diffusers' folder format, fp16."""
    model = load_denoiser(name)
    pipe = StableDiffusionPipeline(
        vae=load_vae(polished=True).half(),
        text_encoder=model.text_encoder.half(),
        tokenizer=make_tokenizer(),
        unet=model.unet.half(),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = ASSETS / "emoji"
    shutil.rmtree(folder, ignore_errors=True)
    pipe.save_pretrained(folder)
    load_as_float32(folder / "text_encoder")


def load_as_float32(folder: Path) -> None:
    """Makes transformers load fp16 weights in fp32 unless told otherwise, as diffusers does of itself."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "export":
        export(*sys.argv[2:])
    else:
        train_diffusion(sys.argv[1], muon=sys.argv[2] == "muon", steps=int(sys.argv[3]))
