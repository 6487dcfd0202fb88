"""What a result was computed on: versions, processor, threads. Kept next to numbers that may depend on it."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("tailorpo", "torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "scipy", "pillow")


def environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """Names and versions, in the order to show them; no user, host or folder names."""
    device = torch.device(device)
    found = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
