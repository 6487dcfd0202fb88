"""The prompts of a run: bundled lists, files of one prompt per line, or a list in the run file.

`simple_animals` are the 45 training prompts of DDPO and D3PO (bare nouns, as in their asset file), which the paper's
"animals" most likely are; `simple_animals_unseen` are AlignProp's six held-out ones (the paper's own held-out list is
not known). `animals` and `animals_unseen` are the same words as captions of the bundled miniature ("a cat").

The prompt of a training trajectory depends on the run's seed and the trajectory's number alone: every epoch goes once
through all prompts in a new order, whatever the batch size.

Left out: weights per prompt and templates; repeat a line or write the file with a script.
"""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from tailorpo.errors import UserError
from tailorpo.noise import Noise

MAX_BYTES = 16_000_000
"""Larger prompt files are refused: they are pictures or data sets, not prompts."""
MAX_CHARACTERS = 2_000
"""Longer prompts are refused; text encoders read at most 77 tokens anyway."""

_ANIMALS = tuple(
    """
    cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle ant
    butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly llama
    camel bat gorilla hedgehog kangaroo
    """.split()
)
_UNSEEN = ("snail", "hippopotamus", "cheetah", "crocodile", "lobster", "octopus")


def _captions(words: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{'an' if word[0] in 'aeio' else 'a'} {word}" for word in words)


BUNDLED: dict[str, tuple[str, ...]] = {
    "animals": _captions(_ANIMALS),
    "animals_unseen": _captions(_UNSEEN),
    "simple_animals": _ANIMALS,
    "simple_animals_unseen": _UNSEEN,
}
"""The prompt lists that come with the package."""


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """The `prompts` section of a run file: exactly one of three sources.

    Attributes:
        name: a bundled list, one of `BUNDLED`.
        file: a UTF-8 text file with one prompt per line; blank lines are skipped.
        list: the prompts themselves.
    """

    name: str | None = None
    file: str | None = None
    list: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        given = [key for key in ("name", "file", "list") if getattr(self, key) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none of them"
            raise ValueError(f"expected exactly one of name, file and list, got {got}")
        if self.name is not None and self.name not in BUNDLED:
            close = get_close_matches(self.name, BUNDLED, n=1)
            hint = f"did you mean '{close[0]}'? There are" if close else "there are"
            raise ValueError(f"no bundled prompt list '{self.name}'; {hint} {', '.join(BUNDLED)}")


def load_prompts(config: PromptsConfig) -> tuple[str, ...]:
    """The prompts of a section, stripped, in their order.

    Raises:
        UserError: the file is missing, too large, not UTF-8 text, or holds no prompt or an overlong one.
    """
    if config.name is not None:
        return BUNDLED[config.name]
    if config.list is not None:
        return _checked(config.list, "the prompt list", "item")
    assert config.file is not None
    return read_prompts(Path(config.file))


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a text file; see `load_prompts`."""
    if not path.is_file():
        raise UserError(f"prompt file {path}: {'it is a folder' if path.is_dir() else 'there is no such file'}")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UserError(f"prompt file {path}: {size:,} bytes, at most {MAX_BYTES:,} are accepted; is it a prompt list?")
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"prompt file {path}: it cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"prompt file {path}: line {line} is not UTF-8 text (byte 0x{error.object[error.start]:02x}); "
            "save the file with the encoding UTF-8"
        ) from error
    return _checked(text.splitlines(), f"prompt file {path}", "line")


def _checked(lines: Sequence[str], source: str, unit: str) -> tuple[str, ...]:
    prompts: builtins.list[str] = []
    for number, line in enumerate(lines, start=1):
        prompt = line.strip()
        if len(prompt) > MAX_CHARACTERS:
            raise UserError(
                f"{source}: {unit} {number} has {len(prompt):,} characters, at most {MAX_CHARACTERS:,} are accepted"
            )
        if "\0" in prompt:
            raise UserError(f"{source}: {unit} {number} holds a zero byte; it is not a text file")
        if prompt:
            prompts.append(prompt)
    if not prompts:
        raise UserError(f"{source}: there is no prompt in it; write one per {unit}")
    return tuple(prompts)


def prompt_order(prompts: Sequence[str], noise: Noise, trajectory: int) -> str:
    """The prompt of the training trajectory with the given number, counted from 0 over the whole run."""
    epoch, position = divmod(trajectory, len(prompts))
    return prompts[noise.permutation(len(prompts), "prompts", epoch)[position]]
