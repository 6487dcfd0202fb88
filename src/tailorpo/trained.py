"""What a run has trained, as files in diffusers' format: `lora/` or, for the whole network, `unet/`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from tailorpo.base_model import BaseModel
from tailorpo.errors import UserError
from tailorpo.files import atomic_write, storage_errors
from tailorpo.lora_metadata import lora_metadata, with_metadata
from tailorpo.models import DiffusionModel, ModelConfig
from tailorpo.run import Run
from tailorpo.rundir import RunDirectory

LORA_FILE, UNET_FILE = "pytorch_lora_weights.safetensors", "config.json"


def trained_folder(config: ModelConfig, directory: RunDirectory) -> Path:
    """Where the trained weights of a run are.

    Raises:
        UserError: no checkpoint has written them yet.
    """
    folder = directory.unet if config.full else directory.lora
    if not (folder / (UNET_FILE if config.full else LORA_FILE)).is_file():
        what = "trained network" if config.full else "LoRA"
        raise UserError(
            f"{directory.path} has no {what} yet: the first checkpoint writes it; until then there is only the base"
            " model (sample --base)"
        )
    return folder


def load_trained(model: DiffusionModel, config: ModelConfig, folder: Path) -> None:
    """Read `trained_folder` of a run into its model."""
    if config.full:
        model.load_unet(folder)
    else:
        model.load_lora(folder)


def export(
    model: DiffusionModel, run: Run, directory: RunDirectory, *, updates: int, tensors: Mapping[str, Tensor]
) -> None:
    """Write what is trained, replacing older files each as a whole; a LoRA with what was trained in its header.

    `tensors` are those of the checkpoint: a network that is trained as a whole may be here in shards only.
    """
    full, lora = run.model.full, run.model.lora
    folder = directory.unet if full else directory.lora
    with storage_errors(folder), TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        if full:
            prefix = "parameter/"
            weights = {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
            model.save_unet(Path(temporary), weights)
        else:
            model.save_lora(Path(temporary))
        folder.mkdir(exist_ok=True)
        for file in Path(temporary).iterdir():
            if lora is None:
                file.replace(folder / file.name)
                continue
            # In this file the scale is in the tensors (`save_lora`), which reads as alpha = rank.
            metadata = lora_metadata(run, BaseModel.read(run.model), updates=updates, alpha=lora.rank)
            atomic_write(folder / file.name, with_metadata(file.read_bytes(), metadata))
