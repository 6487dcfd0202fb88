"""How fast a device computes: a small table of data sheets, or this machine, measured.

    seconds = operations / (peak * efficiency)

Peaks are dense (no sparsity), with float32 accumulation; float32 is without TF32, which torch leaves off for matrix
products. Sources: NVIDIA's data sheets of H100 SXM, H200 SXM, A100 80 GB SXM, L4, L40S, T4, and the white papers of the
Ada (RTX 4090) and Ampere GA102 (RTX 3090) architectures. What share of the peak is reached is an assumption.

Left out: prices, which change; `--price` takes yours.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from tailorpo.models import DType
from tailorpo.models.loading import DTYPES

EFFICIENCY: dict[DType, float] = {"bfloat16": 0.25, "float16": 0.25, "float32": 0.6}
"""Share of the peak that is reached, where nothing is measured. Half precision: published timings of diffusers' eager
pipelines on an A100 work out at 0.17 (SD 1.5, 512 px, batch 1) and 0.40 (SDXL, 1024 px); see docs/plan.md. No timing is
behind that of float32, whose peak is so much lower that more of it is reached."""


@dataclass(frozen=True)
class Device:
    """A device.

    Attributes:
        peak: operations per second by dtype; a missing one is not supported.
        memory: bytes; None where it is not known.
        measured: whether `peak` was measured here.
    """

    name: str
    peak: dict[DType, float]
    memory: float | None
    measured: bool = False


def _nvidia(name: str, half: float, single: float, gigabytes: int, *, bfloat16: bool = True) -> Device:
    peak: dict[DType, float] = {"float16": half * 1e12, "float32": single * 1e12}
    if bfloat16:
        peak["bfloat16"] = half * 1e12
    return Device(name, peak, gigabytes * 1e9)


DEVICES = {
    "h200": _nvidia("H200 141 GB", 989, 67, 141),
    "h100": _nvidia("H100 80 GB", 989, 67, 80),
    "a100": _nvidia("A100 80 GB", 312, 19.5, 80),
    "l40s": _nvidia("L40S 48 GB", 362, 91.6, 48),
    "rtx4090": _nvidia("RTX 4090 24 GB", 165, 82.6, 24),
    "rtx3090": _nvidia("RTX 3090 24 GB", 71, 35.6, 24),
    "l4": _nvidia("L4 24 GB", 121, 30.3, 24),
    "t4": _nvidia("T4 16 GB", 65, 8.1, 16, bfloat16=False),
}
"""Names for `--device`, with TFLOP/s in half precision and float32."""


def this_device(device: torch.device, dtype: DType) -> Device:
    """The present machine: its fastest matrix product in the network's dtype and in float32, in a second or two."""
    kinds: tuple[DType, ...] = (dtype, "float32")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"this machine's {device.type}"
    memory: float | None = None
    if device.type == "cuda":
        memory = float(cast(Any, torch.cuda.get_device_properties(device)).total_memory)
    return Device(name, {kind: matmul_rate(device, kind) for kind in kinds}, memory, measured=True)


def matmul_rate(device: torch.device, dtype: DType) -> float:
    """Operations per second of the best of some square matrix products."""
    side = 8192 if device.type == "cuda" else 512
    a = anything(side, side, device=device).to(DTYPES[dtype])
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def anything(*shape: int, device: torch.device | str) -> Tensor:
    """Numbers like random ones, with no generator behind them. Equal numbers would do for counting, but a GPU that is
    at its limit of power computes with them faster than with any that occur."""
    return torch.arange(math.prod(shape), device=device, dtype=torch.float32).sin().view(shape)
