"""The recorded sweep behind the settings of the miniature's recipes.

    python benchmarks/sweep.py [VARIANT ...]

Each variant is the demo's recipe with some settings overridden (`BASE` first), trained with the SAME number of network
evaluations from two seeds that the demo does not use, and measured on the prompts it trains on with noises that the
demo's evaluation does not use: the trained reward, diversity and KL. The judge takes no part, so that it stays a judge.
A finished run is skipped, so the sweep can be stopped and continued. Writes benchmarks/results/sweep.json and sweep.md.

The measurements that guidance scale and trained steps rest on (where the step reward ranks siblings) are made by
`python -m miniature` and stand in docs/miniature.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from common import RESULTS, Silent

from tailorpo.environment import environment
from tailorpo.evaluate import evaluate
from tailorpo.noise import Noise
from tailorpo.run import Run
from tailorpo.rundir import RunDirectory
from tailorpo.train import train

RECIPE = Path(__file__).parents[1] / "recipes" / "emoji_tailorpo_g.yaml"
FORWARDS = 5_600
"""Network evaluations of every variant: 20 updates of TailorPO-G with 8 trajectories."""
BASE = (
    "sampler.guidance_scale=2.0",
    "algorithm.train_steps={first: 4, last: 16, count: 5}",
    "algorithm.guidance={form: sigma, k: 2.0}",
    "algorithm.beta=0.2",
    "optimizer.lr=1e-3",
    "model.lora.rank=8",
)
"""The settings that the variants depart from, fixed here: the recipe has moved on because of this sweep."""
SEEDS = (101, 102)
MEASURE = ("eval.seeds=2", "eval.prompts_unseen=null", "eval.judge=null")

VARIANTS: dict[str, tuple[str, ...]] = {
    "start": (),
    "TailorPO (no guidance)": ("algorithm.guidance=null",),
    "guidance k 1": ("algorithm.guidance.k=1.0",),
    "guidance k 4": ("algorithm.guidance.k=4.0",),
    "Jacobian-free": ("algorithm.guidance.jacobian=free",),
    "accept or reject": ("algorithm.guidance.accept_reject=true",),
    "Eq. 14, delta 0.5, cosine": ("algorithm.guidance={form: target, delta: 0.5}",),
    "lr 3e-4": ("optimizer.lr=3e-4",),
    "lr 3e-3": ("optimizer.lr=3e-3",),
    "beta 0.05": ("algorithm.beta=0.05",),
    "beta 1": ("algorithm.beta=1.0",),
    "soft labels": ("algorithm.labels=soft", "algorithm.tau=0.2"),
    "uniform step weights": ("algorithm.step_weights=uniform",),
    "steps 7 to 17, k 4": ("algorithm.train_steps={first: 7, last: 17, count: 5}", "algorithm.guidance.k=4.0"),
    "early steps": ("algorithm.train_steps={first: 0, last: 8, count: 5}",),
    "late steps": ("algorithm.train_steps={first: 10, last: 18, count: 5}",),
    "steps 7 to 17": ("algorithm.train_steps={first: 7, last: 17, count: 5}",),
    "all steps, random offset": ("algorithm.train_steps=5", "algorithm.offset=random"),
    "continue from random": ("algorithm.continue_from=random",),
    "guidance scale 1.5": ("sampler.guidance_scale=1.5",),
    "guidance scale 5": ("sampler.guidance_scale=5.0",),
    "attention only": ("model.lora.targets=attention",),
    "rank 4": ("model.lora.rank=4",),
    "rank 16": ("model.lora.rank=16",),
    # A second round, around what gained most in the first.
    "guidance scale 1.5, lr 3e-3": ("sampler.guidance_scale=1.5", "optimizer.lr=3e-3"),
    "guidance scale 1.5, rank 16": ("sampler.guidance_scale=1.5", "model.lora.rank=16"),
    "guidance scale 1.5, accept or reject": ("sampler.guidance_scale=1.5", "algorithm.guidance.accept_reject=true"),
    "guidance scale 1.5, steps 7 to 17": (
        "sampler.guidance_scale=1.5",
        "algorithm.train_steps={first: 7, last: 17, count: 5}",
    ),
}


def measure(overrides: tuple[str, ...], seed: int) -> dict[str, Any]:
    """Train and evaluate one variant from one seed."""
    settings = [*BASE, *overrides, *MEASURE, f"seed={seed}"]
    plan = Run.load(RECIPE, settings)
    algorithm, steps = plan.algorithm, plan.sampler.steps
    cost = algorithm.cost(steps, algorithm.trained_steps(steps, noise=Noise(plan.seed), update=0))
    updates = max(1, round(FORWARDS / (cost.forwards * plan.batch.trajectories)))
    run = Run.load(RECIPE, [*settings, f"updates={updates}", f"checkpoint_every={updates}"])
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory.create(Path(folder) / "run", run)
        model = train(run, directory, reporter=Silent())
        result = evaluate(run, directory, model, reporter=Silent())["groups"]["seen"]["metrics"]
        every = directory.metrics()
    return {
        "updates": updates,
        "forwards": every[-1]["forwards"],
        "seconds": round(sum(row["seconds"] for row in every), 1),
        "kl": every[-1]["kl"],
        "metrics": {
            name: {key: result[name][key] for key in ("base", "aligned", "difference", "low", "high")}
            for name in ("reward", "distance")
        },
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown, best mean gain first; the last columns are means over the seeds."""
    head = " | ".join(f"reward, seed {seed}" for seed in SEEDS)
    lines = [
        f"| variant | F | {head} | mean gain | diversity kept | KL, nats |",
        "| --- | --- |" + " --- |" * (len(SEEDS) + 3),
    ]
    rows: list[tuple[float, str]] = []
    for name, variant in results.items():
        runs = [variant["seeds"][str(seed)] for seed in SEEDS if str(seed) in variant["seeds"]]
        gains = [run["metrics"]["reward"] for run in runs]
        cells = [f"{g['difference']:+.2f} [{g['low']:+.2f}, {g['high']:+.2f}]" for g in gains]
        cells += ["not run"] * (len(SEEDS) - len(runs))
        mean = fmean(g["difference"] for g in gains)
        kept = fmean(run["metrics"]["distance"]["aligned"] / run["metrics"]["distance"]["base"] for run in runs)
        kl = fmean(run["kl"] for run in runs)
        line = f"| {name} | {runs[0]['forwards']} | {' | '.join(cells)} | {mean:+.2f} | {100 * kept:.0f} % | {kl:.1f} |"
        rows.append((mean, line))
    return "\n".join([*lines, *(line for _, line in sorted(rows, reverse=True))]) + "\n"


def main() -> None:
    """Run the named variants, or all, from every seed that has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", help=f"of: {', '.join(VARIANTS)}")
    wanted = parser.parse_args().variants or list(VARIANTS)
    torch.set_num_threads(1)
    path = RESULTS / "sweep.json"
    saved: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"variants": {}}
    for seed in SEEDS:
        for name in wanted:
            variant = saved["variants"].setdefault(name, {"overrides": list(VARIANTS[name]), "seeds": {}})
            if str(seed) in variant["seeds"]:
                continue
            variant["seeds"][str(seed)] = measure(VARIANTS[name], seed)
            saved["environment"] = environment("cpu")
            path.write_text(json.dumps(saved, indent=1) + "\n")
            (RESULTS / "sweep.md").write_text(table({k: v for k, v in saved["variants"].items() if v["seeds"]}))
            print(f"{name}, seed {seed}: {json.dumps(variant['seeds'][str(seed)])}", flush=True)


if __name__ == "__main__":
    main()
