"""What a LoRA file says about itself: the `__metadata__` of its safetensors header, which is text only.

    ss_*           as kohya's trainer writes them (kohya-ss/sd-scripts train_network.py); A1111 lists them, and tells
                   1.x, 2.x and XL apart by ss_v2 and ss_base_model_version (extensions-builtin/Lora/network.py)
    modelspec.*    Stability AI's model metadata standard 1.0.0 (github.com/Stability-AI/ModelSpec), with the names of
                   architectures that sd-scripts library/sai_model_spec.py writes: "stable-diffusion-v1/lora"; SwarmUI
                   and InvokeAI read them
    tailorpo.*     what was trained, in the words of a run file

The same run gives the same bytes, wherever and however often it was interrupted: there is no date in it, and no folder
but the base model's own name. safetensors writes its metadata in a random order, so the header is written here; the
bytes of the tensors are not touched.

`modelspec.architecture` has to name a family that other tools know, so a base model that is neither Stable Diffusion
1.x, 2.x nor XL gets no modelspec keys and no ss_base_model_version. Left out: modelspec.license, which is the
publisher's to say; modelspec.author and date, which training does not know; a thumbnail.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tailorpo import __version__
from tailorpo.algorithms.base import Algorithm
from tailorpo.algorithms.diffusion_dpo import DiffusionDPO
from tailorpo.algorithms.reward_backprop import RewardBackprop
from tailorpo.algorithms.tailorpo import TailorPO
from tailorpo.base_model import BaseModel
from tailorpo.errors import UserError
from tailorpo.run import Run

_SGM = "https://github.com/Stability-AI/generative-models"


def lora_metadata(
    run: Run,
    base: BaseModel,
    *,
    updates: int,
    alpha: float,
    output_name: str | None = None,
    sgm_names: bool = False,
) -> dict[str, str]:
    """The metadata of a LoRA after `updates` updates.

    Args:
        run: what was trained.
        base: the model it was trained on.
        updates: how many updates are in it.
        alpha: the scale of the tensors in the file is alpha / rank. Not always the run's: diffusers' files have their
            scale in the tensors, which reads as alpha = rank.
        output_name: what programs list it as, if not the model, the method and the reward.
        sgm_names: whether the file's names are those of Stability AI's own code, not of diffusers.
    """
    lora = run.model.lora
    assert lora is not None
    width, height = base.resolution
    name = output_name or _slug(f"{base.name.split('/')[-1]} {method_name(run.algorithm)} {reward_name(run)}")
    about = f"{base.name} aligned with the reward {reward_name(run)} by {method_name(run.algorithm)}"
    convolutions = {"conv_dim": str(lora.rank), "conv_alpha": f"{alpha:g}"} if "conv" in lora.targets else {}
    v_prediction = base.prediction_type == "v_prediction"
    found = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(lora.rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_network_args": json.dumps(convolutions),
        "ss_output_name": name,
        "ss_sd_model_name": base.name,
        "ss_resolution": f"({width}, {height})",
        "ss_seed": str(run.seed),
        "ss_steps": str(updates),
        "ss_learning_rate": f"{run.optimizer.lr:g}",
        "ss_training_comment": f"{about}; tailorpo {__version__}",
        "tailorpo.version": __version__,
        "tailorpo.method": method_name(run.algorithm),
        "tailorpo.base_model": base.name,
        "tailorpo.reward": reward_name(run),
        "tailorpo.updates": str(updates),
        "tailorpo.trajectories_per_update": str(run.batch.trajectories),
        "tailorpo.seed": str(run.seed),
        "tailorpo.resolution": f"{width}x{height}",
        "tailorpo.lora_rank": str(lora.rank),
        "tailorpo.lora_alpha": f"{lora.alpha or lora.rank:g}",
        "tailorpo.lora_targets": lora.targets,
        "tailorpo.sampling_steps": str(run.sampler.steps),
        "tailorpo.guidance_scale": f"{run.sampler.guidance_scale:g}",
    }
    if base.licence:
        found["tailorpo.base_model_licence"] = base.licence
    if base.version:
        is_v2 = base.version == "sd_v2"
        kohya = "sdxl_base_v1-0" if base.version == "sdxl" else base.version + ("_v" if v_prediction else "")
        architecture = {
            "sd_v1": "stable-diffusion-v1",
            "sd_v2": "stable-diffusion-v2-768-v" if v_prediction else "stable-diffusion-v2-512",
            "sdxl": "stable-diffusion-xl-v1-base",
        }[base.version]
        found |= {
            "ss_base_model_version": kohya,
            "ss_v2": str(is_v2),
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": f"{architecture}/lora",
            "modelspec.implementation": _SGM if sgm_names else "diffusers",
            "modelspec.title": name,
            "modelspec.description": f"{about}, {updates} updates, tailorpo {__version__}.",
            "modelspec.resolution": f"{width}x{height}",
            "modelspec.prediction_type": "v" if v_prediction else base.prediction_type,
            "modelspec.usage_hint": f"no trigger words; trained at guidance scale {run.sampler.guidance_scale:g}",
        }
    return found


def method_name(algorithm: Algorithm) -> str:
    """A method as its paper calls it."""
    if isinstance(algorithm, TailorPO):
        return "TailorPO-G" if algorithm.guidance else "TailorPO"
    if isinstance(algorithm, DiffusionDPO):
        return "Diffusion-DPO"
    if isinstance(algorithm, RewardBackprop):
        return "reward backpropagation"
    return type(algorithm).__name__


def reward_name(run: Run) -> str:
    """The reward of a run, or the weighted sum of several."""
    if len(run.reward) == 1:
        return run.reward[0].reward.name
    return " + ".join(f"{entry.weight:g} {entry.reward.name}" for entry in run.reward)


def with_metadata(data: bytes, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with other metadata; the bytes of its tensors stay as they are.

    Where there are modelspec keys, `modelspec.hash_sha256` of those bytes is added.
    """
    header, tensors = _parts(data)
    if "modelspec.sai_model_spec" in metadata:
        metadata = {**metadata, "modelspec.hash_sha256": f"0x{hashlib.sha256(tensors).hexdigest()}"}
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format keeps the tensors aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text + tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, empty if it has none.

    Raises:
        UserError: there is no such file, or it is not a safetensors file.
    """
    try:
        return _parts(path.read_bytes())[0].get("__metadata__", {})
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error})") from error


def _parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the tensors: 8 bytes of the header's length, little endian, JSON, then everything else."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")
