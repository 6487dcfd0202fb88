"""How fast training is, and how much memory it takes: on the miniature without a GPU, on Stable Diffusion 1.5 with one.

    python benchmarks/throughput.py [--repeats 5] [--device cuda] [--parts speed memory]

The networks have random weights (nothing is downloaded): the miniature with its preference model on a CPU; on a GPU SD
1.5 at 512 x 512 in bfloat16 with an aesthetic-size reward (ViT-L/14).

(a) UNet forward and backward, operations per second over those of a matrix product, by batch; on a GPU also with
    channels_last
(b) time of an update over that of its raw model calls (overhead.py)
(c) samples per second, a sample being what is trained on of one trajectory of 20 steps (of D3PO: of a pair of chains):
        tailorpo   Session.update, everything in it                          30 F +  5 B, 11 pictures scored
                   the same without the pictures' ends (`finish: false`)     28 F +  5 B, 10 pictures scored
                   the same, KL of one trajectory an update (the default)    45 F of one of them
        naive      a bare loop: a forward per candidate, policy, reference   50 F + 10 B, 11 pictures scored
        d3po       a bare loop in the official schedule                     120 F + 40 B,  2 pictures scored
    once with the tiny decoder (`model.tiny_vae`) for the pictures on the way, once with the full one for all, in every
    schedule alike. The bare loops make model calls and nothing else (no noise, loss, metrics or optimizer), which
    favours them. The KL of untrained steps is measured in the third row only (15 F an update, whatever its size).
(d), (e) peak memory against the plan's, where torch accounts for it (CUDA): one update of TailorPO and TailorPO-G on
    SD 1.5; the plan's phases on SDXL at 1024 x 1024; each also with gradient checkpointing, and with TAESD as well

Variants take turns within a run, medians of ratios; times are CPU seconds of this process without a GPU, so that other
processes disturb least. Results of a CPU and of a GPU are kept apart, those of each part as soon as it is done; the
table has what there is of both.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bare_loops import STEPS, TRAINED, BareLoops
from common import RESULTS, Observed, observe_model, save
from overhead import finish, timed_replay, timed_update
from torch import Tensor

from tailorpo.describe import trajectory_cost
from tailorpo.plan import Parts, phases
from tailorpo.plan.accounting import operations, peak_bytes
from tailorpo.plan.devices import matmul_rate
from tailorpo.run import Run

PROMPTS = ["a cat", "a dog"]
GOALS = {("sd15", False): 8, ("sd15", True): 12, ("sdxl", False): 24, ("sdxl", True): 24}
"""Peak memory in GiB by architecture and whether it is guided."""
PARTS = ("utilisation", "speed", "speed_full_decoder", "memory")
SMALLER = {0: "", 1: ", gradient checkpointing", 2: ", gradient checkpointing, TAESD"}
SIGMA = {"form": "sigma", "k": 1.0}


class RandomReward:
    """A reward network with random weights, as training calls it."""

    name = "random"
    differentiable = True

    def __init__(self, score: Callable[[Tensor], Tensor]) -> None:
        self._score = score

    def __call__(self, images: Tensor, prompts: Any) -> Tensor:
        return self._score(images)


def recipe(
    device: torch.device,
    *,
    micro: int,
    architecture: str = "sd15",
    tiny: bool = False,
    checkpointing: bool = False,
    channels_last: bool = False,
    **algorithm: Any,
) -> Run:
    """TailorPO on the network of the device."""
    gpu = device.type == "cuda"
    aesthetic = {"name": "aesthetic", "path": "random"}
    return Run.from_dict(
        {
            "updates": 100,
            "model": {
                "path": architecture if gpu else "emoji",
                "dtype": "bfloat16" if gpu else "float32",
                "lora": {"rank": 4} if gpu else {"rank": 8, "targets": "attention+conv"},
                "tiny_vae": None if not tiny else "taesd" if gpu else "emoji",
                "gradient_checkpointing": checkpointing,
                "channels_last": channels_last,
            },
            "sampler": {"steps": STEPS, "guidance_scale": 5.0},
            "algorithm": {"name": "tailorpo", "train_steps": TRAINED, "kl_measured": 0, **algorithm},
            "reward": aesthetic if gpu else {"name": "emoji_preference"},
            "prompts": {"list": PROMPTS},
            "batch": {"trajectories": micro, "micro": micro},
        },
        files=False,
    )


def session(run: Run, parts: Parts, folder: Path) -> Observed:
    """A training session on networks with random weights; its prompts count as encoded."""
    model: Any = parts.network.model
    cond = parts.network.conditioning(1)
    texts = [cond.positive, *([cond.pooled_positive] if cond.pooled_positive is not None else [])]
    model._encoded = dict.fromkeys(["", *PROMPTS], tuple(each[0] for each in texts))
    score = parts.rewards[0].score
    assert score is not None
    return observe_model(run, folder, model, [(RandomReward(score), 1.0)])


def clock(device: torch.device) -> float:
    """Seconds: CPU time of this process, or wall time once a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call."""
    started = clock(device)
    call()
    return clock(device) - started


def utilisation(device: torch.device, *, repeats: int) -> list[dict[str, Any]]:
    """(a)"""
    gpu = device.type == "cuda"
    rows: list[dict[str, Any]] = []
    for channels_last in (False, True) if gpu else (False,):
        calls = build(recipe(device, micro=1, channels_last=channels_last), device).calls
        for batch in (1, 2, 4, 8, 16) if gpu else (1, 2, 4, 8):
            # On a CPU the peak is of the moment: the two take turns.
            work, shares, seconds = operations_of_training(batch, device), list[float](), list[float]()
            for _ in range(repeats + 1):
                peak = matmul_rate(device, "bfloat16") if gpu else cpu_rate()
                seconds.append(timed(lambda calls=calls, batch=batch: calls.forward(batch, "weights"), device))
                shares.append(work / seconds[-1] / peak)
            share, second = (round(median(each[1:]), 4) for each in (shares, seconds))
            rows.append({"batch": batch, "channels_last": channels_last, "share_of_matmul": share, "seconds": second})
    return rows


def cpu_rate() -> float:
    """Operations of a matrix product per CPU second."""
    a = torch.ones(512, 512)
    return 2 * 512**3 / min(timed(lambda: torch.mm(a, a), torch.device("cpu")) for _ in range(8))


def operations_of_training(rows: int, device: torch.device) -> float:
    """Of a forward and backward, counted on meta tensors."""
    calls = build(recipe(device, micro=1), "meta").calls
    return operations(lambda: calls.forward(rows, "weights"))


def build(run: Run, device: torch.device | str) -> Parts:
    """The run's networks with random weights."""
    path: Any = run.model.path
    return Parts.build(run, device, architecture=None if path == "emoji" else path, measure=False)


