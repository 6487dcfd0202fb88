"""Fabricates run directories for the tests of the report: every file a run leaves, without a model or a training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from tailorpo.statistics import compare, plain

RUN_YAML = """\
seed: 0
updates: {updates}
checkpoint_every: 10
model:
  family: sd
  path: emoji
  lora: {{rank: 8, alpha: null, targets: attention+conv}}
sampler: {{name: ddim, steps: 20, eta: 1.0, guidance_scale: 1.5}}
algorithm:
  name: tailorpo
  beta: 0.1
  train_steps: 5
  guidance: {{form: sigma, k: 1.0}}
reward: {{name: emoji_preference, weight: 1.0}}
prompts: {{name: animals}}
batch: {{trajectories: 8, micro: 8}}
"""

SEEN = ("a cat", "a red apple on a blue background", "a dog", "a fish", "a bee", "a bear", "a monkey", "a whale")
UNSEEN = ("a snail", "an octopus", "a lobster", "a crocodile")


def draw(seed: int, *, quality: float, size: int = 64) -> Image.Image:
    """A face on a ground: crisp and large for quality 1, blurred, faded and small for quality 0."""
    rng = np.random.default_rng(seed)
    scale = 4 if size <= 64 else 1
    ground = tuple(int(v) for v in rng.integers(225, 256, 3))
    image = Image.new("RGB", (size * scale, size * scale), ground)
    pen = ImageDraw.Draw(image)
    radius = size * scale * (0.2 + 0.24 * quality)
    x, y = (size * scale / 2 + (1 - quality) * size * scale * rng.uniform(-0.25, 0.25) for _ in range(2))
    colour = tuple(int(v * (0.4 + 0.6 * quality) + 235 * 0.6 * (1 - quality)) for v in rng.integers(40, 250, 3))
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    for side in (-1, 1):
        eye = (x + side * radius * 0.4, y - radius * 0.2)
        pen.ellipse([v - radius * 0.12 for v in eye] + [v + radius * 0.12 for v in eye], fill=(40, 30, 30))
    pen.arc((x - radius * 0.5, y - radius * 0.3, x + radius * 0.5, y + radius * 0.6), 20, 160, (40, 30, 30), scale * 2)
    small = image.resize((size, size), Image.Resampling.LANCZOS)
    return small.filter(ImageFilter.GaussianBlur(2.5 * (1 - quality)))


def fabricate(
    folder: Path,
    *,
    updates: int = 60,
    target: int | None = None,
    seen: tuple[str, ...] = SEEN,
    unseen: tuple[str, ...] = UNSEEN,
    seeds: int = 4,
    reward_gain: float = 1.2,
    judge_gain: float | None = 0.9,
    diversity_ratio: float = 0.92,
    pairs: bool = True,
    evaluated: bool = True,
    size: int = 64,
) -> Path:
    """Write a run directory and return it; `target` is the number of updates the run file asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(RUN_YAML.format(updates=updates if target is None else target))
    rng = np.random.default_rng(7)
    if updates:
        rows = (json.dumps(row) for row in _metrics(updates, rng))
        (folder / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows))
    if pairs and updates:
        for update in sorted({1, max(1, updates // 2), updates}):
            _pairs(folder / "samples" / "pairs" / f"update-{update:06d}", update / max(updates, 1), seen, rng, size)
    if evaluated:
        gains = {"reward": reward_gain, "judge": judge_gain}
        result = _evaluation(folder, updates, seen, unseen, seeds, gains, diversity_ratio, rng, size)
        (folder / "eval.json").write_text(json.dumps(result, indent=1))
    return folder


def _metrics(updates: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for update in range(1, updates + 1):
        done = 1 - math.exp(-3 * update / 60)
        reward, gap = 1.5 + 1.4 * done + rng.normal(0, 0.25), abs(rng.normal(0.9, 0.2))
        rows.append(
            {
                "update": update,
                "loss": 0.693 - 0.12 * done + rng.normal(0, 0.02),
                "reward_mean": reward,
                "reward_winner": reward + gap / 2,
                "reward_loser": reward - gap / 2,
                "gap": gap,
                "reward_final": reward + 0.3 + rng.normal(0, 0.1),
                "accuracy": min(1.0, max(0.0, 0.5 + 0.2 * done + rng.normal(0, 0.06))),
                "kl": 9 * done**2 + abs(rng.normal(0, 0.3)),
                "log_ratio_winner": 0.4 * done,
                "log_ratio_loser": -0.5 * done,
                "grad_norm": 0.5 + abs(rng.normal(0, 0.15)),
                "lr": 1e-3,
                "guidance_size": 0.9 + rng.normal(0, 0.02),
                "pairs": 40,
                "ties": int(rng.integers(0, 3)),
                "invalid": 0,
                "forwards": 280 * update,
                "reward_queries": 120 * update,
                "seconds": 5 + abs(rng.normal(0, 0.4)),
                "by_step": [
                    {
                        "k": k,
                        "time": 951 - 50 * k,
                        "gap": 1.4 - 0.06 * k + rng.normal(0, 0.05),
                        "accuracy": 0.5 + 0.01 * k,
                        "kl": 0.5 + 0.1 * k,
                        "reward": reward,
                        "pairs": 8,
                    }
                    for k in (1, 5, 9, 13, 17)
                ],
            }
        )
    return rows


def _pairs(folder: Path, done: float, prompts: tuple[str, ...], rng: np.random.Generator, size: int) -> None:
    folder.mkdir(parents=True)
    records: list[dict[str, Any]] = []
    for trajectory in range(2):
        for k in (1, 5, 9, 13, 17):
            names = {side: f"t{trajectory}-k{k:02d}-{side}.png" for side in ("winner", "loser")}
            quality = 0.2 + 0.03 * k + 0.25 * done
            draw(trajectory, quality=quality, size=size).save(folder / names["winner"])
            draw(trajectory, quality=quality - 0.2, size=size).save(folder / names["loser"])
            reward = float(rng.normal(2 * quality, 0.2))
            records.append(
                {
                    "prompt": prompts[trajectory % len(prompts)],
                    "trajectory": trajectory,
                    "k": k,
                    "time": 951 - 50 * k,
                    "reward_winner": reward + 0.5,
                    "reward_loser": reward - 0.5,
                    "guided": True,
                    **names,
                }
            )
    (folder / "pairs.json").write_text(json.dumps(records))


def _evaluation(
    folder: Path,
    updates: int,
    seen: tuple[str, ...],
    unseen: tuple[str, ...],
    seeds: int,
    gains: dict[str, float | None],
    diversity_ratio: float,
    rng: np.random.Generator,
    size: int,
) -> dict[str, Any]:
    prompts = [*(("seen", prompt) for prompt in seen), *(("unseen", prompt) for prompt in unseen)]
    values: dict[str, dict[str, list[float]]] = {}

    def add(name: str, base: list[float], aligned: list[float]) -> None:
        values[name] = {"base": base, "aligned": aligned}

    count = len(prompts)
    for name, gain in gains.items():
        if gain is not None:
            base = rng.normal(2.0, 0.6, count)
            add(name, base.tolist(), (base + gain + rng.normal(0, 0.4, count) * bool(gain)).tolist())
    if gains["judge"] is not None:
        base = rng.uniform(0.3, 0.7, count)
        add("good", base.tolist(), np.clip(base + 0.3 * gains["judge"], 0, 1).tolist())
    for name, level in (("distance", 0.3), ("vendi", 2.2), ("pixels", 0.2)):
        base = rng.uniform(0.8, 1.2, count) * level
        add(name, base.tolist(), (base * diversity_ratio * rng.uniform(0.95, 1.05, count)).tolist())
    for name, level in (("saturation", 0.3), ("jpeg", 2.4)):
        base = rng.uniform(0.8, 1.2, count) * level
        add(name, base.tolist(), (base * rng.uniform(0.95, 1.1, count)).tolist())
    roles = {
        "reward": ("emoji_preference", "trained", ""),
        "judge": ("emoji_judge", "judge", ""),
        "good": ("pictures the judge calls good", "judge", "share"),
        "distance": ("distance between pictures of a prompt", "diversity", ""),
        "vendi": ("different pictures of a prompt (Vendi score)", "diversity", "pictures"),
        "pixels": ("pixel distance between pictures of a prompt", "diversity", ""),
        "saturation": ("saturation", "alarm", ""),
        "jpeg": ("JPEG size", "alarm", "kB"),
    }
    members = {
        "seen": range(len(seen)),
        "unseen": range(len(seen), count),
        "all": range(count),
    }
    groups = {
        name: {
            "prompts": len(indices),
            "pictures": len(indices) * seeds,
            "metrics": {
                metric: compare(*([sides[side][i] for i in indices] for side in ("base", "aligned")), resamples=999)
                for metric, sides in values.items()
            },
        }
        for name, indices in members.items()
        if indices
    }
    entries: list[dict[str, Any]] = []
    for index, (group, prompt) in enumerate(prompts):
        pictures: list[dict[str, Any]] = []
        for seed in range(seeds):
            name = f"{index:03d}-{group}-seed{seed}.png"
            paths = {side: f"samples/eval/{side}/{name}" for side in ("base", "aligned")}
            number = 100 * index + seed
            for side, path in paths.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                quality = float(np.random.default_rng(number).uniform(0, 0.9)) if side == "base" else 0.95
                draw(number, quality=quality, size=size).save(folder / path)
            scores = {
                metric: {side: plain(values[metric][side][index] + 0.1 * seed) for side in paths}
                for metric in ("reward", "judge")
                if metric in values
            }
            pictures.append({"seed": seed, **paths, "scores": scores})
        metrics = {metric: {side: plain(sides[side][index]) for side in sides} for metric, sides in values.items()}
        entries.append({"prompt": prompt, "group": group, "metrics": metrics, "pictures": pictures})
    history = [
        {
            "update": update,
            "groups": {
                name: {
                    metric: {
                        key: row[key] * (update / updates if key in ("difference", "low", "high") else 1)
                        for key in ("base", "aligned", "difference", "low", "high", "ratio")
                        if row[key] is not None
                    }
                    for metric, row in group["metrics"].items()
                    if row
                }
                for name, group in groups.items()
            },
        }
        for update in sorted({max(1, updates // 3), max(1, 2 * updates // 3), updates})
        if updates
    ]
    judged = gains["judge"] is not None
    return {
        "schema": 1,
        "update": updates,
        "settings": {
            "seed": 0,
            "seeds": seeds,
            "sampler": {"name": "ddim", "steps": 20, "eta": 1.0, "guidance_scale": 1.5},
            "confidence": 0.95,
            "resamples": 9999,
            "embedding": "emoji_judge" if judged else "pixels",
            "judge": "emoji_judge" if judged else None,
            "judge_held_out": judged,
            "good_threshold": 2.0 if judged else None,
        },
        "metrics": {
            name: dict(zip(("label", "role", "unit"), roles[name], strict=True), spread=0.8) for name in values
        },
        "groups": groups,
        "prompts": entries,
        "history": history,
        "cost": {"forwards": 20 * 2 * count * seeds, "seconds": 31.4},
        "environment": {
            "python": "3.11.7",
            "processor": "a fabricated processor",
            "torch": "2.13.0",
            "tailorpo": "0.1",
        },
    }
