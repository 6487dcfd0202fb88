"""Where a model's files are: a bundled name, a folder in diffusers' format, one `.safetensors` file, or a hub id.

The disk comes first, then the hub's local cache; the network only where the run file says `download: true`. Nothing
here reads a weight, so that a run file can be checked in a moment.

Left out: pickles (`.ckpt`, `.bin`, `.pt`). Opening one runs whatever code it holds.
"""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast

from safetensors import SafetensorError, safe_open

from tailorpo.errors import UserError

Family = Literal["sd", "sdxl"]

BUNDLED = ("emoji",)
INDEX = "model_index.json"
PIPELINES: dict[Family, str] = {"sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
PICKLES = (".ckpt", ".pt", ".pth", ".bin")

_TEXT_WEIGHT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Weights as safetensors, configurations and tokenizers; not the duplicates in other formats, nor what is never loaded.
_WANTED = ("*.json", "*/*.json", "*/*.txt", "unet/*.safetensors", "vae/*.safetensors", "text_encoder*/*.safetensors")
_UNWANTED = ("safety_checker/*", "*/*.non_ema.safetensors", "*/*openvino*", "*/*flax*")


def assets(name: str) -> Path:
    """A folder that ships inside the package."""
    return Path(str(files("tailorpo"))) / "assets" / name


def find_model(path: str, *, family: Family = "sd", download: bool = False) -> Path:
    """The folder or the `.safetensors` file that `model.path` means.

    Args:
        path: a bundled name, a folder, a file, or a hub id such as `stabilityai/stable-diffusion-xl-base-1.0`.
        family: what it must hold, a key of `PIPELINES`.
        download: fetch a hub id that is not in the local cache.

    Raises:
        UserError: there is nothing usable; says what is accepted.
    """
    local = assets(path) if path in BUNDLED else Path(path).expanduser()
    if local.is_file():
        _check_file(local)
        return local
    if not local.exists() and _HUB_ID.fullmatch(path):
        local = _from_hub(path, download=download)
    _check_folder(local, family)
    return local


def find_tiny_vae(path: str) -> Path:
    """The folder that `model.tiny_vae` means: a bundled model's draft decoder, or one of the user's."""
    return assets(f"{path}_tiny_vae") if path in BUNDLED else Path(path).expanduser()


def family_of(path: str) -> Family:
    """The family of what a command was given without a run file; "sd" where it cannot be told."""
    local = Path(path).expanduser()
    if local.is_file() and local.suffix == ".safetensors":
        try:
            names = tensor_names(local)
            return "sdxl" if any(name.startswith("conditioner.embedders.1.") for name in names) else "sd"
        except SafetensorError:
            return "sd"
    if not local.exists() and _HUB_ID.fullmatch(path):
        local = _from_hub(path, download=False)
    if not (local / INDEX).is_file():
        return "sd"
    return "sdxl" if read_config(local, INDEX).get("_class_name") == PIPELINES["sdxl"] else "sd"


def tensor_names(file: Path) -> list[str]:
    """What a safetensors file holds, without reading it.

    Raises:
        SafetensorError: it is damaged.
    """
    with safe_open(file, framework="numpy") as opened:  # pyright: ignore[reportUnknownVariableType]
        return list(cast(Any, opened).keys())


def layout_of(file: Path, family: Family) -> Path:
    """The folder of the sizes of a single file's networks; of a family, its text embeddings tell the versions apart.

    Raises:
        UserError: the file is damaged, or no Stable Diffusion.
    """
    if family == "sdxl":
        return assets("layouts") / "sdxl"
    try:
        with safe_open(file, framework="numpy") as opened:  # pyright: ignore[reportUnknownVariableType]
            width = cast(Any, opened).get_slice(_TEXT_WEIGHT).get_shape()[1]
    except SafetensorError as error:
        raise UserError(f"model.path: {file} is no readable Stable Diffusion ({error})") from error
    return assets("layouts") / ("sd2" if width == 1024 else "sd1")


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON configuration.

    Raises:
        UserError: it is missing or no JSON object.
    """
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{folder / name} is not a JSON object")
    return cast(dict[str, Any], value)


def _check_file(file: Path) -> None:
    if file.suffix in PICKLES:
        raise UserError(
            f"model.path: {file} is a pickle, and opening one runs whatever code it holds; take the .safetensors file"
            " of the same model, or a folder in diffusers' format"
        )
    if file.suffix != ".safetensors":
        raise UserError(f"model.path: {file} is not a .safetensors file; give one, or a folder in diffusers' format")


def _check_folder(folder: Path, family: Family) -> None:
    accepted = (
        f"give a bundled name ({', '.join(BUNDLED)}), a local folder as saved by {PIPELINES[family]}.save_pretrained,"
        " a .safetensors file, or a hub id"
    )
    if not folder.exists():
        raise UserError(f"model.path: there is no folder or file {folder} (looked from {Path.cwd()}); {accepted}")
    if not (folder / INDEX).is_file():
        inside = sorted(folder.glob("*.safetensors"), key=lambda file: -file.stat().st_size)
        hint = f" Did you mean the file {inside[0]}?" if inside else ""
        raise UserError(f"model.path: there is no diffusers model at {folder} (no {INDEX}); {accepted}.{hint}")
    kind = str(read_config(folder, INDEX).get("_class_name"))
    if kind == PIPELINES[family]:
        return
    right = [name for name, pipeline in PIPELINES.items() if pipeline == kind]
    reasons = {
        "Inpaint": "inpainting models want a mask besides the prompt",
        "Img2Img": "a refiner or image-to-image model wants a picture to start from",
        "ControlNet": "ControlNet pipelines want a control picture besides the prompt",
        "StableDiffusion3": "Stable Diffusion 3 is a flow model with a transformer",
        "Flux": "Flux is a flow model with a transformer",
    }
    reason = next((text for word, text in reasons.items() if word in kind), "other pipelines are not supported")
    fix = f"set model.family: {right[0]}" if right else reason
    raise UserError(f"model.path: {folder} holds a {kind}; family {family!r} needs a {PIPELINES[family]} ({fix})")


def _from_hub(name: str, *, download: bool) -> Path:
    """The snapshot of a hub id in the local cache, fetched into it if that was asked for."""
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def snapshot(*, local: bool) -> Path:
        wanted, unwanted = list[str](_WANTED), list[str](_UNWANTED)
        return Path(snapshot_download(name, local_files_only=local, allow_patterns=wanted, ignore_patterns=unwanted))

    try:
        folder = snapshot(local=True)
        if not download or any((folder / "unet").glob("*.safetensors")):
            return folder
    except LocalEntryNotFoundError as error:
        if not download:
            raise UserError(
                f"model.path: there is no folder or file {name} (looked from {Path.cwd()}), and the hub's cache on this"
                " disk has no model of that name; set model.download: true to fetch it from the hub"
            ) from error
    try:
        return snapshot(local=False)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"model.path: {name} could not be fetched from the hub: {error}") from error