def speed(device: torch.device, *, micro: int, repeats: int, tiny: bool) -> Iterator[dict[str, Any]]:
    """(b) and (c), after each repeat what there is so far."""
    run = recipe(device, micro=micro, tiny=tiny)
    parts = build(run, device)
    loops = BareLoops(parts.calls, micro)
    seconds: dict[str, list[float]] = {}
    overheads: list[float] = []
    with TemporaryDirectory() as folder:
        observed = session(run, parts, Path(folder) / "run")
        steps = {"first": 4, "last": 16, "count": TRAINED}
        cut = recipe(device, micro=micro, tiny=tiny, train_steps=steps, finish=False)
        shorter = session(cut, parts, Path(folder) / "cut")
        logged = session(recipe(device, micro=micro, tiny=tiny, kl_measured=1), parts, Path(folder) / "logged")
        for other in (shorter, logged):
            other.watch.on = False
            other.session.update(50)

        def update(number: int) -> float:
            wall, cpu = timed_update(observed, number)
            return wall if device.type == "cuda" else cpu

        update(50)  # warm; no pictures are kept of these updates
        for repeat in range(repeats):
            spent = update(51 + repeat)
            wall, cpu, _ = timed_replay(observed, list(observed.watch.calls))
            overheads.append(spent / (wall if device.type == "cuda" else cpu))
            observed.watch.on = False
            finish(observed)
            taken = {
                "tailorpo": spent,
                "tailorpo, no ends": timed(lambda number=51 + repeat: shorter.session.update(number), device),
                "tailorpo, KL logged": timed(lambda number=51 + repeat: logged.session.update(number), device),
                "naive": timed(loops.naive, device),
                "d3po": timed(loops.d3po, device),
                "tailorpo, bare, network only": timed(loops.minimal, device),
                "naive, network only": timed(lambda: loops.naive(scored=False), device),
                "d3po, network only": timed(lambda: loops.d3po(scored=False), device),
            }
            observed.watch.on = True
            for name, value in taken.items():
                seconds.setdefault(name, []).append(value)
            yield {"micro": micro, "repeats": repeat + 1, **_ratios(overheads, seconds, micro)}


