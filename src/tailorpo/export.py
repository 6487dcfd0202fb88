"""A finished run as files for other programs: `tailorpo export`.

    diffusers   pytorch_lora_weights.safetensors, for `pipe.load_lora_weights`: diffusers' module names, lora_A, lora_B
    kohya       NAME.safetensors, for ComfyUI, A1111, Forge and kohya's tools: lora_unet_..., lora_down, lora_up, alpha
    peft        adapter_model.safetensors and adapter_config.json, for `PeftModel.from_pretrained(pipe.unet, ...)`
    merged      the base model's folder with W + (alpha / rank) B A in place of every adapted weight W of the UNet

kohya's names are diffusers' own conversion (`diffusers.utils.convert_state_dict_to_kohya`), which writes alpha = rank;
here the run's alpha is kept. kohya trains Stable Diffusion 1.x and 2.x on diffusers' module names and XL on those of
Stability AI's code (input_blocks, middle_block, output_blocks: sd-scripts networks/lora_diffusers.py,
make_unet_conversion_map), so XL files get the latter, which every program above reads.

Everything is computed in float32 and cast to the wanted type once, at the end. The folder appears whole or not at all.
Left out: single-file checkpoints of a merged model (diffusers' scripts/convert_diffusers_to_original_*.py make them
from its folder), and adapters on text encoders, which are not trained.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_kohya,  # pyright: ignore[reportUnknownVariableType]
)
from peft import LoraConfig
from safetensors.torch import load_file, save  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from tailorpo.base_model import BaseModel
from tailorpo.errors import UserError
from tailorpo.files import atomic_write, storage_errors
from tailorpo.lora_metadata import lora_metadata, read_metadata, with_metadata
from tailorpo.model_card import ModelCard, write_card
from tailorpo.models import DType, LoRA
from tailorpo.models.loading import DTYPES
from tailorpo.run import Run
from tailorpo.rundir import RunDirectory
from tailorpo.trained import LORA_FILE

Format = Literal["diffusers", "kohya", "peft", "merged"]

_NOT_COPIED = ("*.fp16.*", "*.non_ema.*", "*.msgpack", "*.onnx*", "openvino*", ".*")
"""Further copies of the same weights, which folders from the hub carry along."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a finished run has to give away.

    Attributes:
        tensors: by module name and ".lora_A.weight" or ".lora_B.weight", float32; alpha / rank is in the B's.
        updates: how many updates are in them.
    """

    directory: RunDirectory
    run: Run
    lora: LoRA
    base: BaseModel
    tensors: Mapping[str, Tensor]
    updates: int

    @classmethod
    def open(cls, folder: Path | str) -> Trained:
        """The LoRA in a run directory, with where it comes from.

        Raises:
            UserError: there is no run, no LoRA, no base model, or the run is not finished.
        """
        directory = RunDirectory.open(folder)
        run, path = directory.run, directory.lora / LORA_FILE
        if run.model.full:
            raise UserError(
                f"{folder} has trained the whole network, which is in {directory.unet} in diffusers' format"
            )
        if run.model.lora is None or not path.is_file():
            raise UserError(f"{folder} has no LoRA to export: training writes it to {path} with every checkpoint")
        recorded = read_metadata(path).get("tailorpo.updates")
        if recorded is None:
            raise UserError(
                f"{path} does not say how far it was trained, so it is not as training wrote it; without report.html in"
                f" the run, `tailorpo resume {folder}` writes it anew from the last checkpoint"
            )
        updates = int(recorded)
        if updates < run.updates:
            raise UserError(
                f"{folder} is not finished: its LoRA has {updates} of {run.updates} updates. Go on with"
                f" `tailorpo resume {folder}`, or end it there with `tailorpo resume {folder} updates=N`"
            )
        tensors = {name.removeprefix("unet."): tensor.float() for name, tensor in load_file(path).items()}
        base = BaseModel.read(run.model)
        return cls(directory=directory, run=run, lora=run.model.lora, base=base, tensors=tensors, updates=updates)

    @property
    def name(self) -> str:
        """What other programs list it as: the name of the run's folder."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.directory.path.resolve().name)

    @property
    def alpha(self) -> float:
        """The alpha it was trained with."""
        return float(self.lora.alpha or self.lora.rank)

    def unscaled(self) -> dict[str, Tensor]:
        """The tensors as they were trained, without alpha / rank in the B's."""
        scale = self.alpha / self.lora.rank
        return {name: tensor / scale if ".lora_B." in name else tensor for name, tensor in self.tensors.items()}


def export(
    trained: Trained,
    out: Path,
    *,
    format: Format = "diffusers",
    dtype: DType = "float32",
    base_id: str | None = None,
) -> Path:
    """Write a run's LoRA, or the base model with it merged in, with a model card, into a new folder.

    Args:
        trained: what to export.
        out: the folder; it must not exist.
        format: see the module.
        dtype: of the exported weights; a merged model's other parts stay as they are.
        base_id: the base model's id on the hub, where its folder does not say it.

    Returns:
        The folder.

    Raises:
        UserError: the folder exists, or the LoRA does not fit the base model.
        StorageError: the disk refused; nothing is left behind.
    """
    if out.exists():
        raise UserError(f"{out} exists already; give another folder with --out, or remove it")
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out.parent, prefix=".export-") as temporary:
            folder = Path(temporary) / "export"
            folder.mkdir()
            file = _write(trained, folder, format=format, dtype=dtype)
            card = ModelCard(
                directory=trained.directory,
                base=trained.base,
                base_id=base_id or trained.base.hub_id,
                updates=trained.updates,
                format=format,
                dtype=dtype,
                file=file,
            )
            write_card(card, folder)
            folder.rename(out)
    return out


