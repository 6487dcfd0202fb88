"""The pictures that the reward models learn from, and how good each of them is.

Every picture has a *utility*, in nats of a Bradley-Terry preference:

- real pictures, their reconstructions, and predicted clean pictures made by noising a real picture's latents to some
  time and letting the base model guess it back: known by construction, from the damage, the caption, and the time;
- the base model's own samples and the predicted clean pictures along their trajectories: judged by an *oracle*, a
  convolutional network that learnt concept and damage from real pictures and the guesses above, never shipped;
- fakes that a policy might be pushed to (noise patterns, flat colours, oversaturation, disturbed latents, another
  object): low.

A `Source` makes pools and an oracle of its own from its seed, so that two models share neither pictures nor errors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from miniature.concepts import BACKGROUNDS, CONCEPTS
from miniature.data import SIZE, View, concept_weights, draw, load_glyphs, random_glyph, sample_view
from miniature.diffusion import Denoiser, load_denoiser, load_exported, make_scheduler, tokens
from miniature.place import CACHE, length
from miniature.sampling import predict_clean, sample
from miniature.tokenizer import make_tokenizer
from miniature.training import cosine, load, save, set_lr
from miniature.vae import load_vae

ORACLE_STEPS = length(1200)


def utility(view: View) -> float:
    """How good a real picture is, in nats: 0 for a clean one, about -1 for slight and -4 for severe damage."""
    if view.damage == "none":
        return 0.0
    if view.damage == "tiny":
        return -1.0 - 3.0 * (0.5 - view.scale) / 0.18
    if view.damage == "off-centre":
        return -1.0 - 3.0 * (float(np.hypot(*view.shift)) - 16) / 10
    worst = {"blur": 4.0, "faded": 3.5, "dark": 3.5, "noise": 3.0, "jpeg": 2.5}[view.damage]
    return -0.7 - (worst - 0.7) * view.strength


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Pictures (N, 64, 64, 3) in uint8 with what they were meant to show and how good they are."""

    pictures: np.ndarray
    concept: np.ndarray
    background: np.ndarray
    utility: np.ndarray

    def __len__(self) -> int:
        return len(self.utility)

    def __getitem__(self, index: np.ndarray) -> Pool:
        return Pool(**{key: value[index] for key, value in vars(self).items()})


def concatenate(*pools: Pool) -> Pool:
    """One pool of several."""
    return Pool(**{key: np.concatenate([getattr(p, key) for p in pools]) for key in vars(pools[0])})


NAMES = [None, *BACKGROUNDS]


def text_of(concept: int, background: int) -> str:
    """The caption of a concept on a background (0 is plain)."""
    colour = NAMES[background]
    return CONCEPTS[concept].prompt + (f" on a {colour} background" if colour else "")


