"""The two reward models, `emoji_preference` and `emoji_judge`: small CLIP models, score = exp(logit_scale) * cosine.

Where the labels come from. Every picture has a *utility*, in nats of a Bradley-Terry preference:

- real pictures, their reconstructions, and predicted clean pictures made by noising a real picture's latents to some
  time and letting the base model guess it back: known by construction, from the damage, the caption, and the time;
- the base model's own samples and the predicted clean pictures along their trajectories: judged by an *oracle*, a
  convolutional network that learnt concept and damage from real pictures and the guesses above, never shipped;
- fakes that a policy might be pushed to (noise patterns, flat colours, oversaturation, disturbed latents, another
  object): low.

Preferences are drawn from the utilities and a tenth of them is flipped, as people's clicks would be.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from miniature.concepts import BACKGROUNDS, CONCEPTS
from miniature.data import CACHE, SIZE, View, concept_weights, draw, load_glyphs, random_glyph, sample_view
from miniature.diffusion import ASSETS, load_as_float32, load_denoiser, load_latents, make_scheduler, tokens
from miniature.muon import Muon
from miniature.sampling import predict_clean, sample
from miniature.tokenizer import LENGTH, make_tokenizer
from miniature.training import cosine, load, save, set_lr
from miniature.vae import load_vae

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
FLIPPED = 0.1
ADAM_LR, LR = 1.5e-3, 2e-3
STAGES = ("early", "final")
MODELS = {"early": "diffusion_early", "final": "diffusion"}
"""The base model that a stage's pictures come from."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What makes the two models independent of one another."""

    name: str
    seed: int
    width: int
    layers: int
    patch: int
    steps: dict[str, int]
    parity: int
    jitter: float


PREFERENCE = Recipe(
    name="emoji_preference",
    seed=11,
    width=128,
    layers=4,
    patch=8,
    steps={"early": 700, "final": 1150},
    parity=0,
    jitter=0.0,
)
JUDGE = Recipe(
    name="emoji_judge",
    seed=23,
    width=160,
    layers=3,
    patch=16,
    steps={"early": 700, "final": 900},
    parity=1,
    jitter=0.08,
)


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

    def split(self, parity: int) -> Pool:
        """Every second picture: the two models never share one."""
        return Pool(**{key: value[parity::2] for key, value in vars(self).items()})


def concatenate(*pools: Pool) -> Pool:
    """One pool of several."""
    return Pool(**{key: np.concatenate([getattr(p, key) for p in pools]) for key in vars(pools[0])})


NAMES = [None, *BACKGROUNDS]


def text_of(concept: int, background: int) -> str:
    """The caption of a concept on a background (0 is plain)."""
    colour = NAMES[background]
    return CONCEPTS[concept].prompt + (f" on a {colour} background" if colour else "")


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> np.ndarray:
    """Pictures of latents in uint8."""
    parts = [vae.decode(part).sample for part in latents.float().split(64)]
    return ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5 + 0.5).byte().permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def constructed_pool(stage: str, *, n: int, seed: int) -> Pool:
    """Pictures of known utility: reconstructions, guesses of the model from noised latents, and disturbed latents."""
    path = CACHE / "pools" / f"constructed_{stage}_{seed}.npz"
    if not path.exists():
        data, glyphs, vae, model = load_latents(), load_glyphs(), load_vae(polished=True), load_denoiser(MODELS[stage])
        rng, tokenizer, noise = np.random.default_rng(seed), make_tokenizer(), torch.Generator().manual_seed(seed)
        alphas = make_scheduler().alphas_cumprod
        index = rng.choice(len(data.views), n, replace=False)
        views = [data.views[i] for i in index]
        concept = np.array([glyphs.concept[v.glyph] for v in views])
        background = np.array([NAMES.index(v.background) for v in views])
        worth = np.array([utility(v) for v in views])
        latents = data.means[index].float()
        # A third each: as encoded; guessed back from noise; disturbed by white noise that no picture's latents have.
        guessed = np.arange(n) % 3 == 1
        time_steps = torch.from_numpy(rng.integers(1, 1000, n))
        captions = [text_of(c, b) for c, b in zip(concept, background, strict=True)]
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
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, pictures=decode(vae, latents), concept=concept, background=background, utility=worth)
    return Pool(**np.load(path))


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


