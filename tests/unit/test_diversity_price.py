"""The weighted base: a closed form, draws from the tilted distribution itself, and runs held against the curve."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.distance import cdist

pytest.importorskip("matplotlib")

from tailorpo.experiments import diversity_price
from tailorpo.experiments.diversity_price import STRENGTHS, reweighted


@pytest.mark.parametrize("strength", [0.0, 0.7, 2.0])
def test_two_kinds_of_pictures_in_closed_form(strength: float) -> None:
    """A share p of the pictures is good (judge 1), the others bad (judge 0); kinds differ by 1, pictures of one kind by
    nothing. Tilted, the good ones have q = p e^l / (p e^l + 1 - p), and two of them differ with 2 q (1 - q)."""
    good = np.array([1.0] * 30 + [0.0] * 70)
    judge, distance, effective = reweighted(good, np.abs(good[:, None] - good[None]), strength)
    q = 0.3 * math.exp(strength) / (0.3 * math.exp(strength) + 0.7)
    assert judge == pytest.approx(q)
    squares = q**2 / 30 + (1 - q) ** 2 / 70
    assert effective == pytest.approx(1 / squares)
    # Without the pairs of a picture with itself, which differ by 0 whatever the model does.
    assert distance == pytest.approx(2 * q * (1 - q) / (1 - squares))


def test_a_strength_that_leaves_one_picture_leaves_no_distance() -> None:
    assert reweighted(np.array([0.0, 9.0]), np.array([[0.0, 1.0], [1.0, 0.0]]), 1e3) == (9.0, 0.0, 1.0)


def test_weights_say_what_drawing_from_the_tilted_distribution_would() -> None:
    """Features and judge are one Gaussian; tilting shifts the mean of the judge by lambda times its variance and leaves
    the spread, so the distance stays; where the spread shrinks with the judge it falls, as in draws by rejection."""
    rng = np.random.default_rng(0)
    judge = rng.normal(0, 0.8, 2000)
    features = judge[:, None] + rng.normal(size=(2000, 2))
    mean, distance, _ = reweighted(judge, cdist(features, features, "sqeuclidean"), 0.5)
    assert mean == pytest.approx(0.5 * 0.64, abs=0.05)
    assert distance == pytest.approx(2 * 2 * (1 + 0.64), rel=0.05)
    shrinking = rng.normal(size=(2000, 2)) * np.exp(-judge)[:, None]
    _, distance, _ = reweighted(judge, cdist(shrinking, shrinking, "sqeuclidean"), 0.5)
    kept = shrinking[rng.random(2000) < np.exp(0.5 * (judge - judge.max()))]
    drawn = cdist(kept, kept, "sqeuclidean").sum() / (len(kept) * (len(kept) - 1))
    assert distance == pytest.approx(drawn, rel=0.15)


def cell(seed: int, judge: float, distance: float, *, steps: int = 20) -> dict[str, Any]:
    """A result of two seen prompts and an unseen one, whose judge rises by `judge` and of whose distance so much is
    left."""
    measures = {
        "judge": {"base": [5.0, 7.0, 0.0], "aligned": [5.0 + judge, 7.0 + judge, 9.0]},
        "distance": {"base": [0.2, 0.4, 0.1], "aligned": [0.2 * distance, 0.4 * distance, 0.9]},
    }
    evaluation = {"prompts": ["a", "b", "c"], "groups": ["seen", "seen", "unseen"], "measures": measures}
    sampler = {"name": "ddim", "steps": steps}
    return {
        "variant": "alone",
        "reward": "colourfulness",
        "seed": seed,
        "settings": {"sampler": sampler},
        "evaluation": evaluation,
    }


def test_runs_are_held_against_the_curve_at_their_own_gain_on_their_own_prompts(tmp_path: Path) -> None:
    """A curve that falls by a tenth per tenth of gain over both prompts: at a gain of 0.2 the base keeps 80 %."""
    fall = np.array(STRENGTHS)
    curves = {
        name: np.stack([level + fall, scale * (1 - fall), np.full(len(fall), 9.0)], axis=1)
        for name, level, scale in (("a", 5.0, 0.2), ("b", 7.0, 0.4), ("other", 0.0, 9.0))
    }
    hidden: list[dict[str, Any]] = [cell(1, 0.3, 0.9, steps=10), {**cell(1, 0.3, 0.9), "reward": "brightness"}]
    hidden[1]["evaluation"]["prompts"] = ["a", "nobody", "c"]
    lost = {**cell(1, -0.3, 0.9), "variant": "ruined"}
    content = {"cells": [cell(2, 0.3, 0.63), cell(1, 0.2, 0.88), *hidden, lost]}
    (tmp_path / "alarm.json").write_text(json.dumps(content))
    [row] = diversity_price.trained(curves, tmp_path, {"name": "ddim", "steps": 20})
    assert (row["experiment"], row["reward"], row["variant"]) == ("alarm", "colourfulness", "alone")
    assert [seed["seed"] for seed in row["seeds"]] == [1, 2]
    assert [seed["gain"] for seed in row["seeds"]] == pytest.approx([0.2, 0.3])
    assert [seed["kept"] for seed in row["seeds"]] == pytest.approx([0.88, 0.63])
    assert [seed["price"] for seed in row["seeds"]] == pytest.approx([0.8, 0.7])
    shown = {"sizes": {"pictures": 9}, "prompts": 3, "curve": [[0.0, 0.0, 1.0, 1.0, 1.0, 9.0]], "rows": [row]}
    # 0.88 of 0.80 is 110 %, 0.63 of 0.70 is 90 %; t on one degree of freedom is 12.7.
    text = diversity_price.table(shown)
    assert "| alarm | colourfulness | alone | 2 | +0.250 | 76 % | 75 % | 100 [-27, 227] % |" in text
