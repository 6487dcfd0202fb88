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
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from tailorpo._distributed import ALONE, Processes
from tailorpo.environment import environment
from tailorpo.errors import UserError
from tailorpo.evaluation_result import SIDES, Drawn, Group, Side, evaluation_result, file_name
from tailorpo.files import atomic_write
from tailorpo.images import contact_sheet, fit, png_bytes, save_png
from tailorpo.meter import Meter
from tailorpo.models import DiffusionModel
from tailorpo.noise import Noise
from tailorpo.policy import Policy
from tailorpo.prompts import load_prompts
from tailorpo.rewards import load_scorer
from tailorpo.rollout import rollout_chains, sample_images, start_trajectories
from tailorpo.sentinels.series import kept_update

if TYPE_CHECKING:
    from tailorpo.run import Run
    from tailorpo.rundir import RunDirectory
    from tailorpo.train import Reporter

SHEET_PROMPTS, SHEET_SEEDS, SHEET_CELL = 24, 4, 96


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
        result = evaluation_result(run, prompts, drawn, meter)
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
    drawn: dict[Side, list[Drawn]],
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
) -> dict[Side, list[Drawn]]:
    """Both models' pictures, in batches that hold one side of few pictures at a time, one batch per process and round;
    `Drawn` per prompt, in the main process."""
    policy, noise = Policy(model, run.sampler), Noise(run.seed)
    drawn: dict[Side, list[Drawn]] = {side: [Drawn() for _ in prompts] for side in SIDES}
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
                path = folder / side / file_name(prompts, each.prompt, each.seed)
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


def _side_by_side(prompts: Sequence[tuple[Group, str]], drawn: dict[Side, list[Drawn]]) -> Image.Image:
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