def as_images(pictures: np.ndarray) -> Tensor:
    """Pictures as float images (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


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


def pick(pool: Pool, index: np.ndarray) -> Pool:
    """Some pictures of a pool."""
    return Pool(**{key: value[index] for key, value in vars(pool).items()})


def train_oracle(pool: Pool, *, steps: int = 1200) -> Oracle:
    """Learns to read concept, background and utility from real and constructed pictures, whose labels are known."""
    oracle, path = Oracle(), CACHE / "oracle.pt"
    if state := load(path):
        oracle.load_state_dict(state)
        return oracle.eval().requires_grad_(False)
    torch.manual_seed(5)
    optimizer = torch.optim.AdamW(oracle.parameters(), 1.5e-3, weight_decay=0.02)
    losses = []
    for step in range(steps):
        rng = np.random.default_rng((5, step))
        batch = concatenate(real_batch(rng, 32), pick(pool, rng.choice(len(pool.utility), 32)))
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


def sampled_pool(stage: str, oracle: Oracle, *, n: int, seed: int) -> Pool:
    """The base model's own samples and the predicted clean pictures on the way, judged by the oracle."""
    path = CACHE / "pools" / f"sampled_{stage}_{seed}.npz"
    if not path.exists():
        vae, model, rng = load_vae(polished=True), load_denoiser(MODELS[stage]), np.random.default_rng(seed)
        parts: list[Pool] = []
        for number in range(n // 64):
            concept = rng.choice(len(CONCEPTS), 64, p=concept_weights())
            background = np.where(rng.random(64) < 0.9, 0, rng.integers(1, len(NAMES), 64))
            guidance = float(rng.choice([1.5, 2.0, 3.0, 4.0, 5.0]))
            prompts = [text_of(c, b) for c, b in zip(concept, background, strict=True)]
            chain = sample(model, prompts, seed=seed * 1000 + number, guidance=guidance)
            alphas = make_scheduler().alphas_cumprod
            for k in (*rng.choice(len(chain.times) - 1, 3, replace=False), None):
                pictures = decode(vae, chain.latents if k is None else chain.clean[k])
                worth = oracle_utility(oracle, pictures, concept, background)
                if k is not None:
                    worth = worth - 0.5 * float(1 - alphas[chain.times[k]]) ** 0.5
                parts.append(Pool(pictures=pictures, concept=concept, background=background, utility=worth))
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **vars(concatenate(*parts)))
    return Pool(**np.load(path))


def make_clip(recipe: Recipe) -> CLIPModel:
    """An untrained CLIP model of about a million parameters."""
    tokenizer, projection = make_tokenizer(), 96
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        "projection_dim": projection,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": recipe.width,
        "intermediate_size": 3 * recipe.width,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": recipe.patch,
        "projection_dim": projection,
    }
    return CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection, logit_scale_init_value=2.5)
    )


