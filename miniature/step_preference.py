"""`emoji_step_preference`: the preference model, taught to judge a noisy step by what it will become (SPO's idea).

Four chains of a prompt start from the same initial noise and draw their own noise afterwards. The preference between
two finished pictures, by `emoji_preference`, is the label of the two predicted clean pictures of those chains at every
time. The Bradley-Terry loss takes the labels as probabilities, sigmoid(gap of the finished pictures): expected clicks
rather than drawn ones. Training goes on from `emoji_preference`; its time condition begins at zero.

SPO labels by people and makes its noisy pictures from finished ones, by adding the same noise to both; chains of the
model itself are what the reward will meet. The rate is low on purpose: at 3e-4 for the CLIP model
only 89 % of finished pairs were called as its teacher does. About eight minutes on one core.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel

from miniature.concepts import CONCEPTS
from miniature.data import concept_weights
from miniature.diffusion import load_as_float32, load_exported, make_scheduler, tokens
from miniature.evaluate import load_reward
from miniature.place import ASSETS, CACHE, RESULTS, length
from miniature.pools import NAMES, as_images, decode, text_of
from miniature.rewards import MEAN, PREFERENCE, STD
from miniature.sampling import sample
from miniature.tokenizer import make_tokenizer
from miniature.training import cosine, load, save
from miniature.vae import CHANNELS
from tailorpo.rewards.step_preference import TIME_FILE, TimeCondition, timed_features

NAME = "emoji_step_preference"
GUIDANCE = 2.0
GROUPS, CHAINS = 16, 4
"""Groups of a shard, and chains of a group: one prompt, one initial noise."""
SHARDS, HELD_OUT = length(24, quick=2), length(6, quick=1)
SHOWN = 5
"""Times of a training group at which its predicted clean pictures are kept, besides the finished ones."""
STEPS = length(160)
BATCH = 24
"""Groups of a batch, each at one of its times."""
LR, TIME_LR = 3e-5, 3e-3
BUCKETS = {"901-701": (1, 5), "651-501": (6, 9), "451-251": (10, 14), "201-1": (15, 19)}
"""Steps by model time; at step 0 the chains of a group have not parted."""
PAIRS = torch.tensor(list(combinations(range(CHAINS), 2))).T


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Groups of chains.

    pictures: (GROUPS, times, CHAINS, 64, 64, 3) in uint8, the finished ones last.
    times: (GROUPS, times) of the model, 0 for the finished ones.
    worth: (GROUPS, CHAINS), the preference score of the finished pictures.
    """

    pictures: np.ndarray
    times: np.ndarray
    worth: np.ndarray
    ids: np.ndarray