def _ratios(overheads: Sequence[float], seconds: Mapping[str, Sequence[float]], micro: int) -> dict[str, Any]:
    def times(slow: str, fast: str) -> float:
        return round(median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)), 2)

    bare = "tailorpo, bare, network only"
    return {
        "update_over_raw_calls": round(median(overheads), 3),
        "updates_over_raw_calls": [round(one, 3) for one in overheads],
        "against_d3po": times("d3po", "tailorpo"),
        "against_d3po_no_ends": times("d3po", "tailorpo, no ends"),
        "against_d3po_kl_logged": times("d3po", "tailorpo, KL logged"),
        "against_naive": times("naive", "tailorpo"),
        "against_d3po_network_only": times("d3po, network only", bare),
        "against_naive_network_only": times("naive, network only", bare),
        "seconds_per_sample": {name: round(median(values) / micro, 3) for name, values in seconds.items()},
    }


def memory(device: torch.device) -> list[dict[str, Any]]:
    """(d) and (e), in bytes; measured on CUDA only."""
    cuda = torch.device("cuda")
    rows: list[dict[str, Any]] = []
    kinds = [
        (title, architecture, guided, small)
        for title, architecture in (("SD 1.5, 512", "sd15"), ("SDXL, 1024", "sdxl"))
        for guided in (False, True)
        for small in SMALLER
    ]
    for title, architecture, guided, small in kinds:
        name = f"{title}, TailorPO{'-G' if guided else ''}{SMALLER[small]}"
        guidance = SIGMA if guided else None
        run = recipe(
            cuda, micro=1, architecture=architecture, checkpointing=small > 0, tiny=small > 1, guidance=guidance
        )
        planned = build(run, "meta")
        _, cost = trajectory_cost(run)
        training = phases(run, planned.calls, cost)["collect and train"]
        predicted = sum(planned.standing_bytes(run.optimizer).values()) + peak_bytes(training)
        row = {"what": name, "goal": GOALS[architecture, guided], "predicted_bytes": predicted}
        if device.type == "cuda":
            row |= most_bytes(run, whole=architecture == "sd15")
        print(row, flush=True)
        rows.append(row)
    return rows


