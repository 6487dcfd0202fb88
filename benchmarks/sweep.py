"""The recorded sweep behind the settings of the miniature's recipes.

    python benchmarks/sweep.py [VARIANT ...]

Each variant is the recipe with some settings overridden, trained with the SAME number of network evaluations and
measured on the same prompts and noises: the trained reward, the held-out judge, diversity and KL. A finished variant is
skipped, so the sweep can be stopped and continued. Writes benchmarks/results/sweep.json and sweep.md.

The measurements that guidance scale and trained steps rest on (where the step reward ranks siblings) are made by
`python -m miniature` and stand in docs/miniature.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
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
MEASURE = ("eval.seeds=2", "eval.prompts_unseen=null")

VARIANTS: dict[str, tuple[str, ...]] = {
    "recipe": (),
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
}


def measure(overrides: tuple[str, ...]) -> dict[str, Any]:
    """Train and evaluate one variant."""
    plan = Run.load(RECIPE, [*overrides, *MEASURE])
    algorithm, steps = plan.algorithm, plan.sampler.steps
    cost = algorithm.cost(steps, algorithm.trained_steps(steps, noise=Noise(plan.seed), update=0))
    updates = max(1, round(FORWARDS / (cost.forwards * plan.batch.trajectories)))
    run = Run.load(RECIPE, [*overrides, *MEASURE, f"updates={updates}", f"checkpoint_every={updates}"])
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory.create(Path(folder) / "run", run)
        model = train(run, directory, reporter=Silent())
        result = evaluate(run, directory, model, reporter=Silent())["groups"]["seen"]["metrics"]
        last = directory.metrics()[-1]
        every = directory.metrics()
    return {
        "overrides": list(overrides),
        "updates": updates,
        "forwards": last["forwards"],
        "seconds": round(sum(row["seconds"] for row in every), 1),
        "kl": last["kl"],
        "metrics": {
            name: {key: value[key] for key in ("base", "aligned", "difference", "low", "high")}
            for name, value in result.items()
            if value is not None
        },
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| variant | F | trained reward | held-out judge | good pictures, base to aligned | diversity | KL, nats |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in results.items():
        metrics = row["metrics"]

        def change(metric: str, metrics: Any = metrics) -> str:
            value = metrics[metric]
            return f"{value['difference']:+.2f} [{value['low']:+.2f}, {value['high']:+.2f}]"

        good = metrics["good"]
        diversity = metrics["distance"]["aligned"] / metrics["distance"]["base"]
        lines.append(
            f"| {name} | {row['forwards']} | {change('reward')} | {change('judge')} |"
            f" {100 * good['base']:.0f} to {100 * good['aligned']:.0f} % | {100 * diversity:.0f} % | {row['kl']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the named variants, or all, that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", help=f"of: {', '.join(VARIANTS)}")
    wanted = parser.parse_args().variants or list(VARIANTS)
    torch.set_num_threads(1)
    path = RESULTS / "sweep.json"
    saved: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"variants": {}}
    for name in wanted:
        if name in saved["variants"]:
            continue
        saved["variants"][name] = measure(VARIANTS[name])
        saved["environment"] = environment("cpu")
        path.write_text(json.dumps(saved, indent=1) + "\n")
        (RESULTS / "sweep.md").write_text(table(saved["variants"]))
        print(f"{name}: {json.dumps(saved['variants'][name]['metrics'])}", flush=True)


if __name__ == "__main__":
    main()
