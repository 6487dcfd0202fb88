"""What a base model says about itself, read from its JSON files or the header of its one file, without its weights.

For the names and versions that go into a LoRA file's header and onto a model card. Of a path only what is fit to be
published is kept: an id on the hub where one is on record, otherwise the folder's own name, never the folders above it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from tailorpo.models import ModelConfig
from tailorpo.models.source import INDEX, find_model, layout_of, read_config

Version = Literal["sd_v1", "sd_v2", "sdxl"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_IN_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
"""A repository's folder in the hub's local cache; the model is in snapshots/<commit> below it."""


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The model that a LoRA belongs to.

    Attributes:
        source: the folder or the single file it is in.
        name: its id on the hub, or the name of its folder or file.
        hub_id: its id on the hub if the folder says so: the hub's cache by its own name, a saved pipeline in
            `_name_or_path` of model_index.json.
        version: "sd_v1", "sd_v2" or "sdxl" by the width of its text embeddings (768, 1024, 2048), which is what a LoRA
            has to fit; None for every other size, such as the bundled miniature.
        prediction_type: "epsilon", "v_prediction" or "sample".
        resolution: width and height of its pictures, in pixels.
        layers_per_block: residual blocks per level on the way down.
        licence: as the folder's own README.md states it, None if it does not.
    """

    source: Path
    name: str
    hub_id: str | None
    version: Version | None
    prediction_type: str
    resolution: tuple[int, int]
    layers_per_block: int
    licence: str | None

    @classmethod
    def read(cls, config: ModelConfig) -> BaseModel:
        """Of the `model` section of a run.

        Raises:
            UserError: there is no such model.
        """
        source = find_model(config.path, family=config.family)
        # A single file says nothing of its sizes; those of its layout are in the package.
        folder = layout_of(source, config.family) if source.is_file() else source
        index = {} if source.is_file() else read_config(source, INDEX)
        scheduler = {} if source.is_file() else read_config(source / "scheduler", "scheduler_config.json")
        unet, vae = read_config(folder / "unet"), read_config(folder / "vae")
        sides = config.size or int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
        height, width = (sides, sides) if isinstance(sides, int) else sides
        hub_id = _hub_id(source, index)
        return cls(
            source=source,
            name=hub_id or (source.stem if source.is_file() else source.resolve().name),
            hub_id=hub_id,
            version=_version(unet),
            prediction_type=config.prediction_type or str(scheduler.get("prediction_type", "epsilon")),
            resolution=(width, height),
            layers_per_block=int(unet["layers_per_block"]),
            licence=_licence(source / "README.md"),
        )


def _hub_id(folder: Path, index: dict[str, Any]) -> str | None:
    for part in folder.resolve().parts:
        if match := _IN_CACHE.fullmatch(part):
            return f"{match[1]}/{match[2]}"
    recorded = index.get("_name_or_path")
    is_id = isinstance(recorded, str) and _HUB_ID.fullmatch(recorded) and not Path(recorded).exists()
    return cast(str, recorded) if is_id else None


def _version(unet: dict[str, Any]) -> Version | None:
    width = unet.get("cross_attention_dim")
    if unet.get("addition_embed_type") == "text_time":  # the sizes and crops that SDXL is told
        return "sdxl" if width == 2048 else None
    if unet.get("addition_embed_type") is not None:
        return None
    return "sd_v1" if width == 768 else "sd_v2" if width == 1024 else None


def _licence(readme: Path) -> str | None:
    """`license` of the front matter of a model card."""
    if not readme.is_file():
        return None
    match = re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        front: object = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return None
    licence = cast(dict[str, Any], front).get("license") if isinstance(front, dict) else None
    return licence if isinstance(licence, str) else None
