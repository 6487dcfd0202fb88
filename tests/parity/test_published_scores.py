"""Scores with the official weights, for those who have them; skipped otherwise.

TAILORPO_REWARD_WEIGHTS names a folder with one folder for each reward, filled as `tailorpo rewards` says (image_reward,
hpsv2, pickscore, aesthetic, clip_score), and `pictures` with 1.webp to 4.webp of ImageReward's assets/images. What is
not there is skipped. ImageReward's numbers are those of its README; for the others none are published for pictures that
one can get, so they are held to the ranges of docs/rewards alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tailorpo.images import load_png
from tailorpo.rewards import Aesthetic, ClipScore, HPSv2, ImageReward, PickScore

WEIGHTS = os.environ.get("TAILORPO_REWARD_WEIGHTS")
PROMPT = "a painting of an ocean with clouds and birds, day time, low depth field effect"

pytestmark = pytest.mark.skipif(not WEIGHTS, reason="TAILORPO_REWARD_WEIGHTS names no folder with official weights")


def score(reward: Any) -> Tensor:
    """Of the four pictures, which may differ in size; through Pillow's bytes, as the official code."""
    pictures = Path(str(WEIGHTS)) / "pictures"
    if reward.missing() or not (pictures / "4.webp").is_file():
        pytest.skip(f"not there: {reward.missing() or pictures / '4.webp'}")
    scorer = reward.load("cpu")
    scorer.preprocess = replace(scorer.preprocess, eight_bit=True)
    with torch.no_grad():
        return torch.cat([scorer(load_png(pictures / f"{number}.webp")[None], [PROMPT]) for number in range(1, 5)])


def test_image_reward_gives_the_numbers_of_its_readme() -> None:
    scores = score(ImageReward(path=f"{WEIGHTS}/image_reward"))
    assert scores.tolist() == pytest.approx([0.5812, 0.2745, -1.4132, -2.0296], abs=0.01)


@pytest.mark.parametrize(
    ("make", "low", "high"),
    [
        (lambda: HPSv2(path=f"{WEIGHTS}/hpsv2"), 0.05, 0.4),
        (lambda: HPSv2(path=f"{WEIGHTS}/hpsv2", version="2.0"), 0.15, 0.35),
        (lambda: PickScore(path=f"{WEIGHTS}/pickscore"), 14, 26),
        (lambda: Aesthetic(path=f"{WEIGHTS}/aesthetic"), 3, 9),
        (lambda: ClipScore(path=f"{WEIGHTS}/clip_score"), 0.1, 0.45),
    ],
)
def test_the_others_stay_in_their_ranges(make: Callable[[], Any], low: float, high: float) -> None:
    scores = score(make())
    assert scores.min() > low
    assert scores.max() < high
