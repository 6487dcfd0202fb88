"""Prompts as OpenAI's CLIP and open_clip clean them before tokenising; transformers' tokenizer does not.

    fix_text of ftfy (curly quotes, full-width letters, mojibake), HTML entities unescaped twice, white space collapsed

Rewards whose reference is transformers' processor (PickScore) must not do this. ftfy is a small package of pure Python,
in the extra `rewards`; an own reimplementation would be right about everything but the mojibake, which is its heart.
"""

from __future__ import annotations

import html
from importlib.util import find_spec


def clean_text(text: str) -> str:
    """The prompt cleaned; lower case is left to the tokenizer."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def missing_ftfy() -> list[str]:
    """How to get ftfy, if it is not installed."""
    return [] if find_spec("ftfy") else ["pip install ftfy   (it cleans prompts as this reward's reference does)"]
