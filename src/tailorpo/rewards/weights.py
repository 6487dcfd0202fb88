"""Files that a reward needs and that the package does not ship: what they are, where they come from, and reading them.

A reward that needs weights is given one local folder, `path`, which holds the files under the names they are published
with. Nothing is downloaded: a missing file becomes a message with its size, its licence and the command that fetches
it. Weights are read from safetensors, or from a `.pt` with `weights_only`, so that a file from elsewhere cannot run
code; their names and shapes must be exactly those of the network.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from tailorpo.errors import RewardError

Dtype = Literal["float32", "bfloat16", "float16"]
"""What a reward's `dtype` may be: of its weights and of the arithmetic in its towers."""

DTYPES: Mapping[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, kw_only=True)
class Download:
    """Files from one place that a reward needs in its folder.

    Attributes:
        repository: "owner/name" on huggingface.co, or the address (https://...) of a single file elsewhere.
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

    def command(self, folder: Path | str, files: Sequence[str] | None = None) -> str:
        """The shell command that puts the files (None: all) into the folder."""
        names = [each.split("|")[0] for each in self.files] if files is None else files
        if self.repository.startswith("https://"):
            return f"curl -L --create-dirs -o {folder}/{names[0]} {self.repository}"
        return f"hf download {self.repository} {' '.join(names)} --local-dir {folder}"


@runtime_checkable
class NeedsFiles(Protocol):
    """A reward's section of a run file that names a folder to be filled first."""

    @property
    def name(self) -> str:
        """Of the reward."""
        ...

    @property
    def path(self) -> str:
        """The folder."""
        ...

    def missing(self) -> list[str]:
        """What is not there yet, one line each, with the command that fetches it."""
        ...


def check(reward: NeedsFiles) -> Path:
    """The reward's folder, complete.

    Raises:
        RewardError: all of what is missing, with the commands that fetch it.
    """
    folder, problems = Path(reward.path).expanduser(), reward.missing()
    if problems:
        lines = [f"reward {reward.name!r}: this is missing in {folder}; it can be had with", *problems]
        raise RewardError("\n  ".join(lines))
    return folder


def missing_downloads(folder: Path, downloads: Sequence[Download]) -> list[str]:
    """One line for each repository of which something is missing: the command, the size, the licence."""
    return [
        f"{each.command(folder, missing)}   ({each.size}; {each.licence})"
        for each in downloads
        if (missing := each.missing(folder))
    ]


def first_present(folder: Path, names: str) -> Path:
    """The first file of "a|b" that is there; `check` has made sure of one."""
    return next(folder / name for name in names.split("|") if (folder / name).is_file())


def read_weights(path: Path, *, name: str) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` or `.pt` file, on the CPU; of {"state_dict": ...} the inner part.

    Raises:
        RewardError: the file cannot be read, or holds something else than named tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Files of before 2020 are no zip archives and cannot be mapped.
        loaded: object = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        raise RewardError(f"reward {name!r}: {path} cannot be read: {type(error).__name__}: {error}") from error
    state = cast(Mapping[str, Any], loaded) if isinstance(loaded, Mapping) else dict[str, Any]()
    state = cast(Mapping[str, Any], state.get("state_dict", state))
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise RewardError(f"reward {name!r}: {path} holds no weights (a dictionary of named tensors)")
    return dict(state)


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], *, name: str, source: Path) -> None:
    """Put the weights into the module in place (`assign`), in its own dtype; names and shapes must match exactly.

    A module on the meta device is afterwards where the weights are, but for buffers that are not saved with it; for one
    of transformers, which has such buffers (position_ids), take `build_strictly`.

    Raises:
        RewardError: says how many names are missing, left over or of another shape, and the first of each.
    """
    own = module.state_dict()
    _check_fit(own, state, name=name, source=source)
    module.load_state_dict({key: state[key].to(own[key].dtype) for key in own}, strict=True, assign=True)


def build_strictly(
    architecture: Any, config: Any, state: Mapping[str, Tensor], *, name: str, source: Path, **arguments: object
) -> Any:
    """The transformers network with exactly these weights, float32, frozen, in eval mode, on the CPU.

    Args:
        architecture: a class of transformers' PreTrainedModel.
        config: its config.
        state: the weights by the names of the architecture, in any dtype.
        name: of the reward.
        source: the file the weights come from.
        arguments: of the architecture's constructor, besides the config.

    Raises:
        RewardError: as `load_strictly`.
    """
    with quiet():
        with torch.device("meta"):
            skeleton = architecture(config, **arguments)
        _check_fit(skeleton.state_dict(), state, name=name, source=source)
        # Loading through transformers also makes the buffers that no file holds.
        model = architecture.from_pretrained(
            None, config=config, state_dict=dict(state), dtype=torch.float32, **arguments
        )
    return model.eval().requires_grad_(False)


def _check_fit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], *, name: str, source: Path) -> None:
    kinds = {
        "missing": sorted(own.keys() - state.keys()),
        "left over": sorted(state.keys() - own.keys()),
        "of another shape": sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape),
    }
    wrong = [f"{len(keys)} {kind}, such as {keys[0]}" for kind, keys in kinds.items() if keys]
    if wrong:
        raise RewardError(f"reward {name!r}: {source} does not fit the network: {'; '.join(wrong)}")


@contextmanager
def quiet() -> Generator[None]:
    """Without transformers' progress bars and notes, which would run across the library's own display."""
    from transformers.utils import logging

    bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
