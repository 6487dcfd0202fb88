"""A CLIP tokenizer of the miniature's own, in which every caption word is one token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from miniature.concepts import BACKGROUNDS, CONCEPTS

PATH = Path(__file__).with_suffix(".json")
LENGTH = 16
START, END = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer() -> CLIPTokenizer:
    """The tokenizer, read from `tokenizer.json` beside this file, which `python -m miniature.tokenizer` writes.

    The trainer breaks ties by the order of a hash table, which differs between processes: a tokenizer made anew would
    give the words of a trained model to other concepts. So it was trained once; a new world needs it written again.
    """
    saved = json.loads(PATH.read_text(encoding="utf-8"))
    tokenizer = CLIPTokenizer(
        vocab=saved["vocabulary"], merges=[tuple(pair) for pair in saved["merges"]], model_max_length=LENGTH
    )
    broken = [word for word in _words() if len(tokenizer(word).input_ids) != 3]
    assert not broken, f"not one token: {broken}"
    return tokenizer


def _words() -> list[str]:
    return sorted(
        {word for c in CONCEPTS for word in c.word.split()} | set(BACKGROUNDS) | {"a", "an", "on", "background"}
    )


def _train_merges() -> dict[str, Any]:
    """Trains byte-pair merges on the world's words until each is whole; any other text falls back to bytes."""
    words = _words()
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.decoder = decoders.BPEDecoder(suffix="</w>")
    bpe.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=100_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = alphabet + [letter + "</w>" for letter in alphabet]
    vocabulary += [token for token in ("".join(pair) for pair in merges) if token not in set(vocabulary)] + [START, END]
    return {"vocabulary": {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}, "merges": merges}


if __name__ == "__main__":
    PATH.write_text(json.dumps(_train_merges(), indent=0) + "\n", encoding="utf-8")
