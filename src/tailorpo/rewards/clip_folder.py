"""What every reward on a CLIP tower shares: reading a local transformers folder, and differentiable preprocessing.

The preprocessing is the library's own, on tensors, so that gradients reach the pictures: shorter side to the model's
size (bicubic with antialiasing, clamped), crop in the middle, normalise with the mean and std of
preprocessor_config.json. It differs from the 8-bit path through PIL by rounding only (one or two levels of 255).

Left out: quantising to 8 bits before scoring, which has no gradient.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from tailorpo.errors import RewardError

_OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
_OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipPreprocess:
    """Pictures as a CLIP vision tower wants them."""

    def __init__(
        self,
        size: int,
        device: torch.device | str,
        *,
        shorter_side: int | None = None,
        mean: tuple[float, ...] = _OPENAI_MEAN,
        std: tuple[float, ...] = _OPENAI_STD,
    ) -> None:
        """Resize the shorter side (None: to `size`), crop a square of `size` pixels, normalise channel by channel."""
        self._size = size
        self._shorter_side = shorter_side or size
        self._mean = torch.tensor(mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(std, device=device).view(1, 3, 1, 1)

    @classmethod
    def from_folder(cls, folder: Path, size: int, device: torch.device | str, *, name: str) -> ClipPreprocess:
        """As preprocessor_config.json says, with CLIP's own mean and std where it does not; RewardError without it."""
        path = folder / "preprocessor_config.json"
        if not path.is_file():
            raise RewardError(f"reward {name!r}: {path} is missing; it holds image_mean, image_std and size")
        config = read_json(path, name=name)
        shorter = config.get("size")
        if isinstance(shorter, dict):
            sides = cast(dict[str, int], shorter)
            shorter = sides.get("shortest_edge") or min(sides.get("height", 0), sides.get("width", 0))
        mean, std = config.get("image_mean", _OPENAI_MEAN), config.get("image_std", _OPENAI_STD)
        return cls(size, device, shorter_side=cast(int | None, shorter), mean=cast(Any, mean), std=cast(Any, std))

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, S, S) float32, resized, cropped and normalised."""
        pixels = images.to(device=self._mean.device, dtype=torch.float32)
        height, width = pixels.shape[2:]
        shorter = min(height, width)
        if shorter != self._shorter_side:
            size = (int(self._shorter_side * height / shorter), int(self._shorter_side * width / shorter))
            # Bicubic overshoots at edges; PIL clips there, and so do we.
            pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (pixels.shape[2] - self._size) // 2, (pixels.shape[3] - self._size) // 2
        pixels = pixels[:, :, top : top + self._size, left : left + self._size]
        return (pixels - self._mean) / self._std


def load_clip(folder: Path, tower: Literal["both", "vision"], *, name: str, hint: str) -> Any:
    """The CLIPModel in a folder, or its vision tower with the projection: frozen, in eval mode, float32, on the CPU.

    Nothing is downloaded. Raises RewardError: the folder is missing (the message ends with `hint`), damaged, of another
    architecture, or lacks weights.
    """
    if not (folder / "config.json").is_file():
        missing = "config.json is missing in" if folder.is_dir() else "there is no folder"
        raise RewardError(f"reward {name!r}: {missing} {folder}; {hint}")
    kind = read_json(folder / "config.json", name=name).get("model_type")
    if kind != "clip":
        raise RewardError(f"reward {name!r}: {folder} holds a {kind!r} model, not a CLIPModel (model_type 'clip')")
    from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection
    from transformers.utils import logging

    bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # it would run across the library's own display
    logging.set_verbosity_error()  # a vision tower alone leaves the text weights over, as it should
    architecture = CLIPModel if tower == "both" else CLIPVisionModelWithProjection
    try:
        whole: Any = CLIPConfig.from_pretrained(folder, local_files_only=True)
        config = whole if tower == "both" else whole.vision_config
        config.projection_dim = whole.projection_dim  # the tower's own copy of it may be the default
        loaded: Any = architecture.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # a damaged or foreign folder fails in many ways, inside transformers
        raise RewardError(f"reward {name!r}: {folder} cannot be read: {type(error).__name__}: {error}") from error
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
    model, info = loaded
    if info["missing_keys"]:
        raise RewardError(
            f"reward {name!r}: {len(info['missing_keys'])} weights are missing in {folder}, for example "
            f"{sorted(info['missing_keys'])[0]}"
        )
    return model.eval().requires_grad_(False)


def read_json(path: Path, *, name: str) -> dict[str, object]:
    """A JSON object; RewardError if it is none."""
    try:
        return cast(dict[str, object], json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise RewardError(f"reward {name!r}: {path} is not valid JSON: {error}") from error
