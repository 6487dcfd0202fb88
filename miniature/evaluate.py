"""Measures the finished miniature and writes `results.json` and the sample grid of the documentation."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPModel

from miniature.concepts import CONCEPTS, STYLES
from miniature.data import DAMAGES, SIZE, Glyphs, draw, load_glyphs, random_glyph, sample_view
from miniature.diffusion import Denoiser, load_exported, make_scheduler, tokens
from miniature.place import ASSETS, PICTURE, RESULTS, length
from miniature.pools import Oracle, Source, as_images, decode, utility
from miniature.rewards import (
    JUDGE,
    PREFERENCE,
    scores,
)
from miniature.sampling import Trajectory, predict_clean, sample
from miniature.tiny_vae import load_tiny_vae
from miniature.tokenizer import make_tokenizer
from miniature.vae import pictures, psnr

GUIDANCE = 1.5
SCALES = (1.5, 2.0, 5.0)
REFEREE = Source(stage="final", seed=4)
"""Makes the oracle that neither reward model learnt from."""


def referee() -> Oracle:
    """The oracle that says what base samples show and how good they are."""
    return REFEREE.oracle(length(4000))


def interval(right: int, n: int) -> list[float]:
    """Wilson's 95 % interval of a share."""
    z, p = 1.96, right / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [round((centre - half) / (1 + z * z / n), 4), round((centre + half) / (1 + z * z / n), 4)]


def share(flags: Tensor) -> dict[str, float | int | list[float]]:
    """A share with its interval and count."""
    n, right = len(flags), int(flags.sum())
    return {"share": round(right / n, 4), "n": n, "interval_95": interval(right, n)}


def load_reward(name: str) -> CLIPModel:
    """A shipped reward model."""
    return CLIPModel.from_pretrained(ASSETS / name, dtype=torch.float32).eval().requires_grad_(False)


@torch.no_grad()
def score_table(model: CLIPModel, shown: np.ndarray) -> Tensor:
    """Scores of pictures under the plain captions of all concepts."""
    ids = tokens(make_tokenizer(), [c.prompt for c in CONCEPTS])
    return torch.cat([scores(model, part, ids) for part in as_images(shown).split(128)])