def scores(model: CLIPModel, images: Tensor, ids: Tensor) -> Tensor:
    """The score of every image for every caption, (images, captions); images in [0, 1]."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    pictures = F.normalize(model.get_image_features((images - mean) / std).pooler_output, dim=-1)
    texts = F.normalize(model.get_text_features(ids).pooler_output, dim=-1)
    return model.logit_scale.exp() * pictures @ texts.T


PROMPTS, PICTURES = 24, 3
"""Captions in a batch, and pictures compared under each."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """`PROMPTS` captions followed by wrong ones, and `PICTURES` pictures a prompt in the order of the prompts."""

    images: Tensor
    ids: Tensor
    utility: Tensor


class Batches:
    """Draws batches of comparisons from real pictures and a pool."""

    def __init__(self, pool: Pool, recipe: Recipe) -> None:
        self.pool, self.recipe, self.tokenizer, self.glyphs = pool, recipe, make_tokenizer(), load_glyphs()
        self.members: dict[tuple[int, int], list[int]] = {}
        for i, key in enumerate(zip(pool.concept.tolist(), pool.background.tolist(), strict=True)):
            self.members.setdefault(key, []).append(i)

    def picture(self, rng: np.random.Generator, concept: int, background: int) -> tuple[np.ndarray, float]:
        """One picture for a caption and its utility."""
        members = self.members.get((concept, background))
        if members and rng.random() < 0.5:
            i = int(rng.choice(members))
            picture, worth = self.pool.pictures[i], float(self.pool.utility[i])
        else:
            view = sample_view(
                rng, int(rng.choice(self.glyphs.of(concept))), damage="none" if rng.random() < 0.2 else None
            )
            wrong = rng.random() < 0.1
            shown = int(rng.integers(len(NAMES))) if wrong else background
            view = replace(view, background=NAMES[shown])
            picture, worth = draw(view, self.glyphs), utility(view) - (1.5 if shown != background else 0.0)
        if rng.random() < 0.1:
            picture, cost = fake(rng, picture)
            worth += cost
        return picture, worth

    def draw(self, seed: int) -> Batch:
        """The batch of a seed, always the same."""
        rng = np.random.default_rng((self.recipe.seed, seed))
        concepts = rng.choice(len(CONCEPTS), PROMPTS, replace=False, p=concept_weights())
        backgrounds = np.where(rng.random(PROMPTS) < 0.75, 0, rng.integers(1, len(NAMES), PROMPTS))
        shown = [self.picture(rng, c, b) for c, b in zip(concepts, backgrounds, strict=True) for _ in range(PICTURES)]
        captions = [text_of(c, b) for c, b in zip(concepts, backgrounds, strict=True)]
        captions += [
            text_of(c, b)
            for c, b in zip(concepts, (backgrounds + rng.integers(1, len(NAMES), PROMPTS)) % len(NAMES), strict=True)
        ]
        captions += [text_of(c, 0) for c in rng.permutation(np.setdiff1d(np.arange(len(CONCEPTS)), concepts))[:48]]
        images = as_images(np.stack([picture for picture, _ in shown]))
        if self.recipe.jitter:
            # Slight changes of brightness and of the channels' balance, which only the judge learns to overlook.
            gain = 1 + self.recipe.jitter * torch.from_numpy(rng.uniform(-1, 1, (len(images), 3, 1, 1))).float()
            images = (images * gain).clamp(0, 1)
        worth = torch.tensor([w for _, w in shown])
        return Batch(images=images, ids=tokens(self.tokenizer, captions), utility=worth)


def bradley_terry(gap: Tensor, utility_gap: Tensor, rng: torch.Generator) -> Tensor:
    """The negative log-likelihood of clicks drawn from the utilities, a tenth of them flipped."""
    wins = torch.rand(gap.shape, generator=rng) < torch.sigmoid(1.5 * utility_gap)
    wins ^= torch.rand(gap.shape, generator=rng) < FLIPPED
    return F.softplus(torch.where(wins, -gap, gap)).mean()


def fooled(model: CLIPModel, images: Tensor, ids: Tensor, size: Tensor) -> Tensor:
    """Images moved up the model's own score by a step of root mean square `size`."""
    images = images.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(scores(model, images, ids).diagonal().sum(), images)
    rms = gradient.square().mean((1, 2, 3), keepdim=True).sqrt() + 1e-12
    return (images + size[:, None, None, None] * gradient / rms).detach().clamp(0, 1)


def preference_loss(model: CLIPModel, batch: Batch, rng: torch.Generator, *, adversarial: bool) -> dict[str, Tensor]:
    """Caption matching, and Bradley-Terry among the pictures of a caption, against other objects, and against fakes."""
    table = scores(model, batch.images, batch.ids)
    own = torch.arange(PROMPTS).repeat_interleave(PICTURES)
    # A picture that shows next to nothing cannot be asked for its caption.
    weight = torch.sigmoid(batch.utility + 3.5)
    match = (F.cross_entropy(table, own, reduction="none") * weight).mean()
    of_own = table[torch.arange(len(own)), own].view(PROMPTS, PICTURES)
    worth = batch.utility.view(PROMPTS, PICTURES)
    among = bradley_terry(of_own - of_own.roll(1, 1), worth - worth.roll(1, 1), rng)
    shift = int(torch.randint(1, PROMPTS, (1,), generator=rng))
    other = table.view(PROMPTS, PICTURES, -1).roll(shift, 0)[torch.arange(PROMPTS), :, torch.arange(PROMPTS)]
    against = bradley_terry(of_own - other, worth - (-5 + 0.2 * worth.roll(shift, 0)), rng)
    losses = {"match": 0.5 * match, "among": 2.0 * among, "against": against}
    if adversarial:
        chosen = torch.randperm(PROMPTS, generator=rng)[:12]
        images, size = batch.images[chosen * PICTURES], 0.01 + 0.07 * torch.rand(len(chosen), generator=rng)
        fakes = fooled(model, images, batch.ids[chosen], size)
        gap = of_own[chosen, 0] - scores(model, fakes, batch.ids[chosen]).diagonal()
        losses["fooled"] = 0.5 * F.softplus(-gap * 2).mean()
    return losses


