"""torch.compile and channels_last on the UNet of a TailorPO step: does either help, and what does compiling cost?

    python benchmarks/compile.py [--turns 7] [--device cuda]

A step is what inline TailorPO asks of the network: a forward that keeps its graph, a forward of the reference, and the
backward to the LoRA, all with guidance. Four ways (plain, compiled, each with and without channels_last) in turns, so
that a busy machine slows all of them; medians of CPU seconds, and the first call, in seconds of the clock, apart. On a
GPU: Stable Diffusion 1.5 itself, random weights in bfloat16, 64 x 64 latents, without channels_last (slower there:
throughput.py), all in seconds of the clock.
`recompiled` counts how often torch compiled again when the reference was switched to after the policy.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any, cast

import torch
from common import RESULTS, save
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from tailorpo.models import LoRA, ModelConfig
from tailorpo.models.trained import Adapter

ROWS = 2
WAYS = {
    "plain": (False, False),
    "channels_last": (False, True),
    "compiled": (True, False),
    "compiled, channels_last": (True, True),
}


def miniature() -> UNet2DConditionModel:
    """The bundled one."""
    model: Any = ModelConfig(path="emoji", lora=None).load("cpu")
    return model.unet


def narrow_sd15() -> UNet2DConditionModel:
    """Stable Diffusion 1.5's blocks with a tenth of its channels and random weights, for latents of 32 x 32."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=32,
        cross_attention_dim=96,
        block_out_channels=(32, 64, 128, 128),
        attention_head_dim=8,
        norm_num_groups=8,
    )


def sd15() -> UNet2DConditionModel:
    """Stable Diffusion 1.5 with random weights."""
    with torch.device("cuda"):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return cast(Any, unet).to(torch.bfloat16)


def step_of(unet: UNet2DConditionModel, *, compiled: bool, channels_last: bool) -> Callable[[], list[Tensor]]:
    """One step on the network with a fresh LoRA; returns the outputs and the gradients."""
    adapter = Adapter(unet.eval().requires_grad_(False), LoRA(rank=8, targets="attention+conv"), seed=0)
    network: Any = unet
    if channels_last:
        network.to(memory_format=torch.channels_last)
    call = torch.compile(network) if compiled else network
    size, generator = int(unet.config["sample_size"]), torch.Generator().manual_seed(1)
    place: dict[str, Any] = {"device": network.device, "dtype": network.dtype}
    x = torch.randn(2 * ROWS, int(unet.config["in_channels"]), size, size, generator=generator).to(**place)
    text = torch.randn(2 * ROWS, 77, int(unet.config["cross_attention_dim"]), generator=generator).to(**place)
    time_ = torch.tensor([500], device=network.device)
    trained = [each for each in unet.parameters() if each.requires_grad]

    def step() -> list[Tensor]:
        policy = call(x, time_, encoder_hidden_states=text, return_dict=False)[0]
        with torch.no_grad(), adapter.reference():
            reference = call(x, time_, encoder_hidden_states=text, return_dict=False)[0]
        gradients = torch.autograd.grad(policy.square().sum(), trained)
        return [policy.detach(), reference, *gradients]

    return step


def clock(device: str) -> float:
    """Seconds: CPU time of this process, or wall time once a GPU is done."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure(make: Callable[[], UNet2DConditionModel], turns: int, device: str) -> dict[str, Any]:
    """All ways on networks of the same weights, in turns."""
    ways = {name: way for name, way in WAYS.items() if device == "cpu" or not way[1]}
    steps = {name: step_of(make(), compiled=compiled, channels_last=last) for name, (compiled, last) in ways.items()}
    found: dict[str, Any] = {}
    exact = steps["plain"]()
    for name, step in steps.items():
        counters.clear()
        started = time.perf_counter()
        outputs = step()
        graphs = int(counters["stats"]["unique_graphs"])
        found[name] = {"first_seconds": round(time.perf_counter() - started, 2), "graphs": graphs}
        for _ in range(2):
            again = step()
        found[name]["recompiled"] = int(counters["stats"]["unique_graphs"]) - graphs
        found[name]["repeats_its_bits"] = all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
        found[name]["policy_is_reference"] = bool(torch.equal(outputs[0], outputs[1]))  # the LoRA is fresh: zero
        found[name]["largest_relative_difference"] = max(
            float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(outputs, exact, strict=True)
        )
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(turns):
        for name, step in steps.items():
            started = clock(device)
            step()
            seconds[name].append(clock(device) - started)
    for name, each in seconds.items():
        found[name]["seconds"] = round(median(each), 4)
        pairs = zip(seconds["plain"], each, strict=True)
        found[name]["times_as_fast"] = round(median(plain / own for plain, own in pairs), 3)
        saved = found["plain"]["seconds"] - found[name]["seconds"]
        found[name]["steps_to_pay_back"] = round(found[name]["first_seconds"] / saved) if saved > 0 else None
    return found


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    gpu = options.device == "cuda"
    if not gpu:
        torch.set_num_threads(1)
    inductor.force_disable_caches = True
    lines = [
        f"| forward, reference, backward; {ROWS} rows with guidance; median of {options.turns} turns"
        f" | {'' if gpu else 'CPU '}seconds"
        " | times as fast as plain | first call, s | steps until it has paid back | graphs, compiled again"
        " | policy = reference, bits |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    results: dict[str, Any] = {}
    small = {"miniature": miniature, "SD 1.5's blocks, narrow": narrow_sd15}
    for title, make in ({"SD 1.5, bfloat16": sd15} if gpu else small).items():
        torch.compiler.reset()
        results[title] = measure(make, options.turns, options.device)
        for name, row in results[title].items():
            lines.append(
                f"| {title}, {name} | {row['seconds']:.3f} | {row['times_as_fast']:.2f} | {row['first_seconds']:.1f} |"
                f" {row['steps_to_pay_back'] or 'never'} | {row['graphs']}, {row['recompiled']} |"
                f" {'yes' if row['policy_is_reference'] else 'no'} |"
            )
            print(lines[-1], flush=True)
    name = "compile_cuda" if gpu else "compile"
    save(name, {"turns": options.turns, "rows": ROWS, "results": results}, options.device)
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
