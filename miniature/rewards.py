"""The two reward models, `emoji_preference` and `emoji_judge`: small CLIP models, score = exp(logit_scale) * cosine.

Trained to match captions and, with a Bradley-Terry loss, to prefer the better picture of a caption. Where pictures and
their utilities come from: `pools.py`. Preferences are drawn from the utilities and a tenth of them is flipped, as
people's clicks would be. The judge shares no picture, no oracle and no weight with the preference model.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from miniature.concepts import CONCEPTS
from miniature.data import SIZE, concept_weights, draw, load_glyphs, sample_view
from miniature.diffusion import load_as_float32, tokens
from miniature.muon import Muon
from miniature.place import ASSETS, CACHE, length
from miniature.pools import NAMES, Pool, Source, as_images, concatenate, fake, text_of, utility
from miniature.tokenizer import LENGTH, make_tokenizer
from miniature.training import cosine, load, save, set_lr

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
FLIPPED = 0.1
ADAM_LR, LR = 1.5e-3, 2e-3
PATCH = 8
PROMPTS = 24
"""Captions in a batch."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the training: the pictures it shows besides real ones, and whether it shows pictures that fool it."""

    source: Source
    steps: int
    constructed: int
    chains: int
    adversarial: bool


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What makes the two models independent of one another. Every stage also shows the pictures of those before it.

    pictures: compared under each caption of a batch.
    others: captions of other objects in a batch.
    match: weight of caption matching.
    jitter: of brightness and of the channels' balance, relative.
    """

    name: str
    seed: int
    width: int
    layers: int
    pictures: int
    others: int
    match: float
    jitter: float
    stages: tuple[Stage, ...]

    def pool(self, number: int) -> Pool:
        """All pictures of a stage and of those before it, judged by the oracle of the first."""
        shown = self.stages[: number + 1]
        oracle = shown[0].source.oracle(shown[0].constructed)
        pools = [(s.source.constructed(s.constructed), s.source.sampled(oracle, s.chains)) for s in shown]
        return concatenate(*(pool for pair in pools for pool in pair))


PREFERENCE = Recipe(
    name="emoji_preference",
    seed=11,
    width=128,
    layers=4,
    pictures=3,
    others=48,
    match=0.5,
    jitter=0.0,
    stages=(
        Stage(
            source=Source(stage="early", seed=1),
            steps=length(700),
            constructed=length(3000),
            chains=length(256),
            adversarial=False,
        ),
        Stage(
            source=Source(stage="final", seed=2),
            steps=length(1150),
            constructed=length(3000),
            chains=length(512),
            adversarial=True,
        ),
    ),
)
JUDGE = Recipe(
    name="emoji_judge",
    seed=23,
    width=160,
    layers=3,
    pictures=4,
    others=len(CONCEPTS) - PROMPTS,
    match=1.0,
    jitter=0.08,
    stages=(
        Stage(
            source=Source(stage="final", seed=3),
            steps=length(4000),
            constructed=length(4000),
            chains=length(1024),
            adversarial=True,
        ),
    ),
)


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
        "patch_size": PATCH,
        "projection_dim": projection,
    }
    return CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection, logit_scale_init_value=2.5)
    )


def scores(model: CLIPModel, images: Tensor, ids: Tensor) -> Tensor:
    """The score of every image for every caption, (images, captions); images in [0, 1]."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    with torch.autocast("cpu", torch.bfloat16, enabled=model.training):  # the text side is too small to gain from it
        features = model.get_image_features((images - mean) / std).pooler_output
    pictures = F.normalize(features.float(), dim=-1)
    texts = F.normalize(model.get_text_features(ids).pooler_output, dim=-1)
    return model.logit_scale.exp() * pictures @ texts.T


@dataclass(frozen=True, kw_only=True)
class Batch:
    """`PROMPTS` captions followed by wrong ones, and the recipe's number of pictures a prompt in the same order.

    Shapes: images (PROMPTS * pictures, 3, 64, 64) in [0, 1]; utility (PROMPTS, pictures) in nats.
    """

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
        rng, recipe = np.random.default_rng((self.recipe.seed, seed)), self.recipe
        concepts = rng.choice(len(CONCEPTS), PROMPTS, replace=False, p=concept_weights())
        backgrounds = np.where(rng.random(PROMPTS) < 0.75, 0, rng.integers(1, len(NAMES), PROMPTS))
        asked = list(zip(concepts, backgrounds, strict=True))
        shown = [self.picture(rng, c, b) for c, b in asked for _ in range(recipe.pictures)]
        elsewhere = (backgrounds + rng.integers(1, len(NAMES), PROMPTS)) % len(NAMES)
        absent = rng.permutation(np.setdiff1d(np.arange(len(CONCEPTS)), concepts))[: recipe.others]
        captions = [text_of(c, b) for c, b in (*asked, *zip(concepts, elsewhere, strict=True))]
        captions += [text_of(c, 0) for c in absent]
        images = as_images(np.stack([picture for picture, _ in shown]))
        if recipe.jitter:
            gain = 1 + recipe.jitter * torch.from_numpy(rng.uniform(-1, 1, (len(images), 3, 1, 1))).float()
            images = (images * gain).clamp(0, 1)
        worth = torch.tensor([w for _, w in shown]).view(PROMPTS, recipe.pictures)
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


