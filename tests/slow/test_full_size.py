"""Stable Diffusion 1.5 at its true size with random weights: one file in, one update of TailorPO and TailorPO-G out.

Needs 2.2 GB of disk, gigabytes of memory and some minutes of one core; run with `pytest -m slow`.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from original_layout import original_clip, original_unet, original_vae
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from tailorpo.models.source import assets
from tailorpo.run import Run
from tailorpo.rundir import RunDirectory
from tailorpo.train import train


class Silent:
    """Hears everything and says nothing."""

    def phase(self, text: str) -> None: ...
    def step(self, done: int, total: int) -> None: ...
    def update(self, metrics: dict[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...


def halves(network: nn.Module) -> dict[str, Tensor]:
    """Random weights in half precision, each standard normal over the root of its fan-in, norms at one."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, tensor in network.state_dict().items():
        if tensor.ndim < 2:
            state[name] = (torch.ones if name.endswith("weight") else torch.zeros)(tensor.shape, dtype=torch.float16)
        else:
            scale = tensor[0].numel() ** -0.5
            state[name] = (scale * torch.randn(tensor.shape, generator=generator)).half()
    return state


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layout = assets("layouts") / "sd1"
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(str(layout / "unet")))
        vae: Any = AutoencoderKL.from_config(AutoencoderKL.load_config(str(layout / "vae")))
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(str(layout / "text_encoder")))
    tensors = {
        **original_unet(halves(unet), unet.config),
        **original_vae(halves(vae), vae.config),
        **original_clip(halves(text), "cond_stage_model.transformer."),
    }
    path = tmp_path_factory.mktemp("sd15") / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("guidance", [None, {"form": "sigma", "k": 1.0}], ids=["tailorpo", "tailorpo-g"])
def test_one_update_at_256_pixels(guidance: dict[str, Any] | None, file: Path, tmp_path: Path) -> None:
    run = Run.from_dict(
        {
            "updates": 1,
            "model": {"path": str(file), "size": 256, "gradient_checkpointing": True, "lora": {"rank": 4}},
            "sampler": {"steps": 3},
            "algorithm": {"name": "tailorpo", "train_steps": [1], "guidance": guidance},
            "reward": {"name": "brightness"},
            "prompts": {"list": ["a photo of a cat"]},
            "batch": {"trajectories": 1, "micro": 1},
        }
    )
    started = time.perf_counter()
    model: Any = train(run, RunDirectory.create(tmp_path / "run", run), reporter=Silent())
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\n{seconds:.0f} s, peak {peak:.1f} GiB")  # noqa: T201 (read by people, never compared)
    (row,) = RunDirectory.open(tmp_path / "run").metrics()
    assert row["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert row["grad_norm"] > 0
    assert sum(parameter.numel() for parameter in model.trainable().values()) == 797_184  # rank 4 on attention
    assert (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").is_file()
