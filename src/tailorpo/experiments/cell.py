"""One cell of a grid: train with evaluations on the way, evaluate at the end, write the result.

Everything is in the cell's folder and can be interrupted at any time: the training goes on from its checkpoint, points
of the curve that are there stay, and `result.json` is written last and as a whole.

    runs/experiments/NAME/CELL/run.yaml metrics.jsonl checkpoints/ lora/ samples/ eval.json    the run
                               curve.json      evaluations on the way
                               result.json     what the experiment keeps

The curve is the mean reward of pictures drawn by the plain sampler, one per seen prompt, on the same noises at every
point. The rewards that training itself logs do not compare methods: TailorPO's trajectories go on from their winners
and TailorPO-G's from guided ones.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from tailorpo._distributed import pick_device
from tailorpo.algorithms.tailorpo import TailorPO
from tailorpo.environment import environment
from tailorpo.evaluate import evaluate
from tailorpo.evaluation_result import SIDES
from tailorpo.experiments.alarms import looks_of
from tailorpo.experiments.grid import Plan, settings_of
from tailorpo.experiments.held import kl_of
from tailorpo.files import atomic_write
from tailorpo.models import DiffusionModel
from tailorpo.noise import Key, Noise
from tailorpo.policy import Policy
from tailorpo.prompts import load_prompts
from tailorpo.rewards import load_scorer
from tailorpo.rollout import rollout_chains, start_trajectories
from tailorpo.run import Run
from tailorpo.rundir import RUN, RunDirectory
from tailorpo.statistics import plain
from tailorpo.train import Reporter, train
from tailorpo.trajectory_kl import walk_with_kl

RESULT, CURVE = "result.json", "curve.json"
KEPT = ("reward", "judge", "good", "distance", "vendi", "pixels", "saturation", "jpeg")
"""The measures of an evaluation whose values per prompt are kept."""


def run_cell(plan: Plan, folder: Path, *, reporter: Reporter) -> dict[str, Any]:
    """Train and evaluate one cell in `folder`, going on where an earlier process stopped, and return its result.

    A folder whose run has other settings is begun anew.
    """
    run, measured = plan.run, plan.measured
    if (folder / RUN).is_file() and RunDirectory.open(folder).run != run:
        shutil.rmtree(folder)
    directory = RunDirectory.open(folder) if (folder / RUN).is_file() else RunDirectory.create(folder, run)
    with directory.lock():
        curve = _curve(directory)
        model: DiffusionModel | None = None
        for mark in marks(run.updates, plan.points):
            if mark in {point["update"] for point in curve} and mark < run.updates:
                continue
            model = train(replace(run, updates=mark), directory, reporter=reporter)
            if not curve:
                with model.reference():
                    start = _point(measured, model, kl=False)
                curve.append({"update": 0, "forwards": 0, "reward_queries": 0, **start})
            if mark not in {point["update"] for point in curve}:
                row = directory.metrics()[-1]
                spent = {key: row[key] for key in ("update", "forwards", "reward_queries")}
                curve.append({**spent, **_point(measured, model, kl=mark == run.updates)})
            directory.write_json(CURVE, curve)
        assert model is not None
        evaluation = evaluate(measured, directory, model, reporter=reporter)
        result = {
            **_description(plan, directory),
            "kl": curve[-1]["kl"],
            "curve": curve,
            "evaluation": per_prompt(evaluation),
        }
        result["minutes"] = round((result["seconds"] + evaluation["cost"]["seconds"]) / 60, 2)
        atomic_write(folder / RESULT, json.dumps(result, allow_nan=False) + "\n")
    return result


def marks(updates: int, points: int) -> list[int]:
    """After which updates the curve has a point: evenly spread, the last one included."""
    return sorted({max(1, round(updates * (number + 1) / points)) for number in range(points)})


@torch.no_grad()
def _point(run: Run, model: DiffusionModel, *, kl: bool) -> dict[str, float | None]:
    """Means over one trajectory per seen prompt: the trained reward and the judge of its picture, and its KL."""
    device = pick_device()
    score, judge = load_scorer(run.reward, device, on_invalid="skip"), run.eval.judge
    judging = judge.load(device) if judge else None
    found: dict[str, list[float]] = {}
    for texts, latents, summed in _trajectories(run, model, kl=kl):
        pictures = model.decode(latents)
        found.setdefault("reward", []).extend(map(float, score(pictures, texts)))
        if judging:
            found.setdefault("judge", []).extend(map(float, judging(pictures, texts)))
        if kl:
            found.setdefault("kl", []).extend(map(float, summed))
    return {name: plain(fmean(values)) for name, values in found.items()}


@torch.no_grad()
def sampler_kl(run: Run, model: DiffusionModel) -> float | None:
    """KL(policy || reference) of a whole trajectory in nats: the exact KL of every step, summed along trajectories of
    the policy, one per seen prompt; the same measure for methods that log their own KL and for those that do not."""
    return plain(fmean(float(kl) for _, _, summed in _trajectories(run, model, kl=True) for kl in summed))


def _trajectories(run: Run, model: DiffusionModel, *, kl: bool) -> Iterator[tuple[Sequence[str], Tensor, Tensor]]:
    """Batches of seen prompts: these, the finished latents of one trajectory each, and its summed KL, (B,), zero where
    it is not asked for."""
    prompts = load_prompts(run.eval.prompts_seen or run.prompts)
    policy, noise = Policy(model, run.sampler), Noise(run.seed)
    for first in range(0, len(prompts), run.eval.batch_size):
        texts = prompts[first : first + run.eval.batch_size]
        keys: list[tuple[Key, ...]] = [("curve", prompt) for prompt in texts]
        trajectories = start_trajectories(policy, texts, noise=noise, keys=keys)
        total = torch.zeros(len(texts))
        if kl:
            for step in walk_with_kl(policy, trajectories, noise=noise, rows=range(len(texts))):
                total += step
        else:
            rollout_chains(policy, trajectories, noise=noise)
        yield texts, trajectories.latents, total


def _curve(directory: RunDirectory) -> list[dict[str, Any]]:
    path = directory.path / CURVE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def _description(plan: Plan, directory: RunDirectory) -> dict[str, Any]:
    rows = directory.metrics()
    method = plan.run.algorithm
    target = method.kl_target if isinstance(method, TailorPO) else None
    return {
        "id": plan.cell.id,
        "variant": plan.cell.variant.name,
        "reward": plan.cell.reward,
        "seed": plan.cell.seed,
        "digest": plan.digest,
        "recipe": plan.cell.variant.recipe,
        "overrides": list(plan.overrides),
        "settings": settings_of(plan.run),
        "updates": rows[-1]["update"],
        "forwards": rows[-1]["forwards"],
        "backwards": plan.backwards,
        "input_gradients": plan.input_gradients,
        "reward_queries": rows[-1]["reward_queries"],
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "device": environment(pick_device())["device"],
        **({"sentinels": looks_of(rows)} if plan.run.sentinels else {}),
        **({"kl_target": target, "kl_by_update": kl_of(rows)} if target else {}),
        "training": [
            [row["forwards"], row["reward_queries"], plain(row.get("reward_final")), plain(row.get("kl"))]
            for row in rows
        ],
    }


def per_prompt(evaluation: dict[str, Any]) -> dict[str, Any]:
    """An evaluation's values per prompt (means over its pictures): {"prompts", "groups", measure: {base, aligned}}."""
    rows = evaluation["prompts"]
    names = [name for name in KEPT if name in evaluation["metrics"]]
    return {
        "prompts": [row["prompt"] for row in rows],
        "groups": [row["group"] for row in rows],
        "pictures": evaluation["settings"]["seeds"],
        "measures": {
            name: {side: [_short(row["metrics"][name][side]) for row in rows] for side in SIDES} for name in names
        },
    }


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
