"""tailorpo: align a text-to-image diffusion model with a reward by step-wise preference optimisation.

    from tailorpo import Run, RunDirectory
    from tailorpo.progress import Plain
    from tailorpo.train import train

    run = Run.load("recipes/emoji_tailorpo.yaml", ["updates=20"])
    model = train(run, RunDirectory.create("runs/first", run), reporter=Plain())

The names below are the public ones; they are imported when first used, so that `import tailorpo` is quick and does
nothing else.
`train`, `evaluate` and `report.write_report` are taken from their modules, which have the same names.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tailorpo.algorithms.d3po import D3PO
    from tailorpo.algorithms.ddpo import DDPO
    from tailorpo.algorithms.diffusion_dpo import DiffusionDPO
    from tailorpo.algorithms.reward_backprop import RewardBackprop
    from tailorpo.algorithms.spo import SPO
    from tailorpo.algorithms.tailorpo import Steps, TailorPO
    from tailorpo.errors import (
        CheckpointError,
        DivergedError,
        RewardError,
        RunFileError,
        StorageError,
        TailorpoError,
        UserError,
    )
    from tailorpo.futures import Continuations, Lookahead
    from tailorpo.guidance import SigmaGuidance, TargetGuidance
    from tailorpo.models import LoRA, ModelConfig
    from tailorpo.noise import Noise
    from tailorpo.policy import Policy
    from tailorpo.prompts import PromptsConfig
    from tailorpo.rewards import CustomReward, RewardEntry
    from tailorpo.rollout import sample_images
    from tailorpo.run import Batch, Eval, Optimizer, Run
    from tailorpo.rundir import RunDirectory
    from tailorpo.samplers import DDIM
    from tailorpo.step_choice import AutoSteps

__version__ = "0.1.0"

__all__ = [
    "D3PO",
    "DDIM",
    "DDPO",
    "SPO",
    "AutoSteps",
    "Batch",
    "CheckpointError",
    "Continuations",
    "CustomReward",
    "DiffusionDPO",
    "DivergedError",
    "Eval",
    "LoRA",
    "Lookahead",
    "ModelConfig",
    "Noise",
    "Optimizer",
    "Policy",
    "PromptsConfig",
    "RewardBackprop",
    "RewardEntry",
    "RewardError",
    "Run",
    "RunDirectory",
    "RunFileError",
    "SigmaGuidance",
    "Steps",
    "StorageError",
    "TailorPO",
    "TailorpoError",
    "TargetGuidance",
    "UserError",
    "__version__",
    "sample_images",
]

_MODULES = {
    "algorithms.d3po": ("D3PO",),
    "algorithms.ddpo": ("DDPO",),
    "algorithms.diffusion_dpo": ("DiffusionDPO",),
    "algorithms.reward_backprop": ("RewardBackprop",),
    "algorithms.spo": ("SPO",),
    "algorithms.tailorpo": ("Steps", "TailorPO"),
    "errors": (
        "CheckpointError",
        "DivergedError",
        "RewardError",
        "RunFileError",
        "StorageError",
        "TailorpoError",
        "UserError",
    ),
    "futures": ("Continuations", "Lookahead"),
    "guidance": ("SigmaGuidance", "TargetGuidance"),
    "models": ("LoRA", "ModelConfig"),
    "noise": ("Noise",),
    "policy": ("Policy",),
    "prompts": ("PromptsConfig",),
    "rewards": ("CustomReward", "RewardEntry"),
    "rollout": ("sample_images",),
    "run": ("Batch", "Eval", "Optimizer", "Run"),
    "rundir": ("RunDirectory",),
    "samplers": ("DDIM",),
    "step_choice": ("AutoSteps",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tailorpo' has no attribute {name!r}")
    return getattr(import_module(f"tailorpo.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
