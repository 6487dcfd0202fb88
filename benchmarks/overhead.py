"""How much of a training iteration is not spent in the models: its time over that of its raw model calls alone.

    taskset -c 1 python benchmarks/overhead.py recipes/emoji_tailorpo_g.yaml [key=value ...] [--repeats 9]

Each repeat runs one real update (with its line in metrics.jsonl), noting what the UNet, the decoder and the rewards
were called with; then the very same calls are made once more, bare, with the same gradients, and nothing between them.
Updates and replays alternate, so that a machine that slows down slows both; the ratio is taken per repeat. Reported is
the CPU time of this process, which other processes on the machine disturb least, and the wall clock beside it.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import Call, Observed, observe, save

from tailorpo import keeping
from tailorpo.pair_gallery import gallery_updates
from tailorpo.run import Run


def replay(observed: Observed, call: Call) -> None:
    """Make one raw call, with the backward it had."""
    model: Any = observed.model
    first, *rest = call.inputs
    leaf = first.clone().requires_grad_(call.gradient == "input")
    with torch.set_grad_enabled(call.gradient is not None), model.reference() if call.reference else nullcontext():
        if call.kind == "unet":
            outputs = [model.unet(leaf, rest[0], encoder_hidden_states=rest[1], return_dict=False)[0]]
        elif call.kind == "decode":
            vae = model.tiny_vae if call.draft else model.vae
            outputs = [vae.decode(leaf, return_dict=False)[0]]
        else:
            outputs = [rest[1](leaf, rest[0])]
    if call.gradient is not None:
        targets = [leaf] if call.gradient == "input" else list(model.trainable().values())
        torch.autograd.grad(outputs, targets, [torch.ones_like(output) for output in outputs])


def finish(observed: Observed) -> None:
    """Wait for an accelerator to be done."""
    if observed.model.device.type == "cuda":
        torch.cuda.synchronize()


def timed_replay(observed: Observed, calls: list[Call]) -> tuple[float, float, dict[str, float]]:
    """(wall, CPU, CPU by kind of call) seconds of all calls of an update."""
    observed.watch.on = False
    by_kind: defaultdict[str, float] = defaultdict(float)
    wall, cpu = time.perf_counter(), time.process_time()
    for call in calls:
        started = time.process_time()
        replay(observed, call)
        kind = {None: "forward", "weights": "forward and backward", "input": "forward and input gradient"}
        by_kind[f"{call.kind}, {kind[call.gradient]}"] += time.process_time() - started
    finish(observed)
    result = time.perf_counter() - wall, time.process_time() - cpu, dict(by_kind)
    observed.watch.on = True
    return result


def timed_update(observed: Observed, update: int) -> tuple[float, float]:
    """(wall, CPU) seconds of one update as `train` runs it; its calls are left in `observed.watch.calls`."""
    observed.watch.calls.clear()
    wall, cpu = time.perf_counter(), time.process_time()
    metrics = observed.session.update(update)
    observed.directory.append_metrics(metrics)
    finish(observed)
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    run = Run.load(options.recipe, options.overrides)
    plain = [update for update in range(run.updates) if update + 1 not in gallery_updates(run.updates)]
    walls: list[tuple[float, float]] = []
    cpus: list[tuple[float, float]] = []
    kinds: list[dict[str, float]] = []
    with TemporaryDirectory() as folder:
        observed = observe(run, Path(folder) / "run")
        timed_update(observed, plain[0])  # warm: caches of prompts, memory, kernels
        timed_replay(observed, list(observed.watch.calls))
        for update in plain[1 : options.repeats + 1]:
            wall, cpu = timed_update(observed, update)
            raw_wall, raw_cpu, by_kind = timed_replay(observed, list(observed.watch.calls))
            walls.append((wall, raw_wall))
            cpus.append((cpu, raw_cpu))
            kinds.append(by_kind)
            print(f"update {cpu:6.2f} s, its raw calls {raw_cpu:6.2f} s, ratio {cpu / raw_cpu:.3f}", flush=True)
        started = time.perf_counter()
        keeping.save(observed.session, 1)
        checkpoint = time.perf_counter() - started
    result = {
        "recipe": options.recipe.name,
        "overrides": options.overrides,
        "repeats": len(cpus),
        "ratio_cpu": round(median(update / raw for update, raw in cpus), 4),
        "ratio_wall": round(median(update / raw for update, raw in walls), 4),
        "ratios_cpu": [round(update / raw, 4) for update, raw in cpus],
        "update_seconds_cpu": round(median(update for update, _ in cpus), 3),
        "update_seconds_wall": round(median(update for update, _ in walls), 3),
        "raw_seconds_cpu": round(median(raw for _, raw in cpus), 3),
        "raw_seconds_cpu_by_call": {name: round(median(row[name] for row in kinds), 3) for name in kinds[0]},
        "checkpoint_seconds_wall": round(checkpoint, 3),
    }
    print("\n".join(f"{name}: {value}" for name, value in result.items()))
    save("overhead", result)


if __name__ == "__main__":
    main()
