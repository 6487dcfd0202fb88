"""Shared by all tests: one thread a process, and tiny models built once per session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch
from tiny import save_tiny_model

from tailorpo.models import LoRA, ModelConfig
from tailorpo.models.sd import StableDiffusion
from tailorpo.policy import Policy
from tailorpo.samplers import DDIM

torch.set_num_threads(1)
# The same on every machine; what there is to say of a GPU, tests/invariants/test_cuda.py says.
os.environ.setdefault("TAILORPO_DEVICE", "cpu")

# The same examples every time, and no verdict on speed: a failure is a change, not bad luck on a busy machine.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Stable Diffusion in diffusers' folder format."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def tiny_policy(tiny_folder: Path) -> Callable[..., Policy]:
    """Makes a policy over the tiny model; `moved` sets its LoRA to something else than zero."""

    def make(
        *, steps: int = 20, eta: float = 1.0, guidance_scale: float = 5.0, moved: float = 0.0, lora: LoRA | None = None
    ) -> Policy:
        adapter = lora or LoRA(rank=2, targets="attention+conv")
        model = StableDiffusion.load(ModelConfig(path=str(tiny_folder), lora=adapter), torch.device("cpu"), seed=3)
        if moved:
            generator = torch.Generator().manual_seed(7)
            with torch.no_grad():
                for name, parameter in model.trainable().items():
                    if ".lora_B." in name:
                        parameter.copy_(moved * torch.randn(parameter.shape, generator=generator))
        return Policy(model, DDIM(steps=steps, eta=eta, guidance_scale=guidance_scale))

    return make
