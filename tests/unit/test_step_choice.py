"""Trained steps chosen by a measurement: against brute force, against a simulation of pairs, and its files."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import settings

from tailorpo.algorithms.tailorpo import TailorPO
from tailorpo.errors import RunFileError
from tailorpo.noise import Noise
from tailorpo.run import Run
from tailorpo.step_choice import AutoSteps, StepSignal, best_subset, read_signals


def write(folder: Path, rows: Any) -> str:
    path = folder / "jensen.json"
    path.write_text(json.dumps({"steps": rows}))
    return str(path)


def rows(*values: tuple[int, float, float]) -> list[dict[str, Any]]:
    return [{"k": k, "time": 1, "v": v, "misrank": p, "correlation": 0.5} for k, v, p in values]


def test_the_best_steps_are_those_of_a_search_through_all_subsets() -> None:
    generator = torch.Generator().manual_seed(5)
    greedy_fails = 0
    for trial in range(120):
        size = 3 + trial % 6
        gains = [float(v) for v in torch.rand(size, generator=generator).pow(2)]
        prices = [float(v) for v in torch.randn(size, generator=generator).exp().pow(2)]
        for count in range(1, size + 1):

            def worth(chosen: tuple[int, ...], gains: list[float] = gains, prices: list[float] = prices) -> float:
                return sum(gains[i] for i in chosen) / math.sqrt(sum(prices[i] for i in chosen))

            best = max(map(worth, combinations(range(size), count)))
            assert worth(best_subset(gains, prices, count=count)) == pytest.approx(best, rel=1e-12)
            alone = sorted(range(size), key=lambda i: -gains[i] / math.sqrt(prices[i]))[:count]
            greedy_fails += worth(tuple(alone)) < 0.99 * best
    assert greedy_fails > 20  # so the search above was no formality
    assert best_subset([3.0, 1.0, 2.0, 0.5], [1.0] * 4, count=2) == (0, 2)


def test_a_pair_teaches_the_true_direction_as_much_as_the_rule_says() -> None:
    """Siblings of a linear value and of a step reward at an angle to it, labelled by the latter, drawn a million times;
    the probability of a misranked pair is counted, not computed."""
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 1_000_000, 2, generator=generator, dtype=torch.float64)
    for angle, size in ((0.2, 1.0), (0.8, 0.5), (1.3, 2.0)):
        value = size * (first - second)[:, 0]
        guess = (first - second) @ torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
        taught = guess.sign() * value  # true reward per unit of movement along z_w - z_l
        signal = StepSignal(0, v=float(value.square().mean() / 2), misrank=float((guess * value < 0).double().mean()))
        assert float(taught.mean()) == pytest.approx(2 / math.sqrt(math.pi) * signal.gain, rel=0.01)
    assert StepSignal(0, v=-0.1, misrank=0.1).gain == StepSignal(0, v=1.0, misrank=0.6).gain == 0


def test_steps_come_from_the_file(tmp_path: Path) -> None:
    measured = write(tmp_path, rows((3, 0.04, 0.1), (0, 1.0, 0.5), (1, 0.02, 0.1), (2, 0.05, 0.4)))
    method = TailorPO(train_steps=AutoSteps(auto=2, measured=measured))
    assert method.trained_steps(4, noise=Noise(0), update=7) == (1, 3)
    priced = rows((3, 0.04, 0.1), (1, 0.02, 0.1), (2, 0.05, 0.4))
    priced[1]["noise_weight"] = 50.0  # so much KL that its signal drowns what the others teach
    write(tmp_path, priced)
    assert method.trained_steps(4, noise=Noise(0), update=7) == (2, 3)


def test_the_bundled_measurement_is_that_of_the_miniature() -> None:
    signals = read_signals("emoji_preference")
    table = json.loads((Path(__file__).parents[2] / "miniature/results.json").read_text())["siblings"]["1.5"]
    assert [each.k for each in signals] == [int(k) for k in table] == list(range(19))
    for each in signals:
        row = table[str(each.k)]
        assert 2 * each.v + row["noise_of_true_gap"] ** 2 == pytest.approx(row["std_of_true_gap"] ** 2, rel=1e-3)
    assert max(signals, key=lambda each: each.noise_weight).k == 18
    for count in range(1, 19):
        for power in (1, 2):
            assert 18 not in AutoSteps(auto=count, measured="emoji_preference").choose(power=power)


@pytest.mark.parametrize(
    ("steps", "content", "message"),
    [
        ({"auto": 0, "measured": "emoji_preference"}, None, "train_steps: auto must be at least 1, got 0"),
        ({"auto": 2}, None, "train_steps.measured: missing"),
        ({"auto": 2, "measured": "nowhere.json"}, None, "train_steps.measured: there is no file nowhere.json"),
        ({"auto": 2, "measured": "emoji_preference"}, None, "more steps than the 4 of sampler.steps (it has step 18)"),
        ({"auto": 2}, rows((0, 1.0, 0.1), (1, 0.1, 0.5), (2, -0.1, 0.1)), "auto is 2, and"),
        ({"auto": 1}, rows((0, 1.0, 0.1), (0, 1.0, 0.1)), "has a step twice"),
        ({"auto": 1}, rows((0, 1.0, 1.5)), "misrank must be in 0..1"),
        ({"auto": 1}, [{"k": 0, "v": None, "misrank": 0.1}], "has no step with v and misrank"),
        ({"auto": 1}, [{"k": 0}], "is no measurement of `tailorpo jensen`"),
        ({"auto": 1}, "text", "is no measurement of `tailorpo jensen`"),
    ],
)
def test_mistakes_are_said_in_words(tmp_path: Path, steps: Any, content: Any, message: str) -> None:
    given = steps if content is None else {**steps, "measured": write(tmp_path, content)}
    with pytest.raises(RunFileError) as caught:
        Run.from_dict(settings("emoji", algorithm={"name": "tailorpo", "train_steps": given}))
    assert message in str(caught.value)
    assert len(caught.value.problems) == 1