def _write(trained: Trained, folder: Path, *, format: Format, dtype: DType) -> str | None:
    """Write the weights, and return the name of the LoRA's file, if it is one."""
    if format == "merged":
        merge(trained, folder, dtype=DTYPES[dtype])
        return None
    if format == "diffusers":
        file, alpha = LORA_FILE, float(trained.lora.rank)
        state = {f"unet.{name}": tensor for name, tensor in trained.tensors.items()}
    elif format == "kohya":
        file, alpha = f"{trained.name}.safetensors", trained.alpha
        state = kohya_state(trained.unscaled(), alpha=alpha, base=trained.base)
    else:
        file, alpha = "adapter_model.safetensors", trained.alpha
        state = {f"base_model.model.{name}": tensor for name, tensor in trained.unscaled().items()}
        _write_peft_config(trained, folder)
    # The alphas stay float32: they are numbers of their own, not weights.
    rounded = {name: value if name.endswith(".alpha") else value.to(DTYPES[dtype]) for name, value in state.items()}
    metadata = lora_metadata(
        trained.run,
        trained.base,
        updates=trained.updates,
        alpha=alpha,
        output_name=trained.name,
        sgm_names=format == "kohya" and trained.base.version == "sdxl",
    )
    atomic_write(folder / file, with_metadata(save(rounded), metadata))
    return file


def kohya_state(tensors: Mapping[str, Tensor], *, alpha: float, base: BaseModel) -> dict[str, Tensor]:
    """A LoRA under kohya's names: per module lora_down.weight, lora_up.weight and alpha, a scalar.

    Args:
        tensors: by module name and ".lora_A.weight" or ".lora_B.weight", without alpha / rank in them.
        alpha: the scale is alpha / rank.
        base: says which names; see the module.
    """
    xl = base.version == "sdxl"
    named = {f"unet.{sgm_name(name, base.layers_per_block) if xl else name}": value for name, value in tensors.items()}
    state = cast(dict[str, Tensor], convert_state_dict_to_kohya(named))
    return {name: torch.tensor(alpha) if name.endswith(".alpha") else value for name, value in state.items()}


def sgm_name(name: str, layers_per_block: int) -> str:
    """A diffusers module name in the words of Stability AI's UNet.

    On the way down a level has `layers_per_block` blocks and a downsampler, after the first convolution, which is block
    0; on the way up it has one block more. In a block the residual part is 0 and the attention 1.
    """
    kinds, size = {"resnets": 0, "attentions": 1}, layers_per_block + 1
    name = name.replace(".conv1.", ".in_layers.2.").replace(".conv2.", ".out_layers.3.")
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        return f"middle_block.{1 if match[1] == 'attentions' else 2 * int(match[2])}.{match[3]}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name)
    if not match:
        raise UserError(f"kohya's format has no name for {name} of a Stable Diffusion XL; use --format diffusers")
    block = int(match[2]) * size + int(match[4])
    place = f"input_blocks.{1 + block}" if match[1] == "down" else f"output_blocks.{block}"
    return f"{place}.{kinds[match[3]]}.{match[5]}"


def merge(trained: Trained, folder: Path, *, dtype: torch.dtype) -> None:
    """Write the base model's folder with the LoRA merged into its UNet: float32 arithmetic, one cast. The other parts
    are copied as they are."""
    base = trained.base.source
    if base.is_file():
        raise UserError(
            f"the base model is the single file {base.name}, and --merge copies all but the UNet from a folder in"
            " diffusers' format; export the LoRA alone, or train from such a folder"
        )
    try:
        unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", local_files_only=True)
        nn.Module.to(unet, torch.float32)
        unet.load_lora_adapter({f"unet.{name}": tensor for name, tensor in trained.tensors.items()}, prefix="unet")
        unet.fuse_lora(safe_fusing=True)
    except (OSError, ValueError, RuntimeError) as error:  # no weights, other modules or shapes, NaN
        raise UserError(f"the LoRA cannot be merged into the model in {base}: {error}") from error
    unet.unload_lora()
    nn.Module.to(unet, dtype)
    shutil.copy(base / "model_index.json", folder)
    for part in json.loads((base / "model_index.json").read_text(encoding="utf-8")):
        if part != "unet" and (base / part).is_dir():
            shutil.copytree(base / part, folder / part, ignore=shutil.ignore_patterns(*_NOT_COPIED))
    unet.register_to_config(_name_or_path=trained.base.name)  # not the folder of this machine
    unet.save_pretrained(folder / "unet")


def _write_peft_config(trained: Trained, folder: Path) -> None:
    alpha: Any = trained.alpha  # peft's annotation says int, its arithmetic does not care
    modules = {name.removesuffix(".lora_A.weight") for name in trained.tensors if name.endswith(".lora_A.weight")}
    config = LoraConfig(r=trained.lora.rank, lora_alpha=alpha, target_modules=sorted(modules), inference_mode=True)
    config.base_model_name_or_path = trained.base.name
    config.save_pretrained(str(folder))
