"""Results of other experiments held against the weighted base, each at its own gain on its own prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from tailorpo.experiments import diversity_price
from tailorpo.weighted_base import STRENGTHS


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