def as_images(pictures: np.ndarray) -> Tensor:
    """Pictures as float images (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> np.ndarray:
    """Pictures of latents in uint8."""
    parts = [vae.decode(part).sample for part in latents.float().split(64)]
    return ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5 + 0.5).byte().permute(0, 2, 3, 1).numpy()


def real_batch(rng: np.random.Generator, n: int) -> Pool:
    """Fresh real pictures, drawn on the fly."""
    glyphs = load_glyphs()
    views = [sample_view(rng, random_glyph(rng, glyphs)) for _ in range(n)]
    return Pool(
        pictures=np.stack([draw(v, glyphs) for v in views]),
        concept=np.array([glyphs.concept[v.glyph] for v in views]),
        background=np.array([NAMES.index(v.background) for v in views]),
        utility=np.array([utility(v) for v in views]),
    )


FAKES = ("pattern", "flat", "saturated", "hue", "shuffled", "contrast")


def fake(rng: np.random.Generator, picture: np.ndarray) -> tuple[np.ndarray, float]:
    """A picture as a policy might fake it, and what that costs in utility."""
    kind, x = str(rng.choice(FAKES)), picture.astype(np.float32) / 255
    amount = rng.uniform(0.3, 1.0)
    if kind == "pattern":
        side = int(rng.choice([2, 4, 8, 16]))
        blocks = rng.normal(0, 0.35 * amount, (SIZE // side, SIZE // side, 3))
        x = x + blocks.repeat(side, 0).repeat(side, 1)
    elif kind == "flat":
        x = x + (rng.random(3) - x) * (0.4 + 0.6 * amount)
    elif kind == "saturated":
        x = x.mean(2, keepdims=True) + (x - x.mean(2, keepdims=True)) * (1.5 + 2.5 * amount)
    elif kind == "hue":
        x = x[..., rng.permutation([[1, 2, 0], [2, 0, 1], [1, 0, 2], [2, 1, 0]])[0]]
    elif kind == "shuffled":
        side = int(rng.choice([8, 16, 32]))
        n = SIZE // side
        blocks = x.reshape(n, side, n, side, 3).swapaxes(1, 2).reshape(n * n, side, side, 3)
        x = rng.permutation(blocks).reshape(n, n, side, side, 3).swapaxes(1, 2).reshape(SIZE, SIZE, 3)
        amount = 1.0
    else:
        x = 0.5 + (x - 0.5) * (1.5 + 2 * amount)
    return (np.clip(x, 0, 1) * 255).astype(np.uint8), -1.0 - 4.0 * amount


class Oracle(nn.Module):
    """A convolutional network that reads concept, background and utility off a picture."""

    def __init__(self) -> None:
        super().__init__()
        layers, width = [], 3
        for out in (32, 64, 96, 160):
            layers += [nn.Conv2d(width, out, 4, 2, 1), nn.GroupNorm(8, out), nn.SiLU()]
            layers += [nn.Conv2d(out, out, 3, 1, 1), nn.GroupNorm(8, out), nn.SiLU()] if out > 32 else []
            width = out
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(160 * 16, 256), nn.SiLU())
        self.concept = nn.Linear(256, len(CONCEPTS))
        self.background = nn.Linear(256, len(NAMES))
        self.utility = nn.Linear(256, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of concepts and of backgrounds, and the utility as if the caption were right; images in [0, 1]."""
        h = self.body(images * 2 - 1)
        return self.concept(h), self.background(h), self.utility(h)[:, 0]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where pictures of known or judged utility come from: a base model ("early": half-trained, "final") and a seed."""

    stage: str
    seed: int

    def base(self) -> tuple[AutoencoderKL, Denoiser]:
        """The base model that is shown: the shipped one, or the half-trained one of the cache."""
        if self.stage == "final":
            return load_exported()
        return load_vae(polished=True), load_denoiser("diffusion_early")

    @torch.no_grad()
    def constructed(self, n: int) -> Pool:
        """Pictures of known utility: reconstructions, guesses of the model from noised latents, disturbed latents."""
        path = CACHE / "pools" / f"constructed_{self.stage}_{self.seed}_{n}.npz"
        if path.exists():
            return Pool(**np.load(path))
        vae, model = self.base()
        rng, tokenizer, noise = np.random.default_rng(self.seed), make_tokenizer(), torch.Generator()
        noise.manual_seed(self.seed)
        alphas, real = make_scheduler().alphas_cumprod, real_batch(rng, n)
        worth = real.utility
        latents = torch.cat([vae.encode(part * 2 - 1).latent_dist.mean for part in as_images(real.pictures).split(64)])
        # A third each: as encoded; guessed back from noise; disturbed by white noise that no picture's latents have.
        guessed = np.arange(n) % 3 == 1
        time_steps = torch.from_numpy(rng.integers(1, 1000, n))
        captions = [text_of(c, b) for c, b in zip(real.concept, real.background, strict=True)]
        empty = model.text_encoder(tokens(tokenizer, [""])).last_hidden_state
        for part in np.array_split(np.flatnonzero(guessed), max(1, n // 192)):
            t = time_steps[part]
            alpha = alphas[t][:, None, None, None]
            noisy = alpha.sqrt() * latents[part] + (1 - alpha).sqrt() * torch.randn(
                latents[part].shape, generator=noise
            )
            context = model.text_encoder(tokens(tokenizer, [captions[i] for i in part])).last_hidden_state
            guidance = float(rng.uniform(1, 5))
            latents[part] = predict_clean(model, noisy, t, context, empty.expand_as(context), guidance=guidance)
        worth[guessed] -= 1.5 * (1 - alphas[time_steps].numpy()[guessed]) ** 0.5
        disturbed = np.flatnonzero(np.arange(n) % 3 == 2)
        size = rng.uniform(0, 1.2, len(disturbed))
        latents[disturbed] += torch.from_numpy(size).float()[:, None, None, None] * torch.randn(
            latents[disturbed].shape, generator=noise
        )
        worth[disturbed] -= 4 * size
        pool = Pool(pictures=decode(vae, latents), concept=real.concept, background=real.background, utility=worth)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **vars(pool))
        return pool

    def oracle(self, n: int) -> Oracle:
        """An oracle that learnt from real pictures and `n` constructed ones, whose labels are known."""
        return train_oracle(self.constructed(n), seed=self.seed)

    def sampled(self, oracle: Oracle, n: int) -> Pool:
        """The base model's own samples and the predicted clean pictures on the way, four of each of `n` chains."""
        path = CACHE / "pools" / f"sampled_{self.stage}_{self.seed}_{n}.npz"
        if path.exists():
            return Pool(**np.load(path))
        rng, alphas, parts = np.random.default_rng(self.seed), make_scheduler().alphas_cumprod, list[Pool]()
        vae, model = self.base()
        for number in range(max(1, n // 64)):
            concept = rng.choice(len(CONCEPTS), 64, p=concept_weights())
            background = np.where(rng.random(64) < 0.9, 0, rng.integers(1, len(NAMES), 64))
            guidance = float(rng.choice([1.5, 2.0, 3.0, 4.0, 5.0]))
            prompts = [text_of(c, b) for c, b in zip(concept, background, strict=True)]
            chain = sample(model, prompts, seed=self.seed * 1000 + number, guidance=guidance)
            for k in (*rng.choice(len(chain.times) - 1, 3, replace=False), None):
                pictures = decode(vae, chain.latents if k is None else chain.clean[k])
                worth = oracle_utility(oracle, pictures, concept, background)
                if k is not None:
                    worth = worth - 0.5 * float(1 - alphas[chain.times[k]]) ** 0.5
                parts.append(Pool(pictures=pictures, concept=concept, background=background, utility=worth))
        pool = concatenate(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **vars(pool))
        return pool


def train_oracle(pool: Pool, *, seed: int) -> Oracle:
    """Learns to read concept, background and utility from real and constructed pictures, whose labels are known."""
    torch.manual_seed(seed)
    oracle, path, steps = Oracle(), CACHE / f"oracle_{seed}.pt", ORACLE_STEPS
    if state := load(path):
        oracle.load_state_dict(state)
        return oracle.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(oracle.parameters(), 1.5e-3, weight_decay=0.02)
    losses = []
    for step in range(steps):
        rng = np.random.default_rng((seed, step))
        batch = concatenate(real_batch(rng, 32), pool[rng.choice(len(pool), 32)])
        set_lr(optimizer, 1.5e-3 * cosine(step, steps, warmup=100))
        concept, background, worth = oracle(as_images(batch.pictures))
        loss = (
            F.cross_entropy(concept, torch.from_numpy(batch.concept), label_smoothing=0.05)
            + 0.3 * F.cross_entropy(background, torch.from_numpy(batch.background))
            + F.smooth_l1_loss(worth, torch.from_numpy(batch.utility).float())
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        right = (concept.argmax(1) == torch.from_numpy(batch.concept)).float().mean()
        losses.append((loss.item(), right.item(), (worth - torch.from_numpy(batch.utility)).abs().mean().item()))
        if step % 250 == 249:
            print(
                f"oracle {step + 1}/{steps} loss, concept right, utility error: {np.mean(losses, 0).round(3)}",
                flush=True,
            )
            losses = []
    save(path, oracle.state_dict())
    return oracle.eval().requires_grad_(False)


@torch.no_grad()
def oracle_utility(oracle: Oracle, pictures: np.ndarray, concept: np.ndarray, background: np.ndarray) -> np.ndarray:
    """The utility of pictures for their captions: quality, less up to 5 nats for a wrong object, 1.5 for its ground."""
    outputs = [oracle(part) for part in as_images(pictures).split(256)]
    named = torch.cat([o[0] for o in outputs]).log_softmax(1).gather(1, torch.from_numpy(concept)[:, None])[:, 0]
    on = torch.cat([o[1] for o in outputs]).softmax(1).gather(1, torch.from_numpy(background)[:, None])[:, 0]
    worth = torch.cat([o[2] for o in outputs])
    # Sure of the object: no loss. The label smoothing leaves log-probabilities near -0.05 for a certain one.
    return (worth + (named + 0.2).clamp(-5, 0) - 1.5 * (1 - on)).numpy()