def preference_loss(
    model: CLIPModel, batch: Batch, rng: torch.Generator, *, match: float, adversarial: bool
) -> dict[str, Tensor]:
    """Caption matching, and Bradley-Terry among the pictures of a caption, against other objects, and against fakes."""
    table, worth, each = scores(model, batch.images, batch.ids), batch.utility, batch.utility.shape[1]
    own = torch.arange(PROMPTS).repeat_interleave(each)
    # A picture that shows next to nothing cannot be asked for its caption.
    weight = torch.sigmoid(worth.flatten() + 3.5)
    matching = (F.cross_entropy(table, own, reduction="none") * weight).mean()
    of_own = table[torch.arange(len(own)), own].view(PROMPTS, each)
    among = bradley_terry(of_own - of_own.roll(1, 1), worth - worth.roll(1, 1), rng)
    shift = int(torch.randint(1, PROMPTS, (1,), generator=rng))
    other = table.view(PROMPTS, each, -1).roll(shift, 0)[torch.arange(PROMPTS), :, torch.arange(PROMPTS)]
    against = bradley_terry(of_own - other, worth - (-5 + 0.2 * worth.roll(shift, 0)), rng)
    losses = {"match": match * matching, "among": 2.0 * among, "against": against}
    if adversarial:
        chosen = torch.randperm(PROMPTS, generator=rng)[:12]
        images, size = batch.images[chosen * each], 0.01 + 0.07 * torch.rand(len(chosen), generator=rng)
        fakes = fooled(model, images, batch.ids[chosen], size)
        gap = of_own[chosen, 0] - scores(model, fakes, batch.ids[chosen]).diagonal()
        losses["fooled"] = 0.5 * F.softplus(-gap * 2).mean()
    return losses


def train_reward(recipe: Recipe, number: int) -> None:
    """Trains one stage of one model, on from the stage before it, into the cache."""
    stage, path = recipe.stages[number], CACHE / f"{recipe.name}_{number}.pt"
    if path.exists():
        return
    torch.manual_seed(recipe.seed)
    model, batches, steps = make_clip(recipe), Batches(recipe.pool(number), recipe), stage.steps
    if number:
        model.load_state_dict(load(CACHE / f"{recipe.name}_{number - 1}.pt") or {})
    inner = [p for n, p in model.named_parameters() if "encoder.layers" in n and p.ndim == 2]
    rest = [p for n, p in model.named_parameters() if not ("encoder.layers" in n and p.ndim == 2)]
    adam = torch.optim.AdamW(rest, ADAM_LR, betas=(0.9, 0.98), weight_decay=0.02)
    optimizers = {adam: ADAM_LR, Muon(inner, LR, weight_decay=0.02): LR}
    start, clock, history = 0, time.time(), list[list[float]]()
    checkpoint = CACHE / f"{recipe.name}_{number}_train.pt"
    if state := load(checkpoint):
        model.load_state_dict(state["model"])
        for optimizer, values in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        start = state["step"]
    for step in range(start, steps):
        rng = torch.Generator().manual_seed(recipe.seed * 1_000_000 + 100_000 * number + step)
        losses = preference_loss(
            model, batches.draw(100_000 * number + step), rng, match=recipe.match, adversarial=stage.adversarial
        )
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
            means, history = np.mean(history, 0).round(3), []
            print(
                f"{recipe.name} {step + 1}/{steps} match among against {means} {time.time() - clock:.0f} s", flush=True
            )
        if step % 300 == 299:
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step + 1}
            save(checkpoint, state)
    save(path, model.state_dict())


def export_reward(recipe: Recipe) -> None:
    """Writes the model of a recipe's last stage with its tokenizer and preprocessing note, fp16."""
    model, folder = make_clip(recipe), ASSETS / recipe.name
    model.load_state_dict(load(CACHE / f"{recipe.name}_{len(recipe.stages) - 1}.pt") or {})
    shutil.rmtree(folder, ignore_errors=True)
    model.half().save_pretrained(folder)
    load_as_float32(folder)
    make_tokenizer().save_pretrained(folder)
    note = {"image_mean": MEAN, "image_std": STD, "size": {"height": SIZE, "width": SIZE}, "do_resize": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def train_rewards(recipe: Recipe) -> None:
    """Trains one reward model, stage after stage, and exports it."""
    for number in range(len(recipe.stages)):
        train_reward(recipe, number)
    export_reward(recipe)


if __name__ == "__main__":
    train_rewards({"preference": PREFERENCE, "judge": JUDGE}[sys.argv[1]])
