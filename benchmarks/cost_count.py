"""Network evaluations per trajectory, counted by hooks on the UNet, against each method's `cost` and the contract.

    python benchmarks/cost_count.py [--model emoji]

T = 20 steps; TailorPO trains 5 of them, D3PO and DDPO all, SPO those from the fifth on. D3PO's trajectory is a pair of
chains. F is one guided forward of one latent (two rows of the UNet's batch), B one backward
for the loss, I one backward to the latents of a pair (guidance), R one picture decoded and scored. A backward I goes
through both candidates, because the batch that is differentiated does not know its winners yet: two rows of work each.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import RESULTS, observe, save

from tailorpo.run import Run

TAILORPO = {"name": "tailorpo", "train_steps": 5}
SIGMA = {"form": "sigma", "k": 0.5}
VARIANTS: dict[str, tuple[dict[str, Any], tuple[int, int, int] | None]] = {
    # name: (settings of the algorithm, (F, B, I) that the project's contract promises)
    "TailorPO, inline": ({**TAILORPO, "update": "inline"}, (30, 5, 0)),
    "TailorPO, buffered": ({**TAILORPO, "update": "buffered"}, (35, 5, 0)),
    "TailorPO-G, inline": ({**TAILORPO, "guidance": SIGMA}, (35, 5, 5)),
    "TailorPO-G, buffered": ({**TAILORPO, "update": "buffered", "guidance": SIGMA}, None),
    "TailorPO-G, inline, accept/reject": ({**TAILORPO, "guidance": {**SIGMA, "accept_reject": True}}, None),
    "TailorPO-G, inline, Jacobian-free": ({**TAILORPO, "guidance": {**SIGMA, "jacobian": "free"}}, None),
    "D3PO, buffered (the official schedule)": ({"name": "d3po"}, (120, 40, 0)),
    "D3PO, inline": ({"name": "d3po", "update": "inline"}, (80, 40, 0)),
    "DDPO": ({"name": "ddpo"}, (40, 20, 0)),
    "SPO, 4 candidates, buffered, no pair dropped": ({"name": "spo", "threshold": 0.0}, (97, 16, 0)),
    "SPO, 4 candidates, inline": ({"name": "spo", "update": "inline"}, (96, 16, 0)),
    "reward backpropagation, last step": ({"name": "reward_backprop"}, (20, 1, 0)),
}
TRAJECTORIES, MICRO = 4, 2


def count(model: str, algorithm: dict[str, Any]) -> tuple[dict[str, float], dict[str, int]]:
    """(counted, said by `cost`) per trajectory, of one update of four trajectories in batches of two."""
    run = Run.from_dict(
        {
            "updates": 1,
            "model": {"path": model},
            "sampler": {"steps": 20, "guidance_scale": 5.0},
            "algorithm": algorithm,
            "reward": {"name": "brightness"},
            "prompts": {"list": ["a cat", "a dog"]},
            "batch": {"trajectories": TRAJECTORIES, "micro": MICRO},
        }
    )
    with TemporaryDirectory() as folder:
        observed = observe(run, Path(folder) / "run")
        observed.session.update(0)
        rows: Counter[str] = Counter()
        for call in observed.watch.calls:
            rows[call.kind] += call.items
            rows[f"{call.kind} {call.gradient}"] += call.items
            rows[f"{call.kind} {call.gradient}, calls"] += 1
        steps = run.algorithm.trained_steps(20, noise=observed.session.noise, update=0)
    counted = {
        "forwards": rows["unet"] / 2,
        "backwards": rows["unet weights"] / 2,
        # One call serves a whole micro-batch of trajectories, and is one backward for each of them.
        "input_gradients": rows["unet input, calls"] * MICRO,
        "reward_queries": rows["reward"],
    }
    assert rows["decode"] == rows["reward"]
    assert rows["unet input"] / 2 == 2 * counted["input_gradients"]  # both candidates
    said = asdict(run.algorithm.cost(20, steps))
    return {name: value / TRAJECTORIES for name, value in counted.items()}, {name: said[name] for name in counted}


def main() -> None:
    """Count every variant, print and save the table, and fail where the contract is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji", help="a bundled model, or a diffusers folder")
    model = parser.parse_args().model
    lines = ["| method, T = 20 | F | B | I | R | contract |", "| --- | ---: | ---: | ---: | ---: | --- |"]
    results: list[dict[str, Any]] = []
    wrong: list[str] = []
    for name, (algorithm, contract) in VARIANTS.items():
        counted, said = count(model, algorithm)
        network = tuple(counted[key] for key in ("forwards", "backwards", "input_gradients"))
        kept = contract is None or network == contract
        if counted != said or not kept:
            wrong.append(f"{name}: counted {counted}, cost() says {said}, the contract {contract}")
        promise = "-" if contract is None else f"{contract[0]}F + {contract[1]}B" + " + 5I" * bool(contract[2])
        numbers = " | ".join(f"{value:g}" for value in counted.values())
        lines.append(f"| {name} | {numbers} | {promise}{'' if kept else ' (NOT KEPT)'} |")
        results.append({"algorithm": name, "counted": counted, "cost_method": said, "contract": contract})
    lines += [
        "",
        "F: guided forward of one latent. B: backward of the loss. R: picture decoded and scored. I: backward to the",
    ]
    lines += ["latents of a pair; it goes through both candidates, so it is the work of two gradients of one latent."]
    table = "\n".join(lines) + "\n"
    print(table)
    save("cost_count", {"unit": "per trajectory", "steps": 20, "results": results})
    (RESULTS / "cost_count.md").write_text(table, encoding="utf-8")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
