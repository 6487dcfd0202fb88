"""Files that a reward needs and that the package does not ship: what they are, where they come from, and reading them.

A reward that needs weights is given one local folder, `path`, which holds the files under the names they are published
with. Nothing is downloaded: a missing file becomes a message with its size, its licence and the command that fetches
it. Weights are read from safetensors, or from a `.pt` with `weights_only`, so that a file from elsewhere cannot run
code; their names and shapes must be exactly those of the network.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from tailorpo.errors import RewardError


@dataclass(frozen=True, kw_only=True)
class Download:
    """Files of one Hugging Face repository that a reward needs in its folder.

    Attributes:
        repository: "owner/name" on huggingface.co.
        files: their names there and in the folder. Each entry is one file, or several names of which one is enough,
            written "a|b", the first being the one to fetch.
        size: of all of them, in words.
        licence: of the weights, as their page states it.
    """

    repository: str
    files: tuple[str, ...]
    size: str
    licence: str

    def missing(self, folder: Path) -> list[str]:
        """What is not in the folder, by the name to fetch."""
        wanted = [names.split("|") for names in self.files]
        return [names[0] for names in wanted if not any((folder / name).is_file() for name in names)]


def check_downloads(name: str, folder: Path, downloads: Sequence[Download]) -> None:
    """Refuse a folder in which something is missing.

    Raises:
        RewardError: all of what is missing, with the commands that fetch it.
    """
    problems = missing_downloads(folder, downloads)
    if problems:
        raise RewardError("\n  ".join([f"reward {name!r}: files are missing in {folder}", *problems]))


def missing_downloads(folder: Path, downloads: Sequence[Download]) -> list[str]:
    """One line for each repository of which something is missing: the command, the size, the licence."""
    return [
        f"hf download {each.repository} {' '.join(missing)} --local-dir {folder}   ({each.size}; {each.licence})"
        for each in downloads
        if (missing := each.missing(folder))
    ]


def first_present(folder: Path, names: str) -> Path:
    """The first file of "a|b" that is there; `check_downloads` has made sure of one."""
    return next(folder / name for name in names.split("|") if (folder / name).is_file())


def read_weights(path: Path, *, name: str) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` or `.pt` file, on the CPU; of {"state_dict": ...} the inner part.

    Raises:
        RewardError: the file cannot be read, or holds something else than named tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded: object = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        raise RewardError(f"reward {name!r}: {path} cannot be read: {type(error).__name__}: {error}") from error
    state = cast(Mapping[str, Any], loaded) if isinstance(loaded, Mapping) else dict[str, Any]()
    state = cast(Mapping[str, Any], state.get("state_dict", state))
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise RewardError(f"reward {name!r}: {path} holds no weights (a dictionary of named tensors)")
    return dict(state)


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], *, name: str, source: Path) -> None:
    """Put the weights into the module in place (`assign`), in its own dtype; names and shapes must match exactly.

    A module on the meta device is afterwards where the weights are, but for buffers that are not saved with it.

    Raises:
        RewardError: says how many names are missing, left over or of another shape, and the first of each.
    """
    own = module.state_dict()
    kinds = {
        "missing": sorted(own.keys() - state.keys()),
        "left over": sorted(state.keys() - own.keys()),
        "of another shape": sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape),
    }
    wrong = [f"{len(keys)} {kind}, such as {keys[0]}" for kind, keys in kinds.items() if keys]
    if wrong:
        raise RewardError(f"reward {name!r}: {source} does not fit the network: {'; '.join(wrong)}")
    module.load_state_dict({key: state[key].to(own[key].dtype) for key in own}, strict=True, assign=True)