def plain_samples(model: Denoiser, *, guidance: float, each: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples of every concept's plain prompt, and their concepts."""
    vae, shown = load_exported()[0], []
    concept = np.repeat(np.arange(len(CONCEPTS)), each)
    for number, part in enumerate(np.array_split(concept, len(concept) // 64)):
        chain = sample(model, [CONCEPTS[c].prompt for c in part], seed=seed + number, guidance=guidance)
        shown.append(decode(vae, chain.latents))
    return np.concatenate(shown), concept


def threshold(judge: CLIPModel) -> dict[str, float]:
    """The judge's score from which a picture is called good: the best divide of clean and damaged held-out ones."""
    glyphs, rng = load_glyphs(), np.random.default_rng(77)
    views = [sample_view(rng, random_glyph(rng, glyphs), colour=0.0) for _ in range(2000)]
    shown = np.stack([draw(v, glyphs) for v in views])
    concept = np.array([glyphs.concept[v.glyph] for v in views])
    values = score_table(judge, shown)[torch.arange(len(views)), torch.from_numpy(concept)].numpy()
    clean = np.array([v.damage == "none" for v in views])
    candidates = np.quantile(values, np.linspace(0.02, 0.98, 97))
    balanced = [((values[clean] >= c).mean() + (values[~clean] < c).mean()) / 2 for c in candidates]
    best = int(np.argmax(balanced))
    found = {
        "threshold": round(float(candidates[best]), 3),
        "balanced_accuracy": round(float(balanced[best]), 4),
        "clean_called_good": round(float((values[clean] >= candidates[best]).mean()), 4),
        "damaged_called_good": round(float((values[~clean] >= candidates[best]).mean()), 4),
        "n": len(views),
    }
    for kind in DAMAGES:
        these = np.array([v.damage == kind for v in views])
        found[f"good_share_{kind}"] = round(float((values[these] >= candidates[best]).mean()), 3)
    return found


def reward_accuracy(model: CLIPModel) -> dict[str, object]:
    """Held-out accuracy of one reward: captions of real pictures, and pairs of one caption by source."""
    glyphs, rng = load_glyphs(), np.random.default_rng(78)
    views = [sample_view(rng, random_glyph(rng, glyphs), colour=0.0) for _ in range(1500)]
    real = np.stack([draw(v, glyphs) for v in views])
    concept = np.array([glyphs.concept[v.glyph] for v in views])
    table = score_table(model, real)
    clean = torch.tensor([v.damage == "none" for v in views])
    right = table.argmax(1) == torch.from_numpy(concept)
    found: dict[str, object] = {
        "captions_of_192_clean": share(right[clean]),
        "captions_of_192_all": share(right),
        "pairs_real": pair_accuracy(table, concept, np.array([utility(v) for v in views])),
    }
    for name, pool in {
        "pairs_constructed": Source(stage="final", seed=90).constructed(length(1500, quick=300)),
        "pairs_base_samples": Source(stage="final", seed=91).sampled(referee(), length(192, quick=64)),
    }.items():
        plain = pool.background == 0
        found[name] = pair_accuracy(score_table(model, pool.pictures[plain]), pool.concept[plain], pool.utility[plain])
    styles = torch.from_numpy(glyphs.style[[v.glyph for v in views]])
    own = table[torch.arange(len(views)), torch.from_numpy(concept)]
    found["mean_score_clean_by_style"] = {
        style: round(own[clean & (styles == s)].mean().item(), 2) for s, style in enumerate(STYLES)
    }
    return found


def pair_accuracy(table: Tensor, concept: np.ndarray, worth: np.ndarray) -> dict[str, object]:
    """How often the better of two pictures of one concept (by at least half a nat) scores higher."""
    rng, flags = np.random.default_rng(79), []
    for c in np.unique(concept):
        members = np.flatnonzero(concept == c)
        for _ in range(4 * len(members)):
            a, b = rng.choice(members, 2)
            if worth[a] - worth[b] > 0.5:
                flags.append(bool(table[a, c] > table[b, c]))
    return share(torch.tensor(flags))


def siblings(chain: Trajectory, k: int, rng: torch.Generator) -> list[Tensor]:
    """Two candidates of step k for every chain, from the Gaussian around what the chain's own latents predict."""
    alphas = make_scheduler().alphas_cumprod
    alpha, before = alphas[chain.times[k]], alphas[chain.times[k + 1]]
    spread = ((1 - before) / (1 - alpha) * (1 - alpha / before)).sqrt()
    noise = (chain.noisy[k] - alpha.sqrt() * chain.clean[k]) / (1 - alpha).sqrt()
    mean = before.sqrt() * chain.clean[k] + (1 - before - spread**2).sqrt() * noise
    return [mean + spread * torch.randn(mean.shape, generator=rng) for _ in range(2)]


@torch.no_grad()
def sibling_gaps(
    model: Denoiser, reward: CLIPModel, *, guidance: float, steps: tuple[int, ...], each: int
) -> dict[str, dict[str, float | int | list[float]]]:
    """Whether the reward of the predicted clean picture ranks two candidates of one step as their futures will.

    One pair a step in each of `each` chains of every animal. The true gap is the mean over three continuations that
    both candidates share the noise of; its own noise limits the correlation that could be seen.
    """
    vae, rng = load_exported()[0], torch.Generator().manual_seed(31)
    prompts = [c.prompt for c in CONCEPTS if c.group == "animal"][: length(45, quick=5)] * each
    ids, found, futures = tokens(make_tokenizer(), prompts), {}, 3
    chain = sample(model, prompts, seed=500, guidance=guidance)
    n = len(prompts)

    def value(latents: Tensor) -> Tensor:
        return scores(reward, as_images(decode(vae, latents)), ids).diagonal()

    for k in steps:
        pair = siblings(chain, k, rng)
        guessed, ends = [], []
        for candidate in pair:
            runs = [
                sample(model, prompts, seed=9000 + f, guidance=guidance, start=(k + 1, candidate))
                for f in range(futures)
            ]
            guessed.append(value(runs[0].clean[0]))
            ends.append(torch.stack([value(run.latents) for run in runs]))
        gap, true = guessed[0] - guessed[1], ends[0] - ends[1]
        r = float(torch.corrcoef(torch.stack([gap, true.mean(0)]))[0, 1])
        reach = 1.96 / math.sqrt(n - 3)  # Fisher's transformation
        found[str(k)] = {
            "time": chain.times[k],
            "correlation": round(r, 3),
            "interval_95": [round(math.tanh(math.atanh(r) + sign * reach), 3) for sign in (-1, 1)],
            "ranked_right": share(gap.sign() == true.mean(0).sign()),
            "std_of_guessed_gap": round(float(gap.std()), 4),
            "std_of_true_gap": round(float(true.mean(0).std()), 4),
            "noise_of_true_gap": round(float(true.var(0).mean().sqrt() / futures**0.5), 4),
            "n": n,
        }
        print(f"siblings, guidance {guidance}, step {k}: {found[str(k)]}", flush=True)
    return found


@torch.no_grad()
def draft_decoder(model: Denoiser) -> dict[str, object]:
    """How near the draft decoder comes to the full one on predicted clean pictures, and how often a ranking differs.

    Two candidates of every second step in two chains of every animal, ranked by the preference model.
    """
    full, tiny = load_exported()[0], load_tiny_vae()
    reward, rng = load_reward(PREFERENCE.name), torch.Generator().manual_seed(32)
    prompts = [c.prompt for c in CONCEPTS if c.group == "animal"][: length(45, quick=5)] * 2
    ids = tokens(make_tokenizer(), prompts)
    context = model.text_encoder(ids).last_hidden_state
    empty = model.text_encoder(tokens(make_tokenizer(), [""])).last_hidden_state.expand_as(context)
    chain, found = sample(model, prompts, seed=501, guidance=GUIDANCE), {}
    for k in range(0, 19, 2):
        gaps, errors = {"full": torch.zeros(len(prompts)), "tiny": torch.zeros(len(prompts))}, []
        for sign, candidate in zip((1, -1), siblings(chain, k, rng), strict=True):
            time_steps = torch.full((len(prompts),), chain.times[k + 1])
            guess = predict_clean(model, candidate, time_steps, context, empty, guidance=GUIDANCE)
            shown = {"full": full.decode(guess).sample.clamp(-1, 1), "tiny": tiny.decode(guess).sample.clamp(-1, 1)}
            for name, images in shown.items():
                gaps[name] += sign * scores(reward, images / 2 + 0.5, ids).diagonal()
            errors.append(((shown["full"] - shown["tiny"]) ** 2).mean((1, 2, 3)) / 4)
        found[str(k)] = {
            "time": chain.times[k],
            "psnr_to_full": round(float((-10 * torch.cat(errors).log10()).mean()), 2),
            "same_order": share(gaps["full"].sign() == gaps["tiny"].sign()),
            "correlation": round(float(torch.corrcoef(torch.stack(list(gaps.values())))[0, 1]), 3),
        }
    return found


def grid(shown: list[np.ndarray], path: Path, *, columns: int) -> None:
    """Saves blocks of pictures (each (n, 64, 64, 3), laid out in a row) as a grid with `columns` blocks across."""
    gap = np.full((SIZE, 8, 3), 255, np.uint8)
    blocks = [np.concatenate([*block, gap], axis=1) for block in shown]
    rows = [np.concatenate(blocks[i : i + columns], axis=1) for i in range(0, len(blocks), columns)]
    rows = [np.pad(r, ((0, 0), (0, rows[0].shape[1] - r.shape[1]), (0, 0)), constant_values=255) for r in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path, quality=80)


def grid_prompts() -> list[str]:
    """The 66 prompts a person is asked to recognise: 30 animals, 30 other things, 6 on coloured backgrounds."""
    rng = np.random.default_rng(66)
    animals = [c.prompt for c in CONCEPTS if "animal" in c.group]
    others = [c.prompt for c in CONCEPTS if "animal" not in c.group]
    plain = list(rng.choice(animals, 30, replace=False)) + list(rng.choice(others, 30, replace=False))
    coloured = ["blue", "green", "yellow", "red", "pink", "black"]
    return plain + [f"{p} on a {c} background" for p, c in zip(rng.choice(animals + others, 6), coloured, strict=True)]


def speed(model: Denoiser) -> dict[str, float]:
    """Seconds for eight pictures of 20 guided steps and their decoding, on one thread."""
    torch.set_num_threads(1)
    vae, seconds = load_exported()[0], []
    for seed in range(4):
        clock = time.perf_counter()
        chain = sample(model, ["a cat"] * 8, seed=seed, guidance=GUIDANCE)
        middle = time.perf_counter()
        decode(vae, chain.latents)
        seconds.append((middle - clock, time.perf_counter() - middle))
    sampling, decoding = np.median(seconds, 0).round(3)
    return {"sample_8_of_20_steps": float(sampling), "decode_8": float(decoding)}


@torch.no_grad()
def base_quality(
    model: Denoiser, judge: CLIPModel, preference: CLIPModel, good: float, *, guidance: float, each: int
) -> dict[str, object]:
    """Recognisability, share of good pictures and spread of the scores among plain samples at one guidance scale."""
    shown, concept = plain_samples(model, guidance=guidance, each=each, seed=100)
    index, truth = torch.arange(len(concept)), torch.from_numpy(concept)
    table, own = score_table(judge, shown), score_table(preference, shown)[index, truth]
    right, fine = table.argmax(1) == truth, table[index, truth] >= good
    oracle = referee()
    named = torch.cat([oracle(part)[0] for part in as_images(shown).split(256)]).argmax(1) == truth
    animals = torch.tensor(["animal" in CONCEPTS[c].group for c in concept])
    return {
        "judge_top1": share(right),
        "judge_top1_animals": share(right[animals]),
        "judge_top1_of_good": share(right[fine]),
        "oracle_top1": share(named),
        "oracle_top1_of_good": share(named[fine]),
        "good": share(fine),
        "good_animals": share(fine[animals]),
        "preference_std_within_prompt": round(own.view(-1, each).std(1).mean().item(), 3),
        "preference_std_between_prompts": round(own.view(-1, each).mean(1).std().item(), 3),
    }


def draw_grid(model: Denoiser) -> list[str]:
    """Draws the documentation's picture; returns its prompts in reading order."""
    prompts = grid_prompts()
    chain = sample(model, [p for p in prompts for _ in range(4)], seed=66, guidance=GUIDANCE)
    shown = decode(load_exported()[0], chain.latents).reshape(len(prompts), 4, SIZE, SIZE, 3)
    grid(list(shown), PICTURE, columns=6)
    return prompts


def measure_good() -> dict[str, float]:
    """The judge's threshold, also written beside the judge."""
    quality = threshold(load_reward(JUDGE.name))
    (ASSETS / JUDGE.name / "quality.json").write_text(json.dumps(quality, indent=1) + "\n", encoding="utf-8")
    return quality


def measure_base(model: Denoiser) -> dict[str, object]:
    """The base model at every guidance scale."""
    judge, preference = load_reward(JUDGE.name), load_reward(PREFERENCE.name)
    good = json.loads((ASSETS / JUDGE.name / "quality.json").read_text(encoding="utf-8"))["threshold"]
    return {str(g): base_quality(model, judge, preference, good, guidance=g, each=2) for g in SCALES}


def measure_siblings(model: Denoiser) -> dict[str, object]:
    """The step reward's ranking at every guidance scale."""
    preference = load_reward(PREFERENCE.name)
    gaps = {
        str(g): sibling_gaps(model, preference, guidance=g, steps=(0, 4, 8, 14), each=1)
        for g in SCALES
        if g != GUIDANCE
    }
    every = tuple(range(length(19, quick=2)))
    return gaps | {str(GUIDANCE): sibling_gaps(model, preference, guidance=GUIDANCE, steps=every, each=2)}


def evaluate(*parts: str) -> None:
    """Measures the named parts, or all of them, and merges them into the results; about ten minutes on one core."""
    model, glyphs = load_exported()[1], load_glyphs()
    measures: dict[str, Callable[[], object]] = {
        "psnr_clean": lambda: measure_psnr(glyphs, clean=1.0),
        "psnr_all": lambda: measure_psnr(glyphs, clean=0.0),
        "grid_prompts": lambda: draw_grid(model),
        "seconds": lambda: speed(model),
        PREFERENCE.name: lambda: reward_accuracy(load_reward(PREFERENCE.name)),
        "siblings": lambda: measure_siblings(model),
        "good": measure_good,
        JUDGE.name: lambda: reward_accuracy(load_reward(JUDGE.name)),
        "base": lambda: measure_base(model),
        "tiny_vae": lambda: draft_decoder(model),
    }
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in parts or measures:
        results[name] = measures[name]()
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(results[name]), flush=True)


def measure_psnr(glyphs: Glyphs, *, clean: float) -> float:
    """The autoencoder's PSNR on renders it was not trained on, all or none of them surely clean."""
    return round(psnr(load_exported()[0], pictures(np.random.default_rng(99), glyphs, 512, clean=clean)), 2)


if __name__ == "__main__":
    evaluate(*sys.argv[1:])
