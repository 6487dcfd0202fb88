"""Cleaned prompts through transformers' tokenizer against open_clip's own token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPTokenizer

from tailorpo.rewards.clean_text import clean_text

FIXTURE = json.loads((Path(__file__).resolve().parents[1] / "fixtures" / "open_clip_tokens.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    vocab: dict[str, int] = {token: number for number, token in enumerate(FIXTURE["bytes"])} | FIXTURE["vocab"]
    return CLIPTokenizer(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in FIXTURE["merges"]])


@pytest.mark.parametrize("probe", FIXTURE["probes"], ids=range(len(FIXTURE["probes"])))
def test_a_cleaned_prompt_has_open_clips_tokens(tokenizer: CLIPTokenizer, probe: dict[str, Any]) -> None:
    assert tokenizer(clean_text(probe["text"]), truncation=True, max_length=77)["input_ids"] == probe["ids"]


def test_without_cleaning_six_of_the_fourteen_would_be_others(tokenizer: CLIPTokenizer) -> None:
    raw = [tokenizer(probe["text"], truncation=True, max_length=77)["input_ids"] for probe in FIXTURE["probes"]]
    assert sum(ids != probe["ids"] for ids, probe in zip(raw, FIXTURE["probes"], strict=True)) == 6


def test_what_cleaning_does() -> None:
    assert clean_text("\u201ccaf\u00c3\u00a9\u201d  \n &amp;lt;\uff21\uff22\uff23&gt; ") == '"caf\u00e9" <ABC>'
    assert clean_text("") == ""
