"""Prompt lists, prompt files and their order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailorpo.errors import UserError
from tailorpo.noise import Noise
from tailorpo.prompts import BUNDLED, MAX_BYTES, PromptsConfig, load_prompts, prompt_order, read_prompts


def test_bundled_lists_are_the_animals_of_ddpo_and_six_others() -> None:
    assert {name: len(prompts) for name, prompts in BUNDLED.items()} == {
        "animals": 45,
        "animals_unseen": 6,
        "simple_animals": 45,
        "simple_animals_unseen": 6,
    }
    assert not set(BUNDLED["animals"]) & set(BUNDLED["animals_unseen"])
    assert {"an ant", "a cat"} < set(BUNDLED["animals"])


def test_a_file_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\r\n  un \u00e9l\u00e9phant \n# not a comment".encode())
    assert load_prompts(PromptsConfig(file=str(path))) == ("a cat", "un \u00e9l\u00e9phant", "# not a comment")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "there is no prompt in it"),
        (b"\n  \n\t\n", "there is no prompt in it"),
        (b"a cat\n\xff\xfea dog", "line 2 is not UTF-8 text (byte 0xff)"),
        ("a cat".encode("utf-16"), "not UTF-8"),
        (b"a\0cat", "line 1 holds a zero byte"),
        (b"a cat\n" + b"x" * 2001, "line 2 has 2,001 characters, at most 2,000"),
        (b"x" * (MAX_BYTES + 1), "16,000,001 bytes, at most 16,000,000"),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_prompts(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(UserError, match="it is a folder"):
        read_prompts(tmp_path)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({}, "exactly one of name, file and list, got none of them"),
        ({"name": "animals", "list": ("a cat",)}, "got name and list"),
        ({"name": "animal"}, "did you mean 'animals'"),
        ({"name": "xyz"}, "there are animals, animals_unseen"),
    ],
)
def test_a_section_names_exactly_one_known_source(given_: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptsConfig(**given_)  # type: ignore[arg-type]


@given(count=st.integers(1, 12), seed=st.integers(0, 2**40), epochs=st.integers(1, 3))
def test_every_epoch_goes_through_all_prompts_once(count: int, seed: int, epochs: int) -> None:
    prompts = [f"prompt {index}" for index in range(count)]
    noise = Noise(seed)
    drawn = [prompt_order(prompts, noise, number) for number in range(count * epochs)]
    for epoch in range(epochs):
        assert Counter(drawn[epoch * count : (epoch + 1) * count]) == Counter(prompts)


def test_epochs_have_different_orders() -> None:
    prompts = [str(index) for index in range(20)]
    orders = [[prompt_order(prompts, Noise(1), epoch * 20 + place) for place in range(20)] for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("name", ["animals", "animals_unseen"])
def test_the_captions_are_those_the_miniature_was_trained_on(name: str) -> None:
    file = Path(__file__).parents[2] / "src" / "tailorpo" / "assets" / "prompts" / f"{name}.txt"
    assert read_prompts(file) == BUNDLED[name]
