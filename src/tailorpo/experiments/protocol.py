"""What the experiments on the miniature have in common: rewards, budget and evaluation."""

from __future__ import annotations

PREFERENCE, JPEG, COLOUR = "emoji_preference", "jpeg_compressibility", "colourfulness"

BUDGET = 5_600
"""Guided network evaluations of every run: 20 updates of the demo. Methods are compared where they were tuned."""

EVALUATION = (
    "eval.seeds=2",
    "eval.batch_size=32",
    "eval.prompts_unseen={name: animals_unseen}",
    "eval.judge={name: emoji_judge}",
)