def most_bytes(run: Run, *, whole: bool) -> dict[str, Any]:
    """What a GPU's memory held at most, weights included: of two updates, or of the plan's phases."""
    gc.collect()
    torch.cuda.empty_cache()
    parts = build(run, torch.device("cuda"))
    gc.collect()
    torch.cuda.reset_peak_memory_stats()  # the networks were built in float32
    try:
        with TemporaryDirectory() as folder:
            if whole:
                observed = session(run, parts, Path(folder) / "run")
                observed.watch.on = False
                for update in (50, 51):
                    observed.session.update(update)
            else:
                _, cost = trajectory_cost(run)
                phases(run, parts.calls, cost)["collect and train"]()
    except torch.OutOfMemoryError:
        return {"measured_bytes": None, "failed": "out of memory"}
    return {
        "measured_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def gibibytes(size: float | None) -> str:
    """In words."""
    return "not measured" if size is None else f"{size / 2**30:.1f} GiB"


def table(cpu: dict[str, Any], gpu: dict[str, Any]) -> str:
    """The results of both, in Markdown."""
    lines = ["| | goal | CPU, miniature | GPU, SD 1.5 |", "| --- | ---: | ---: | ---: |"]

    def row(what: str, goal: str, part: str, key: str) -> None:
        other = "speed" if key.endswith("network_only") else part
        found = [str(result.get(part, result.get(other, {})).get(key, "not measured")) for result in (cpu, gpu)]
        lines.append(f"| {what} | {goal} | {' | '.join(found)} |")

    row("update / its raw model calls", "<= 1.05", "speed", "update_over_raw_calls")
    row("the same, full decoder", "<= 1.05", "speed_full_decoder", "update_over_raw_calls")
    for key, what, goal in (("d3po", "D3PO's official schedule", ">= 4"), ("naive", "naive TailorPO", ">= 1.6")):
        row(f"samples per second over {what}, tiny decoder", goal, "speed", f"against_{key}")
        row("the same, full decoder", "", "speed_full_decoder", f"against_{key}")
        row("the same, network calls only", "", "speed_full_decoder", f"against_{key}_network_only")
    row("over D3PO's, without the pictures' ends, tiny decoder", "", "speed", "against_d3po_no_ends")
    row("the same, full decoder", "", "speed_full_decoder", "against_d3po_no_ends")
    row("over D3PO's, KL of one trajectory an update logged, tiny decoder", "", "speed", "against_d3po_kl_logged")
    shares = {
        (each.get("channels_last", False), each["batch"], place): each["share_of_matmul"]
        for place, result in (("cpu", cpu), ("gpu", gpu))
        for each in result.get("utilisation", [])
    }
    for last, batch in sorted({key[:2] for key in shares}):
        what = f"UNet forward and backward / matrix product, batch {batch:g}{', channels_last' if last else ''}"
        goal = ">= 0.55 at the best" if (last, batch) == (False, 1) else ""
        found = [
            f"{shares[last, batch, place]:.3g}" if (last, batch, place) in shares else "" for place in ("cpu", "gpu")
        ]
        lines.append(f"| {what} | {goal} | {' | '.join(found)} |")
    lines += ["", "| peak memory, bfloat16, batch 1, ViT-L/14 reward | goal | predicted | measured on a GPU |"]
    lines.append("| --- | ---: | ---: | ---: |")
    measured: dict[str, dict[str, Any]] = {each["what"]: each for each in gpu.get("memory", [])}
    memories: list[dict[str, Any]] = cpu.get("memory") or gpu.get("memory") or []
    for each in memories:
        most = measured.get(each["what"], {})
        found = most.get("failed") or gibibytes(most.get("measured_bytes"))
        lines.append(f"| {each['what']} | {each['goal']} GiB | {gibibytes(each['predicted_bytes'])} | {found} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--micro", type=int, default=2, help="trajectories at once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    names = {"cpu": "throughput", "cuda": "throughput_cuda"}
    kept = {place: load(name) for place, name in names.items()}
    result = kept[device.type]
    for part in options.parts:
        if part == "utilisation":
            result[part] = utilisation(device, repeats=options.repeats)
        elif part == "memory":
            result[part] = memory(device)
        else:
            tiny = part == "speed"
            for found in speed(device, micro=options.micro, repeats=options.repeats, tiny=tiny):
                result[part] = found
                save(names[device.type], result, device)
        print(result[part], flush=True)
        save(names[device.type], result, device)
    text = table(kept["cpu"], kept["cuda"])
    print(text)
    (RESULTS / "throughput.md").write_text(text, encoding="utf-8")


def load(name: str) -> dict[str, Any]:
    """The parts of a result that were measured before."""
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {part: found[part] for part in PARTS if part in found}


if __name__ == "__main__":
    main()
