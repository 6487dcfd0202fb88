"""Preference pairs on the disk: a file that lists them, and the pictures beside it.

    {"prompt": "a cat", "winner": "pictures/7-a.png", "loser": "pictures/7-b.png"}

One JSON object a line (`pairs.jsonl`), or the same columns in a `.parquet` file where pyarrow is installed. Paths are
relative to the file. A pair whose pictures answer different prompts has `prompt_winner` and `prompt_loser` instead of
`prompt`; `reward_winner` and `reward_loser` may stand beside them for people, training does not read them.

A picture larger than the model draws is reduced (Lanczos) until its shorter side fits, and its centre is cut out. A
smaller one is refused: enlarging it would teach blur. Every mistake of a data set is reported at once, with its line.

Pictures are encoded once, before training, and their latents kept in memory: 64 kB for one of SD 1.5. Left out: shards
and streaming for data sets larger than memory, and random crops and flips, which would need the encoder in every
update.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from tailorpo.errors import UserError
from tailorpo.images import from_pil
from tailorpo.models import DiffusionModel
from tailorpo.settings import did_you_mean

KEYS = ("prompt", "prompt_winner", "prompt_loser", "winner", "loser", "reward_winner", "reward_loser")
ENCODE_BATCH = 8
"""Pictures encoded at once, the same in every run, so that a resumed run has the same latents to the last bit."""
_SHOWN = 50
"""Mistakes written out; of more than that only the number is said."""


@dataclass(frozen=True)
class PairFiles:
    """One pair on the disk; `line` is its place in the file, counted from 1."""

    line: int
    prompt_winner: str
    prompt_loser: str
    winner: Path
    loser: Path


@dataclass(frozen=True)
class PairLatents:
    """N pairs, encoded; a picture that is part of several pairs is there once.

    Attributes:
        pictures: clean latents, (M, C, h, w) float32 on the CPU.
        winner: the winner's row in `pictures`, (N,).
        loser: the loser's, (N,).
        prompts_winner: N prompts.
        prompts_loser: N prompts.
    """

    pictures: Tensor
    winner: Tensor
    loser: Tensor
    prompts_winner: Sequence[str]
    prompts_loser: Sequence[str]

    def __len__(self) -> int:
        return len(self.winner)


def pair_problems(path: Path) -> list[str]:
    """Everything that is wrong with a data set as far as can be seen without decoding its pictures, one line each."""
    return _shortened(_read(path)[1])


def read_pairs(path: Path) -> list[PairFiles]:
    """The pairs of a data set.

    Raises:
        UserError: all its mistakes.
    """
    pairs, problems = _read(path)
    _refuse(path, problems)
    return pairs


def encode_pairs(
    path: Path, model: DiffusionModel, *, on_picture: Callable[[int, int], None] | None = None
) -> PairLatents:
    """Read, decode and encode a data set with the model's own autoencoder.

    Args:
        path: of the file that lists the pairs.
        model: only its encoder is used.
        on_picture: called with the pictures done and their number.

    Raises:
        UserError: all mistakes that can be found; those in the list of pairs before any picture is decoded.
    """
    pairs = read_pairs(path)
    files = list(dict.fromkeys(file for pair in pairs for file in (pair.winner, pair.loser)))
    lines = {file: pair.line for pair in reversed(pairs) for file in (pair.winner, pair.loser)}
    latents: list[Tensor] = []
    problems: list[str] = []
    for start in range(0, len(files), ENCODE_BATCH):
        pictures: list[Tensor] = []
        for file in files[start : start + ENCODE_BATCH]:
            try:
                pictures.append(load_picture(file, size=model.picture_shape[1:]))
            except UserError as error:
                problems.append(f"line {lines[file]}: {error}")
        if not problems:  # from the first mistake on the rest is only looked at
            latents.append(model.encode_images(torch.stack(pictures)).cpu())
        if on_picture:
            on_picture(min(start + ENCODE_BATCH, len(files)), len(files))
    _refuse(path, problems)
    row = {file: index for index, file in enumerate(files)}
    return PairLatents(
        torch.cat(latents),
        torch.tensor([row[pair.winner] for pair in pairs]),
        torch.tensor([row[pair.loser] for pair in pairs]),
        [pair.prompt_winner for pair in pairs],
        [pair.prompt_loser for pair in pairs],
    )


def load_picture(path: Path, *, size: tuple[int, int]) -> Tensor:
    """A picture as (3, height, width) in [0, 1], reduced and cut to `size` = (height, width) by the rule above.

    Raises:
        UserError: it cannot be read, or is too small.
    """
    height, width = size
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's, of damaged files
        raise UserError(f"cannot read the picture {path}: {error}") from error
    if picture.width < width or picture.height < height:
        raise UserError(
            f"{path} has {picture.width}x{picture.height} pixels, fewer than the {width}x{height} that the model draws"
        )
    if picture.size != (width, height):
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    return from_pil(picture)


def _read(path: Path) -> tuple[list[PairFiles], list[str]]:
    """The pairs without a mistake, and the mistakes of the others."""
    if not path.is_file():
        return [], ["this is a folder; name the file in it that lists the pairs" if path.is_dir() else "no such file"]
    try:
        rows = list(_parquet(path) if path.suffix == ".parquet" else _json_lines(path))
    except UserError as error:
        return [], [str(error)]
    except (OSError, UnicodeDecodeError) as error:
        return [], [f"it cannot be read: {error}"]
    pairs: list[PairFiles] = []
    problems: list[str] = []
    known: dict[Path, str | None] = {}
    for line, row in rows:
        found = _row_problems(row)
        if not found:
            pair = _pair(line, cast(dict[str, Any], row), path.parent)
            for side, file in (("winner", pair.winner), ("loser", pair.loser)):
                if file not in known:
                    known[file] = _picture_problem(file)
                if known[file]:
                    found.append(f"{side}: {known[file]}")
            if pair.winner == pair.loser:
                found.append("winner and loser are the same picture")
            pairs.append(pair)
        problems += [f"line {line}: {problem}" for problem in found]
    if not rows:
        problems.append("there is no pair in it")
    return pairs, problems


def _json_lines(path: Path) -> Iterable[tuple[int, object]]:
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, start=1):
            if text.strip():
                try:
                    yield line, json.loads(text)
                except (ValueError, RecursionError) as error:
                    yield line, error


def _parquet(path: Path) -> Iterable[tuple[int, object]]:
    if find_spec("pyarrow") is None:
        raise UserError("reading parquet needs pyarrow: `pip install pyarrow`, or write the pairs as JSON lines")
    try:
        rows: list[dict[str, Any]] = import_module("pyarrow.parquet").read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise UserError(f"it cannot be read as parquet: {error}") from error
    # A column that a row does not use is null there.
    return enumerate(({key: value for key, value in row.items() if value is not None} for row in rows), start=1)


def _row_problems(row: object) -> list[str]:
    if isinstance(row, Exception):
        return [f"not JSON: {row}"]
    if not isinstance(row, dict):
        return ['expected an object such as {"prompt": "a cat", "winner": "a.png", "loser": "b.png"}']
    values = cast(dict[str, Any], row)
    found = [
        f"unknown key `{key}`{did_you_mean(key, KEYS) or '; known are ' + ', '.join(KEYS)}"
        for key in values
        if key not in KEYS
    ]
    own = "prompt_winner" in values or "prompt_loser" in values
    if own and "prompt" in values:
        found.append("either `prompt` or `prompt_winner` and `prompt_loser`, not both")
    needed = ("prompt_winner", "prompt_loser") if own else ("prompt",)
    for key in (*needed, "winner", "loser"):
        if key not in values:
            found.append(f"`{key}` is missing")
        elif not isinstance(values[key], str):
            found.append(f"`{key}` has to be text, got {json.dumps(values[key], default=str)[:60]}")
    return found


def _pair(line: int, row: dict[str, Any], folder: Path) -> PairFiles:
    prompt = row.get("prompt")
    return PairFiles(
        line,
        prompt_winner=row["prompt_winner"] if prompt is None else prompt,
        prompt_loser=row["prompt_loser"] if prompt is None else prompt,
        winner=(folder / row["winner"]).resolve(),
        loser=(folder / row["loser"]).resolve(),
    )


def _picture_problem(path: Path) -> str | None:
    if not path.is_file():
        return f"there is no picture {path}"
    try:
        with Image.open(path):
            return None
    except UnidentifiedImageError:
        return f"{path} is not a picture"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"{path} cannot be read: {error}"


def _shortened(problems: Sequence[str]) -> list[str]:
    more = len(problems) - _SHOWN
    return [*problems[:_SHOWN], *([f"and {more:,} more mistakes"] if more > 0 else [])]


def _refuse(path: Path, problems: Sequence[str]) -> None:
    if problems:
        raise UserError("\n".join([f"the pairs in {path}:", *(f"  - {problem}" for problem in _shortened(problems))]))
