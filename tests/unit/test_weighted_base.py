"""The weighted base: a closed form, draws from the tilted distribution itself, and an aligned model beside it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import cdist

from tailorpo.statistics import jackknife_interval, pairwise_distance, student_interval
from tailorpo.weighted_base import STRENGTHS, Array, curve, distances, frontier, held, price, reweighted


def differing(kinds: Array) -> Array:
    """1 between pictures of different kinds, 0 within a kind."""
    return np.abs(kinds[:, None] - kinds[None])


@pytest.mark.parametrize("strength", [0.0, 0.7, 2.0])
def test_two_kinds_of_pictures_in_closed_form(strength: float) -> None:
    """A share p of the pictures is good (judge 1), the others bad (judge 0); kinds differ by 1, pictures of one kind by
    nothing. Tilted, the good ones have q = p e^l / (p e^l + 1 - p), and two of them differ with 2 q (1 - q)."""
    good = np.array([1.0] * 30 + [0.0] * 70)
    judge, distance, effective = reweighted(good, differing(good), strength)
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


def test_unweighted_it_is_the_distance_of_the_evaluation() -> None:
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    _, distance, effective = reweighted(np.arange(6.0), distances(features), 0.0)
    assert distance == pytest.approx(pairwise_distance(features))
    assert effective == pytest.approx(6)


def test_the_unit_of_the_judge_does_not_matter_where_strengths_are_in_spreads() -> None:
    rng = np.random.default_rng(1)
    judge, between = rng.normal(size=8), distances(torch.from_numpy(rng.normal(size=(8, 3))))
    plain, scaled = curve(judge, between, spread=1.0), curve(100 * judge + 7, between, spread=100.0)
    assert scaled[:, 1:] == pytest.approx(plain[:, 1:])
    assert scaled[:, 0] == pytest.approx(100 * plain[:, 0] + 7)


def kinds(prompts: int, seed: int = 0) -> tuple[Array, Array]:
    """Curves of prompts with 40 pictures of two kinds each, and their shares of good ones."""
    shares = np.random.default_rng(seed).integers(8, 25, prompts) / 40
    good = [np.array([1.0] * round(40 * share) + [0.0] * round(40 * (1 - share))) for share in shares]
    return np.stack([curve(each, differing(each)) for each in good]), shares


def test_an_aligned_model_is_held_against_the_tilt_of_all_prompts_by_one_strength() -> None:
    """The strength in between is read off linearly, so the closed form is met to a few thousandths."""
    curves, shares = kinds(9)
    tilted = shares * math.exp(0.7) / (shares * math.exp(0.7) + 1 - shares)
    squares = (tilted**2 / shares + (1 - tilted) ** 2 / (1 - shares)) / 40
    left = 2 * tilted * (1 - tilted) / (1 - squares)
    full = 2 * shares * (1 - shares) / (1 - 1 / 40)
    gains = np.full(9, (tilted - shares).mean())
    found = held(curves, gains.tolist(), full.tolist(), (0.6 * full).tolist(), confidence=0.95)
    assert found is not None
    assert found.share.value == pytest.approx(left.mean() / full.mean(), abs=4e-3)
    assert found.of_it.value == pytest.approx(0.6 / found.share.value)
    assert not found.beyond
    # The interval: pseudo-values by hand.
    without = [price(np.delete(curves, row, axis=0), float(gains[0])) for row in range(9)]
    pseudo = [9 * found.share.value - 8 * each for each in without]
    half = stats.t.ppf(0.975, 8) * np.std(pseudo, ddof=1) / 3
    assert found.share.low == pytest.approx(found.share.value - half)
    assert found.share.high == pytest.approx(found.share.value + half)


def test_no_gain_costs_nothing_and_beyond_the_end_the_last_share_stands() -> None:
    curves, shares = kinds(5)
    ones = [1.0] * 5
    for gain, share, beyond in ((0.0, 1.0, False), (-0.3, 1.0, False), (9.0, frontier(curves)[1][-1], True)):
        found = held(curves, [gain] * 5, ones, [0.5] * 5, confidence=0.95)
        assert found is not None
        assert (found.share.value, found.beyond) == (pytest.approx(share), beyond)
    assert frontier(curves)[2][-1] >= 10
    assert len(frontier(curves)[0]) <= len(STRENGTHS)
    assert held(curves, [0.1] * 5, [0.0] * 5, ones, confidence=0.95) is None
    alone = held(curves[:1], [0.1], ones[:1], ones[:1], confidence=0.95)
    assert alone is not None
    assert alone.share.low is None
    assert shares.max() < 1


def test_the_jackknife_of_a_mean_is_students_interval() -> None:
    values = np.random.default_rng(2).exponential(size=12)
    without = [float(np.delete(values, row).mean()) for row in range(12)]
    found = jackknife_interval(float(values.mean()), without, confidence=0.9)
    expected = student_interval(values.tolist(), confidence=0.9)
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert jackknife_interval(1.0, [], confidence=0.9).low is None
