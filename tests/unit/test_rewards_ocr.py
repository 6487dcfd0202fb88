"""The OCR reward: its arithmetic by hand, and the real reader on rendered words."""

from __future__ import annotations

import builtins
import socket
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tailorpo.errors import RewardError
from tailorpo.images import from_pil
from tailorpo.rewards import OCR, Scorer
from tailorpo.rewards.ocr import OCRScorer, edit_distance, quoted, text_accuracy


@pytest.mark.parametrize(
    ("read", "target", "expected"),
    [
        ("HELLO", "hello", 1.0),
        ("Hello  World", "helloworld", 1.0),
        ("say hello to them", "o t", 1.0),  # contained, spaces and all
        ("hallo", "hello", 1 - 1 / 5),
        ("hell", "hello", 1 - 1 / 5),
        ("", "hello", 0.0),
        ("something else entirely", "hello", 0.0),  # more edits than characters: capped
        ("hello", "hello world", 1 - 5 / 10),
        ("kitten", "sitting", 1 - 3 / 7),
        ("ab", "ba", 0.0),
    ],
)
def test_accuracy_by_hand(read: str, target: str, expected: float) -> None:
    assert text_accuracy(read, target) == pytest.approx(expected, abs=1e-12)


def test_edit_distance_is_a_metric_with_known_values() -> None:
    words = ["", "a", "saturday", "sunday", "kitten", "sitting", "\u00e9t\u00e9"]
    known = {("saturday", "sunday"): 3, ("kitten", "sitting"): 3, ("", "saturday"): 8, ("a", "\u00e9t\u00e9"): 3}
    for (a, b), distance in known.items():
        assert edit_distance(a, b) == edit_distance(b, a) == distance
    for a in words:
        assert edit_distance(a, a) == 0
        for b in words:
            for c in words:
                assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


def test_the_target_is_what_stands_in_the_first_pair_of_quotes() -> None:
    assert quoted('a sign that says "Open 24h" next to "Closed"') == "Open 24h"
    assert quoted('"Hi" on a mug') == "Hi"
    for prompt in ("a cat", 'a "cat', 'a sign that says ""', 'a sign that says " "', "a 'cat'"):
        with pytest.raises(RewardError, match=r"has no text in double quotes.*Grand Opening"):
            quoted(prompt)


def sign(text: str) -> Tensor:
    picture = Image.new("RGB", (448, 448), (240, 230, 210))
    if text:
        ImageDraw.Draw(picture).multiline_text((24, 40), text, fill=(20, 30, 90), font=ImageFont.load_default(size=52))
    return from_pil(picture)


@pytest.fixture(scope="module")
def reward() -> OCRScorer:
    pytest.importorskip("rapidocr")
    return OCR().load("cpu")


def test_rendered_words_are_read(reward: OCRScorer) -> None:
    images = torch.stack([sign("Welcome"), sign(""), sign("Open\nDaily"), sign("Welcome")])
    prompts = ['a sign, "come"', 'a sign, "Welcome"', 'a sign, "open daily"', 'a sign, "Welkome"']
    scores = Scorer([(reward, 1.0)])(images, prompts)
    assert scores.tolist() == pytest.approx([1.0, 0.0, 1.0, 1 - 1 / 7])
    assert scores.dtype == torch.float32


def test_noise_a_prompt_without_quotes_and_a_gradient(reward: OCRScorer) -> None:
    noise = torch.rand(1, 3, 448, 448, generator=torch.Generator().manual_seed(0))
    assert float(reward(noise, ['a "long sentence"'])) < 0.5
    with pytest.raises(RewardError, match=r"^reward 'ocr': the prompt 'a cat' has no text"):
        Scorer([(reward, 1.0)])(noise, ["a cat"])
    with pytest.raises(RewardError, match="has no gradient"):
        Scorer([(reward, 1.0)])(noise.requires_grad_(), ['a "cat"'])


def test_the_reader_gets_red_first_and_every_picture_its_own_prompt() -> None:
    seen: list[Any] = []

    def read(picture: Any) -> str:
        seen.append(picture)
        return "red" if picture[0, 0].tolist() == [255, 0, 0] else "other"

    images = torch.zeros(2, 3, 4, 6)
    images[0, 0] = 1
    assert OCRScorer(read, name="ocr")(images, ['"red"', '"red"']).tolist() == [1.0, pytest.approx(0.0)]
    assert [picture.shape for picture in seen] == [(4, 6, 3)] * 2


def test_loading_and_reading_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rapidocr")

    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert OCR().load("cpu")(sign("Hi")[None], ['"Hi"']).tolist() == [1.0]


def test_without_the_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "rapidocr":
            raise ModuleNotFoundError("No module named 'rapidocr'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RewardError, match=r"needs the packages rapidocr .*pip install 'tailorpo\[ocr\]'"):
        OCR().load("cpu")
