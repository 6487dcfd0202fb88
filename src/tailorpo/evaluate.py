"""Did it work? The base and the aligned model side by side, on the same prompts, seeds and noises.

For every prompt and seed one picture of each model is drawn from the same initial latent and the same noise at every
step (streams keyed by ("eval", prompt, seed): neither the batch size nor the list of prompts changes a picture). Each
is scored by the rewards of the training, by the held-out judge, and by two low-level statistics; diversity is measured
among the pictures of one prompt. The unit of every comparison is the prompt: seeds are averaged first, then the paired
differences get a bootstrap interval (`statistics.py`). What each number means: docs/evaluation.md.

    eval.json                            settings, intervals for seen, unseen and all prompts, every prompt and picture
    samples/eval/{base,aligned}/*.png    the pictures, under the same names in both folders
    samples/eval/side_by_side.png        a contact sheet: base on the left, aligned on the right

Evaluation changes nothing that training depends on: it draws from streams of its own, and the model's counter of
network evaluations is put back. Left out: FID and other distances to a data set (they need thousands of pictures, and
alignment leaves the data set on purpose), and comparing two aligned runs (compare their eval.json: same noises).

Several processes draw and score a batch each, round by round; the main one gathers them in order and writes. The
batches are those of one process, so the result is the same to the last bit.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from tailorpo._distributed import ALONE, Processes
from tailorpo.environment import environment
from tailorpo.errors import UserError
from tailorpo.files import atomic_write
from tailorpo.images import contact_sheet, fit, png_bytes, save_png
from tailorpo.meter import Meter, Metric
from tailorpo.models import DiffusionModel
from tailorpo.noise import Noise
from tailorpo.policy import Policy
from tailorpo.prompts import load_prompts
from tailorpo.rewards import load_scorer
from tailorpo.rollout import rollout_chains, sample_images, start_trajectories
from tailorpo.sentinels.series import kept_update
from tailorpo.statistics import (
    compare,
    paired_means,
    pairwise_distance,
    pairwise_rms,
    plain,
    vendi_score,
    within_spread,
)

if TYPE_CHECKING:
    from tailorpo.run import Run
    from tailorpo.rundir import RunDirectory
    from tailorpo.train import Reporter

SCHEMA = 1
CONFIDENCE, RESAMPLES = 0.95, 9999
SHEET_PROMPTS, SHEET_SEEDS, SHEET_CELL = 24, 4, 96

Group = Literal["seen", "unseen"]
Side = Literal["base", "aligned"]
SIDES: tuple[Side, Side] = ("base", "aligned")


@dataclass(frozen=True)
class _Picture:
    """One picture as it travels to the main process: whose it is, its numbers, its file and, if shown, a small copy."""

    prompt: int
    seed: int
    scores: dict[str, float]
    features: Tensor
    pixels: Tensor
    png: bytes
    thumbnail: Image.Image | None


@dataclass
class _Drawn:
    """What one model drew for one prompt: an entry per seed, in the order of the seeds."""

    scores: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    features: list[Tensor] = field(default_factory=list[Tensor])
    pixels: list[Tensor] = field(default_factory=list[Tensor])
    thumbnails: list[Image.Image] = field(default_factory=list[Image.Image])


def evaluate(
    run: Run, directory: RunDirectory, model: DiffusionModel, *, reporter: Reporter, processes: Processes = ALONE
) -> dict[str, Any]:
    """Draw, score and compare; writes eval.json and samples/eval, and returns what eval.json holds.

    Args:
        run: its prompts, seeds, judge and batch size are in `run.eval`.
        directory: of the run; an evaluation of an earlier update in it is replaced, its summary kept under "history".
        model: with the trained adapter on; off within `model.reference()`.
        reporter: hears of every batch.
        processes: those that share the pictures, all of which call this; the main one writes.

    Raises:
        UserError: the model has no adapter, so that there is nothing to compare.
        RewardError: a reward failed, or scored NaN under `on_invalid_reward: stop`.
        StorageError: the disk refused.
    """
    if not model.trainable():
        raise UserError("the model has no adapter, so there is nothing to compare with the base; set model.lora")
    started, counter = time.perf_counter(), model.evaluations
    prompts = _prompts(run)
    with processes.together():
        meter = _meter(run, model.device)
    # Pictures go to a folder of their own and replace the last evaluation's at the end: an interruption mixes nothing.
    partial = directory.path / "samples" / "eval.partial"
    if processes.main:
        shutil.rmtree(partial, ignore_errors=True)
    reporter.phase(f"evaluating: {len(prompts)} prompts, {run.eval.seeds} seeds, base and aligned")
    with processes.computing():
        drawn = _draw(run, model, prompts, meter, partial, step=reporter.step, processes=processes)
    forwards = processes.total(model.evaluations - counter)
    model.evaluations = counter  # what evaluation costs is its own account, not training's
    result: dict[str, Any] = {}
    if processes.main:
        reporter.phase("evaluating: intervals")
        result = _result(run, prompts, drawn, meter)
        result["update"] = kept_update(directory.metrics())
        result["history"] = _history(directory.path / "eval.json", result)
        result["cost"] = {"forwards": forwards, "seconds": round(time.perf_counter() - started, 2)}
        result["environment"] = environment(model.device)
        _write(directory, partial, prompts, drawn, result)
    return processes.broadcast(result)


def _write(
    directory: RunDirectory,
    partial: Path,
    prompts: Sequence[tuple[Group, str]],
    drawn: dict[Side, list[_Drawn]],
    result: dict[str, Any],
) -> None:
    save_png(_side_by_side(prompts, drawn), partial / "side_by_side.png")
    shutil.rmtree(partial.with_name("eval"), ignore_errors=True)
    partial.rename(partial.with_name("eval"))
    directory.write_json("eval.json", result)


def _prompts(run: Run) -> list[tuple[Group, str]]:
    """Every prompt with its group, in the order of the lists."""
    seen = load_prompts(run.eval.prompts_seen or run.prompts)
    unseen = load_prompts(run.eval.prompts_unseen) if run.eval.prompts_unseen else ()
    return [*(("seen", prompt) for prompt in seen), *(("unseen", prompt) for prompt in unseen)]


def _meter(run: Run, device: torch.device) -> Meter:
    scorer = load_scorer(run.reward, device, on_invalid=run.on_invalid_reward)
    judge = run.eval.judge
    held_out = judge is not None and judge not in [entry.reward for entry in run.reward]
    return Meter(scorer, judge.load(device) if judge else None, held_out=held_out, device=device)


def _draw(
    run: Run,
    model: DiffusionModel,
    prompts: Sequence[tuple[Group, str]],
    meter: Meter,
    folder: Path,
    *,
    step: Callable[[int, int], None],
    processes: Processes,
) -> dict[Side, list[_Drawn]]:
    """Both models' pictures, in batches that hold one side of few pictures at a time, one batch per process and round;
    `_Drawn` per prompt, in the main process."""
    policy, noise = Policy(model, run.sampler), Noise(run.seed)
    drawn: dict[Side, list[_Drawn]] = {side: [_Drawn() for _ in prompts] for side in SIDES}
    jobs = [(index, seed) for index in range(len(prompts)) for seed in range(run.eval.seeds)]
    batches = [jobs[first : first + run.eval.batch_size] for first in range(0, len(jobs), run.eval.batch_size)]
    done = 0
    for first in range(0, len(batches), processes.count):
        own = batches[first : first + processes.count][processes.rank : processes.rank + 1]
        for side in SIDES:
            if not own and processes.sharding is not None:
                _keep_pace(policy, batches[-1], prompts, side, noise)
            pictures = [each for batch in own for each in _pictures(policy, batch, prompts, side, meter, noise)]
            for each in (picture for part in processes.gather(pictures) for picture in part):
                done += 1
                if not processes.main:
                    continue
                cell = drawn[side][each.prompt]
                for name, value in each.scores.items():
                    cell.scores.setdefault(name, []).append(value)
                cell.features.append(each.features)
                cell.pixels.append(each.pixels)
                if each.thumbnail is not None:
                    cell.thumbnails.append(each.thumbnail)
                path = folder / side / _file_name(prompts, each.prompt, each.seed)
                path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(path, each.png)
            step(done, 2 * len(jobs))
    return drawn


def _keep_pace(
    policy: Policy, batch: Sequence[tuple[int, int]], prompts: Sequence[tuple[Group, str]], side: Side, noise: Noise
) -> None:
    """Draw pictures for nothing, while other processes draw theirs and gather the shards that this one holds."""
    model, counted = policy.model, policy.model.evaluations
    with torch.no_grad(), model.reference() if side == "base" else nullcontext():
        keys = [("eval", prompts[index][1], seed) for index, seed in batch]
        rollout_chains(
            policy,
            start_trajectories(policy, [prompts[index][1] for index, _ in batch], noise=noise, keys=keys),
            noise=noise,
        )
    model.evaluations = counted


def _pictures(
    policy: Policy,
    batch: Sequence[tuple[int, int]],
    prompts: Sequence[tuple[Group, str]],
    side: Side,
    meter: Meter,
    noise: Noise,
) -> list[_Picture]:
    """Draw and measure one batch of (prompt, seed) with one of the models."""
    texts = [prompts[index][1] for index, _ in batch]
    keys = [("eval", prompts[index][1], seed) for index, seed in batch]
    with policy.model.reference() if side == "base" else nullcontext():
        images = sample_images(policy, texts, noise=noise, keys=keys, batch_size=len(batch))
    scores = meter.scores(images, texts)
    features, pixels = meter.features(images), adaptive_avg_pool2d(images, 16).flatten(1).cpu()
    return [
        _Picture(
            prompt=index,
            seed=seed,
            scores={name: float(values[row]) for name, values in scores.items()},
            features=features[row].clone(),
            pixels=pixels[row].clone(),
            png=png_bytes(images[row]),
            thumbnail=fit(images[row], SHEET_CELL) if index < SHEET_PROMPTS and seed < SHEET_SEEDS else None,
        )
        for row, (index, seed) in enumerate(batch)
    ]


def _file_name(prompts: Sequence[tuple[Group, str]], index: int, seed: int) -> str:
    group, prompt = prompts[index]
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    return "-".join(part for part in (f"{index:03d}", group, words, f"seed{seed}.png") if part)


def _side_by_side(prompts: Sequence[tuple[Group, str]], drawn: dict[Side, list[_Drawn]]) -> Image.Image:
    pictures: list[Image.Image] = []
    captions: list[str] = []
    columns = 2 * len(drawn["base"][0].thumbnails)
    for index, (_, prompt) in enumerate(prompts[:SHEET_PROMPTS]):
        for side in SIDES:
            cell = drawn[side][index]
            pictures += cell.thumbnails
            captions += [f"{prompt} {score:.2f}" for score in cell.scores["reward"][: len(cell.thumbnails)]]
    seeds = columns // 2
    title = f"left {seeds}: base; right {seeds}: aligned, same seeds and noises; with the reward"
    return contact_sheet(pictures, captions, columns=columns, cell=SHEET_CELL, title=title)


@dataclass(frozen=True)
class _Diversity:
    """A measure of the pictures of one prompt; with `good` only of those whose noises gave both models a good one."""

    metric: Metric
    of: Callable[[_Drawn], float]
    good: bool = False


_DIVERSITY = {
    "distance": _Diversity(
        Metric("distance between pictures of a prompt", "diversity"),
        lambda cell: pairwise_distance(torch.stack(cell.features)),
    ),
    "distance_good": _Diversity(
        Metric("distance between good pictures of a prompt", "diversity"),
        lambda cell: pairwise_distance(torch.stack(cell.features)) if cell.features else math.nan,
        good=True,
    ),
    "vendi": _Diversity(
        Metric("different pictures of a prompt (Vendi score)", "diversity", "pictures"),
        lambda cell: vendi_score(torch.stack(cell.features)) if len(cell.features) > 1 else math.nan,
    ),
    "pixels": _Diversity(
        Metric("pixel distance between pictures of a prompt", "diversity"),
        lambda cell: pairwise_rms(torch.stack(cell.pixels)),
    ),
}


def _good_on_both_sides(base: _Drawn, aligned: _Drawn) -> dict[Side, _Drawn]:
    """The features of the pictures whose noises gave a good one on either side."""
    both = zip(base.scores["good"], aligned.scores["good"], strict=True)
    seeds = [seed for seed, (first, second) in enumerate(both) if first == second == 1]
    return {
        side: _Drawn(features=[cell.features[seed] for seed in seeds])
        for side, cell in zip(SIDES, (base, aligned), strict=True)
    }


def _result(
    run: Run, prompts: Sequence[tuple[Group, str]], drawn: dict[Side, list[_Drawn]], meter: Meter
) -> dict[str, Any]:
    """The content of eval.json, without what only the caller knows."""
    values: dict[str, dict[Side, list[float]]] = {}
    for name in drawn["base"][0].scores:
        means = [paired_means(*(drawn[side][index].scores[name] for side in SIDES)) for index in range(len(prompts))]
        values[name] = {"base": [pair[0] for pair in means], "aligned": [pair[1] for pair in means]}
    for name, diversity in _DIVERSITY.items():
        if not diversity.good:
            values[name] = {side: [diversity.of(cell) for cell in drawn[side]] for side in SIDES}
        elif "good" in drawn["base"][0].scores:
            pairs = [_good_on_both_sides(*cells) for cells in zip(*(drawn[side] for side in SIDES), strict=True)]
            values[name] = {side: [diversity.of(pair[side]) for pair in pairs] for side in SIDES}
    spread = {name: within_spread([cell.scores[name] for cell in drawn["base"]]) for name in drawn["base"][0].scores}
    groups = {"seen": ["seen"], "unseen": ["unseen"], "all": ["seen", "unseen"]}
    members = {
        name: [index for index, (group, _) in enumerate(prompts) if group in wanted] for name, wanted in groups.items()
    }
    return {
        "schema": SCHEMA,
        "settings": {
            "seed": run.seed,
            "seeds": run.eval.seeds,
            "sampler": asdict(run.sampler),
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
            "embedding": meter.embedding,
            "judge": meter.judge.name if meter.judge else None,
            "judge_held_out": meter.held_out,
            "good_threshold": meter.good_threshold,
        },
        "metrics": {
            name: {
                **asdict(_DIVERSITY[name].metric if name in _DIVERSITY else meter.metric(name)),
                "spread": plain(spread.get(name)),
            }
            for name in values
        },
        "groups": {
            name: {
                "prompts": len(indices),
                "pictures": len(indices) * run.eval.seeds,
                "metrics": {metric: _compared(values[metric], indices, seed=run.seed) for metric in values},
            }
            for name, indices in members.items()
            if indices
        },
        "prompts": [
            {
                "prompt": prompt,
                "group": group,
                "metrics": {
                    name: {side: plain(sides[side][index]) for side in SIDES} for name, sides in values.items()
                },
                "pictures": [
                    {
                        "seed": seed,
                        **{side: f"samples/eval/{side}/{_file_name(prompts, index, seed)}" for side in SIDES},
                        "scores": {
                            name: {side: plain(drawn[side][index].scores[name][seed]) for side in SIDES}
                            for name in drawn["base"][index].scores
                        },
                    }
                    for seed in range(run.eval.seeds)
                ],
            }
            for index, (group, prompt) in enumerate(prompts)
        ],
    }


def _compared(values: dict[Side, list[float]], indices: Sequence[int], *, seed: int) -> dict[str, Any] | None:
    base, aligned = ([values[side][index] for index in indices] for side in SIDES)
    return compare(base, aligned, confidence=CONFIDENCE, resamples=RESAMPLES, seed=seed)


def _history(path: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Summaries of the evaluations so far, by update, ending with this one."""
    earlier: list[dict[str, Any]] = []
    if path.is_file():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8")).get("history", [])
        except (ValueError, AttributeError):  # an edited or foreign file is no reason to lose the new numbers
            earlier = []
    kept = [entry for entry in earlier if entry["update"] < result["update"]]
    keys = ("base", "aligned", "difference", "low", "high", "ratio")
    summary = {
        group: {name: {key: row[key] for key in keys} for name, row in data["metrics"].items() if row}
        for group, data in result["groups"].items()
    }
    return [*kept, {"update": result["update"], "groups": summary}]
