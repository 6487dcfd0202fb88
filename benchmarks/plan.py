"""What `tailorpo plan` predicts against what a real update does, on the bundled miniature.

    python benchmarks/plan.py [--repeats 3]

Operations: torch's FlopCounterMode around a real Session.update. Memory: the running sum of the profiler's allocations
and releases over one, weights and optimizer excluded. Seconds: CPU time of updates against the plan's timed calls, the
two in turns, median of the ratios. Prompts are encoded beforehand. The plan is made from config.json files alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import RESULTS, observe, save
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from tailorpo.plan import Parts, Plan, make_plan, rows_together
from tailorpo.plan.accounting import unit_costs
from tailorpo.run import Run

TAILORPO = {"name": "tailorpo", "train_steps": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "TailorPO, inline": TAILORPO,
    "TailorPO, buffered": {**TAILORPO, "update": "buffered"},
    "TailorPO-G, full Jacobian": {**TAILORPO, "guidance": {"form": "sigma", "k": 1.0}},
    "TailorPO-G, accept/reject": {**TAILORPO, "guidance": {"form": "sigma", "k": 1.0, "accept_reject": True}},
    "TailorPO-G, Jacobian-free": {**TAILORPO, "guidance": {"form": "sigma", "k": 1.0, "jacobian": "free"}},
    "D3PO, buffered": {"name": "d3po"},
    "D3PO, inline": {"name": "d3po", "update": "inline"},
    "SPO, inline": {"name": "spo", "update": "inline"},
    "SPO, buffered, no pair dropped": {"name": "spo", "threshold": 0.0},
    "DDPO": {"name": "ddpo"},
    "reward backpropagation, last step": {"name": "reward_backprop"},
    "reward backpropagation, last 3 steps": {"name": "reward_backprop", "last_steps": 3},
}
TIMED = ("TailorPO, inline", "TailorPO-G, full Jacobian", "D3PO, buffered", "DDPO")
_ATEN: Any = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


CPU_ATTENTION: dict[Any, Any] = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""The CPU's fused attention, which torch's counter leaves out."""


def recipe(algorithm: dict[str, Any]) -> Run:
    """Eight steps on the miniature, its preference as reward."""
    return Run.from_dict(
        {
            "updates": 100,
            "model": {"path": "emoji", "lora": {"rank": 8, "targets": "attention+conv"}},
            "sampler": {"steps": 8, "guidance_scale": 1.5},
            "algorithm": algorithm,
            "reward": {"name": "emoji_preference"},
            "prompts": {"list": ["a cat", "a dog"]},
            "batch": {"trajectories": 4, "micro": 2},
        }
    )


class Real:
    """A session whose prompts are encoded already."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run = run
        self.observed = observe(run, folder)
        self.observed.watch.on = False
        session = self.observed.session
        prompts = ["a cat", "a dog"]
        session.policy.model.encode(prompts)
        with torch.no_grad():
            session.score(torch.zeros(2, *session.policy.model.picture_shape), prompts)
        self.session, self.next = session, 50  # where no pictures are kept

    def update(self) -> None:
        """One update."""
        self.session.update(self.next)
        self.next += 1

    def operations(self) -> float:
        """Of one update, as torch counts them."""
        counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
        with counter:
            self.update()
        return float(counter.get_total_flops())

    def peak_bytes(self) -> int:
        """The most that one update has allocated at once."""
        self.update()  # the optimizer's moments, and whatever else is kept from then on
        for parameter in self.session.policy.model.trainable().values():
            parameter.grad = torch.zeros_like(parameter)  # counted by the plan among what is always there
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.update()
        with TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
        now = peak = 0
        for _, size in sorted(changes, key=lambda change: change[0]):
            now += size
            peak = max(peak, now)
        return peak


def per_update(plan: Plan) -> float:
    """Operations of one update."""
    return plan.operations("training") / plan.run.updates


def time_ratio(real: Real, plan: Plan, repeats: int) -> dict[str, Any]:
    """CPU seconds of an update over those predicted from timed calls, in turns."""
    parts = Parts.build(real.run, "cpu", architecture=None, measure=False)
    pairs: list[tuple[float, float]] = []

    def seconds(call: Any) -> float:
        call()
        started = time.process_time()
        call()
        return time.process_time() - started

    real.update()
    for _ in range(repeats):
        started = time.process_time()
        real.update()
        spent = time.process_time() - started
        units = unit_costs(parts.calls, seconds, **rows_together(plan))
        work = [work for work in plan.work if work.phase == "training"]
        predicted = real.run.batch.trajectories * sum(each.count * units[each.kind] for each in work)
        pairs.append((predicted, spent))
    return {
        "ratio": round(median(predicted / spent for predicted, spent in pairs), 3),
        "ratios": [round(predicted / spent, 3) for predicted, spent in pairs],
    }


def main() -> None:
    """Measure every variant, print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = ("operations, predicted / counted", "peak memory, predicted / measured", "CPU time, predicted / measured")
    lines = [
        f"| miniature, 8 steps, 4 trajectories in twos | {' | '.join(columns)} |",
        "| --- | ---: | ---: | ---: |",
    ]
    results: list[dict[str, Any]] = []
    for name, algorithm in VARIANTS.items():
        run = recipe(algorithm)
        plan = make_plan(run, cpu=True)
        with TemporaryDirectory() as folder:
            real = Real(run, Path(folder) / "run")
            flops, bytes_ = real.operations(), real.peak_bytes()
            timed = time_ratio(real, plan, options.repeats) if name in TIMED else None
        activations = max(size for phase, size in plan.moments.items() if phase != "evaluation")
        row = {
            "algorithm": name,
            "operations": {
                "predicted": per_update(plan),
                "counted": flops,
                "ratio": round(per_update(plan) / flops, 4),
            },
            "peak_bytes": {"predicted": activations, "measured": bytes_, "ratio": round(activations / bytes_, 3)},
            "seconds": timed,
        }
        results.append(row)
        lines.append(
            f"| {name} | {row['operations']['ratio']:.4f} | {row['peak_bytes']['ratio']:.2f} |"
            f" {timed['ratio'] if timed else '-'} |"
        )
        print(lines[-1], flush=True)
    table = "\n".join(lines) + "\n"
    save("plan", {"repeats": options.repeats, "results": results})
    (RESULTS / "plan.md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