def train_reward(recipe: Recipe, pool: Pool, *, stage: str) -> CLIPModel:
    """Trains one model: caption matching with Bradley-Terry throughout; the final stage adds pictures that fool it."""
    path = CACHE / f"{recipe.name}_{stage}.pt"
    torch.manual_seed(recipe.seed)
    model, batches = make_clip(recipe), Batches(pool.split(recipe.parity), recipe)
    if state := load(path):
        model.load_state_dict(state)
        return model.eval().requires_grad_(False)
    number = STAGES.index(stage)
    if number:
        model.load_state_dict(load(CACHE / f"{recipe.name}_{STAGES[number - 1]}.pt") or {})
    steps = recipe.steps[stage]
    inner = [p for n, p in model.named_parameters() if "encoder.layers" in n and p.ndim == 2]
    rest = [p for n, p in model.named_parameters() if not ("encoder.layers" in n and p.ndim == 2)]
    adam = torch.optim.AdamW(rest, ADAM_LR, betas=(0.9, 0.98), weight_decay=0.02)
    optimizers = {adam: ADAM_LR, Muon(inner, LR, weight_decay=0.02): LR}
    start, clock, history = 0, time.time(), []
    checkpoint = CACHE / f"{recipe.name}_{stage}_train.pt"
    if state := load(checkpoint):
        model.load_state_dict(state["model"])
        for optimizer, values in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        start = state["step"]
    for step in range(start, steps):
        rng = torch.Generator().manual_seed(recipe.seed * 1_000_000 + 100_000 * number + step)
        losses = preference_loss(model, batches.draw(100_000 * number + step), rng, adversarial=number > 0)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, lr in optimizers.items():
            set_lr(optimizer, lr * cosine(step, steps, warmup=60))
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(max=3.4)
        history.append([losses[key].item() for key in ("match", "among", "against")])
        if step % 100 == 99:
            means = np.mean(history, 0).round(3)
            history = []
            print(
                f"{recipe.name} {step + 1}/{steps} match among against {means} {time.time() - clock:.0f} s", flush=True
            )
        if step % 300 == 299:
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step + 1}
            save(checkpoint, state)
    save(path, model.state_dict())
    return model.eval().requires_grad_(False)


def export_reward(recipe: Recipe, model: CLIPModel) -> None:
    """Writes a model with its tokenizer and preprocessing note, fp16."""
    folder = ASSETS / recipe.name
    shutil.rmtree(folder, ignore_errors=True)
    model.half().save_pretrained(folder)
    load_as_float32(folder)
    make_tokenizer().save_pretrained(folder)
    note = {"image_mean": MEAN, "image_std": STD, "size": {"height": SIZE, "width": SIZE}, "do_resize": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    model.float()


def pools(stage: str) -> tuple[Pool, Oracle]:
    """All pictures of a stage: "early" shows a half-trained base model, later ones add the finished one."""
    known = constructed_pool("early", n=6000, seed=1)
    oracle = train_oracle(known)
    pool = concatenate(known, sampled_pool("early", oracle, n=512, seed=1))
    if stage != "early":
        later = constructed_pool("final", n=6000, seed=2)
        pool = concatenate(pool, later, sampled_pool("final", oracle, n=1024, seed=2))
    return pool, oracle


def train_rewards(recipe: Recipe, stage: str) -> None:
    """Trains one reward model up to a stage and exports it."""
    pool, _ = pools(stage)
    export_reward(recipe, train_reward(recipe, pool, stage=stage))


if __name__ == "__main__":
    train_rewards({"preference": PREFERENCE, "judge": JUDGE}[sys.argv[1]], sys.argv[2])
