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

PAPERS_G = ("algorithm.guidance.symmetric=false", "algorithm.kl_target=null")
"""TailorPO-G as the paper has it, and as it was tuned; the demo's recipe has since taken what `beyond` found better."""