def make_shard(number: int, *, seed: int, shown: int | None) -> Shard:
    """A shard of chains, from the cache where it is there already; `shown` None keeps all times after the first."""
    path = CACHE / "steps" / f"{seed}_{number}.npz"
    if path.exists():
        return Shard(**np.load(path))
    rng, noise = np.random.default_rng((seed, number)), torch.Generator().manual_seed(1000 * seed + number)
    vae, model = load_exported()
    concept = rng.choice(len(CONCEPTS), GROUPS, p=concept_weights())
    background = np.where(rng.random(GROUPS) < 0.9, 0, rng.integers(1, len(NAMES), GROUPS))
    prompts = [text_of(c, b) for c, b in zip(concept, background, strict=True)]
    each = [prompt for prompt in prompts for _ in range(CHAINS)]
    initial = torch.randn(GROUPS, CHANNELS, 8, 8, generator=noise).repeat_interleave(CHAINS, 0)
    chain = sample(model, each, seed=7000 * seed + number, guidance=GUIDANCE, start=(0, initial))
    later = np.arange(1, len(chain.times))
    steps = np.stack([later if shown is None else rng.choice(later, shown, replace=False) for _ in range(GROUPS)])
    clean = torch.stack([*chain.clean, chain.latents]).unflatten(1, (GROUPS, CHAINS))
    kept = np.concatenate([steps, np.full((GROUPS, 1), len(chain.times))], 1)
    latents = clean[torch.from_numpy(kept), torch.arange(GROUPS)[:, None]]
    pictures = decode(vae, latents.flatten(0, 2)).reshape(*latents.shape[:3], 64, 64, 3)
    ids = tokens(make_tokenizer(), prompts)
    with torch.no_grad():
        finished = as_images(pictures[:, -1].reshape(-1, 64, 64, 3))
        worth = plain_scores(load_reward(PREFERENCE.name), finished, ids.repeat_interleave(CHAINS, 0))
    shard = Shard(
        pictures=pictures,
        times=np.array([*chain.times, 0])[kept],
        worth=worth.view(GROUPS, CHAINS).numpy(),
        ids=ids.numpy(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **vars(shard))
    print(f"steps: shard {number} of seed {seed}", flush=True)
    return shard


def pixels(images: Tensor) -> Tensor:
    """Pictures in [0, 1] as the vision tower wants them."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return (images - mean) / std


def text_features(model: CLIPModel, ids: Tensor) -> Tensor:
    """Normalised features (B, D) of token ids."""
    return F.normalize(model.get_text_features(ids).pooler_output, dim=-1)


def plain_scores(model: CLIPModel, images: Tensor, ids: Tensor) -> Tensor:
    """What a preference model says of each picture under its own caption, (B,)."""
    features = F.normalize(model.get_image_features(pixels(images)).pooler_output, dim=-1)
    return model.logit_scale.exp() * (features * text_features(model, ids)).sum(-1)


class StepModel(nn.Module):
    """A preference model and its time condition as one module."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.clip = CLIPModel.from_pretrained(folder, dtype=torch.float32)
        self.condition = TimeCondition(self.clip.config.vision_config.hidden_size)

    def forward(self, images: Tensor, ids: Tensor, times: Tensor) -> Tensor:
        """The score of each picture (B, 3, 64, 64) in [0, 1] for its caption at its time (B,)."""
        shift, sharpness = self.condition(times.float())
        with torch.autocast("cpu", torch.bfloat16, enabled=self.training):
            features = timed_features(self.clip, pixels(images), shift)
        return (self.clip.logit_scale + sharpness).exp() * (features * text_features(self.clip, ids)).sum(-1)


def gaps(scores: Tensor) -> Tensor:
    """(groups, CHAINS) -> (groups, pairs): differences within a group."""
    return scores[:, PAIRS[0]] - scores[:, PAIRS[1]]


def train() -> None:
    """Trains into the cache."""
    path, checkpoint = CACHE / f"{NAME}.pt", CACHE / f"{NAME}_train.pt"
    if path.exists():
        return
    shards = [make_shard(number, seed=41, shown=SHOWN) for number in range(SHARDS)]
    pictures, times, worth, ids = (
        torch.from_numpy(np.concatenate([getattr(shard, key) for shard in shards]))
        for key in ("pictures", "times", "worth", "ids")
    )
    torch.manual_seed(41)
    model = StepModel(ASSETS / PREFERENCE.name).train()
    groups = [{"params": model.clip.parameters(), "lr": LR}, {"params": model.condition.parameters(), "lr": TIME_LR}]
    optimizer, start = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.02), 0
    if state := load(checkpoint):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    clock, losses = time.time(), list[float]()
    for step in range(start, STEPS):
        rng = torch.Generator().manual_seed(41_000_000 + step)
        chosen = torch.randint(len(times), (BATCH,), generator=rng)
        when = torch.randint(SHOWN + 1, (BATCH,), generator=rng)
        shown = as_images(pictures[chosen, when].flatten(0, 1).numpy())
        each = [x.repeat_interleave(CHAINS, 0) for x in (ids[chosen], times[chosen, when])]
        wanted = torch.sigmoid(gaps(worth[chosen]))
        loss = F.binary_cross_entropy_with_logits(gaps(model(shown, *each).view(BATCH, CHAINS)), wanted)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = cosine(step, STEPS, warmup=20)
        for group, lr in zip(optimizer.param_groups, (LR, TIME_LR), strict=True):
            group["lr"] = lr * factor
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() - F.binary_cross_entropy(wanted, wanted).item())
        if step % 20 == 19:
            excess, losses = np.mean(losses), []
            print(f"{NAME} {step + 1}/{STEPS} excess loss {excess:.4f} {time.time() - clock:.0f} s", flush=True)
            save(checkpoint, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
    save(path, model.state_dict())


def export() -> None:
    """Writes the CLIPModel as emoji_preference is written, fp16, and its time condition beside it."""
    model, folder = StepModel(ASSETS / PREFERENCE.name), ASSETS / NAME
    model.load_state_dict(load(CACHE / f"{NAME}.pt") or {})
    shutil.rmtree(folder, ignore_errors=True)
    model.clip.half().save_pretrained(folder)
    load_as_float32(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copyfile(ASSETS / PREFERENCE.name / file, folder / file)
    save_file(
        {key: value.half().contiguous() for key, value in model.condition.state_dict().items()}, folder / TIME_FILE
    )


def shipped() -> StepModel:
    """The model as it ships."""
    model = StepModel(ASSETS / NAME)
    condition = load_file(ASSETS / NAME / TIME_FILE)
    model.condition.load_state_dict({key: value.float() for key, value in condition.items()})
    return model.eval().requires_grad_(False)


def compare(aware: Tensor, plain: Tensor, wanted: Tensor) -> dict[str, object]:
    """Accuracy and loss of both models' gaps, (groups, pairs) each, against the gaps of the finished pictures.

    The interval of the difference of accuracies is a bootstrap over groups, whose pairs are not independent.
    """
    right = {name: (gap.sign() == wanted.sign()).float() for name, gap in (("aware", aware), ("plain", plain))}
    more = (right["aware"] - right["plain"]).mean(1)
    draws = torch.randint(len(more), (2000, len(more)), generator=torch.Generator().manual_seed(0))
    low, high = torch.quantile(more[draws].mean(1), torch.tensor([0.025, 0.975])).tolist()
    probability = torch.sigmoid(wanted)
    floor = F.binary_cross_entropy(probability, probability)
    return {
        **{f"accuracy_{name}": round(float(flags.mean()), 4) for name, flags in right.items()},
        "more": round(float(more.mean()), 4),
        "interval_95": [round(low, 4), round(high, 4)],
        **{
            f"excess_loss_{name}": round(float(F.binary_cross_entropy_with_logits(gap, probability) - floor), 4)
            for name, gap in (("aware", aware), ("plain", plain))
        },
        **{f"std_of_gap_{name}": round(float(gap.std()), 3) for name, gap in (("aware", aware), ("plain", plain))},
        "std_of_finished_gap": round(float(wanted.std()), 3),
        "groups": len(wanted),
        "pairs": wanted.numel(),
    }


@torch.no_grad()
def measure_buckets() -> dict[str, object]:
    """Both models on held-out groups of chains, by time; `finished` are the pictures the labels come from."""
    plain, aware = load_reward(PREFERENCE.name), shipped()
    columns: dict[str, list[Tensor]] = {"aware": [], "plain": [], "worth": []}
    for number in range(HELD_OUT):
        shard = make_shard(number, seed=42, shown=None)
        ids = torch.from_numpy(shard.ids).repeat_interleave(CHAINS, 0)
        scores: dict[str, list[Tensor]] = {"aware": [], "plain": []}
        for place in range(shard.times.shape[1]):
            images = as_images(shard.pictures[:, place].reshape(-1, 64, 64, 3))
            when = torch.from_numpy(shard.times[:, place]).repeat_interleave(CHAINS, 0)
            scores["aware"].append(aware(images, ids, when).view(-1, CHAINS))
            scores["plain"].append(plain_scores(plain, images, ids).view(-1, CHAINS))
        for name, values in scores.items():
            columns[name].append(gaps(torch.stack(values, 1).flatten(0, 1)).unflatten(0, (GROUPS, -1)))
        columns["worth"].append(gaps(torch.from_numpy(shard.worth)))
    first, second, wanted = (torch.cat(columns[name]) for name in ("aware", "plain", "worth"))

    def part(places: slice) -> dict[str, object]:
        shown = first[:, places]
        repeated = wanted[:, None].expand_as(shown)
        return compare(shown.flatten(1), second[:, places].flatten(1), repeated.flatten(1))

    # Place 0 is step 1.
    buckets = {name: part(slice(low - 1, high)) for name, (low, high) in BUCKETS.items()}
    return buckets | {"finished": part(slice(-1, None))}


@torch.no_grad()
def measure_siblings() -> dict[str, object]:
    """Both models on what SPO ranks: two candidates of one step, labelled by one future that shares its noise."""
    plain, aware, (vae, model) = load_reward(PREFERENCE.name), shipped(), load_exported()
    rng, found, alphas = torch.Generator().manual_seed(43), {}, make_scheduler().alphas_cumprod
    concept = np.random.default_rng(43).choice(len(CONCEPTS), length(160, quick=8), p=concept_weights())
    prompts = [CONCEPTS[c].prompt for c in concept]
    ids = tokens(make_tokenizer(), prompts)
    chain = sample(model, prompts, seed=430, guidance=GUIDANCE)
    for k in (4, 9, 14):
        alpha, before = alphas[chain.times[k]], alphas[chain.times[k + 1]]
        spread = ((1 - before) / (1 - alpha) * (1 - alpha / before)).sqrt()
        noise = (chain.noisy[k] - alpha.sqrt() * chain.clean[k]) / (1 - alpha).sqrt()
        mean = before.sqrt() * chain.clean[k] + (1 - before - spread**2).sqrt() * noise
        scores: dict[str, list[Tensor]] = {"aware": [], "plain": [], "worth": []}
        for _ in range(2):
            candidate = mean + spread * torch.randn(mean.shape, generator=rng)
            run = sample(model, prompts, seed=431, guidance=GUIDANCE, start=(k + 1, candidate))
            guess, end = (as_images(decode(vae, latents)) for latents in (run.clean[0], run.latents))
            scores["aware"].append(aware(guess, ids, torch.full((len(ids),), chain.times[k + 1])))
            scores["plain"].append(plain_scores(plain, guess, ids))
            scores["worth"].append(plain_scores(plain, end, ids))
        first, second, wanted = ((a - b)[:, None] for a, b in scores.values())
        found[str(chain.times[k + 1])] = compare(first, second, wanted)
    return found


def write(part: str, found: dict[str, object]) -> None:
    """Puts a part of the held-out comparison into the results, under this model's own key."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results[NAME] = results.get(NAME, {}) | {part: found}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(NAME, part, json.dumps(found), flush=True)


def train_step_preference() -> None:
    """Trains, exports and measures the step-aware preference model."""
    train()
    export()
    write("chains_of_one_noise", measure_buckets())
    write("siblings", measure_siblings())


if __name__ == "__main__":
    train_step_preference()
