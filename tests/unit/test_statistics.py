"""Intervals and diversity against scipy, closed forms and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tailorpo.statistics import (
    FEW,
    Interval,
    compare,
    mean_interval,
    pairwise_distance,
    pairwise_rms,
    ratio_interval,
    vendi_score,
    win_rate,
)


def test_mean_interval_agrees_with_students_t_on_normal_data() -> None:
    data = np.random.default_rng(3).normal(0.4, 2.0, size=200)
    interval = mean_interval(data.tolist())
    oracle = stats.t.interval(0.95, len(data) - 1, loc=data.mean(), scale=stats.sem(data))
    assert interval.value == pytest.approx(data.mean(), abs=1e-12)
    assert interval.low is not None
    assert interval.high is not None
    width = oracle[1] - oracle[0]
    assert interval.low == pytest.approx(oracle[0], abs=0.05 * width)
    assert interval.high == pytest.approx(oracle[1], abs=0.05 * width)


def test_mean_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        interval = mean_interval(rng.exponential(1.0, size=40).tolist(), resamples=499, seed=trial)
        assert interval.low is not None
        assert interval.high is not None
        hits += interval.low <= 1.0 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99  # skewed data; the plain percentile method gives about 0.90


def test_intervals_are_the_same_for_the_same_seed_only() -> None:
    data = np.random.default_rng(0).normal(size=40).tolist()
    assert mean_interval(data, seed=1) == mean_interval(data, seed=1)
    assert mean_interval(data, seed=1) != mean_interval(data, seed=2)


@pytest.mark.parametrize("value", [0.0, -1.25])
def test_equal_values_give_an_interval_without_width(value: float) -> None:
    for count in (7, 30):
        assert mean_interval([value] * count) == Interval(value, value, value)


def test_one_prompt_gives_no_interval() -> None:
    assert mean_interval([0.5]) == Interval(0.5, None, None)
    assert ratio_interval([2.0], [1.0]) == Interval(0.5, None, None)


@settings(deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=24))
def test_ends_are_finite_and_in_order_for_any_data(values: list[float]) -> None:
    interval = mean_interval(values, resamples=99)
    assert interval.low is not None
    assert interval.high is not None
    assert interval.low <= interval.high
    if len(values) < FEW:
        assert interval.low <= interval.value <= interval.high
    else:  # a resampled mean lies between the extremes
        assert min(values) - 1e-9 <= interval.low <= interval.high <= max(values) + 1e-9


def test_few_prompts_get_students_interval() -> None:
    data = [0.3, -0.1, 0.8, 0.4, 0.2, 0.6]
    interval = mean_interval(data)
    oracle = stats.ttest_1samp(data, 0.0).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((oracle.low, oracle.high))
    assert compare([0.0] * 6, data) == compare([0.0] * 6, data, seed=5)  # nothing random in it
    assert (compare([0.0] * 6, data) or {})["interval"] == "student"
    assert (compare([0.0] * 20, data * 3 + data[:2]) or {})["interval"] == "bca"


def test_few_prompts_get_a_ratio_close_to_fiellers() -> None:
    rng = np.random.default_rng(2)
    base = rng.normal(4.0, 0.4, size=8)
    aligned = 0.8 * base + rng.normal(0, 0.1, size=8)
    interval = ratio_interval(base.tolist(), aligned.tolist())
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx(fieller(base, aligned), abs=0.002)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_what_has_no_mean_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite number per prompt"):
        mean_interval(values)


@pytest.mark.parametrize("times", [1, 6])
def test_ratio_of_proportional_data_is_exact(times: int) -> None:
    base = [1.0, 2.0, 3.0, 5.0] * times
    interval = ratio_interval(base, [0.5 * value for value in base])
    assert interval is not None
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.5, 0.5, 0.5))


def fieller(base: np.ndarray, aligned: np.ndarray) -> tuple[float, float]:
    """All r for which mean(aligned - r base) = 0 is not rejected by a t test."""
    grid = np.linspace(0.7, 0.9, 2001)
    kept = [r for r in grid if stats.ttest_1samp(aligned - r * base, 0.0).pvalue > 0.05]
    return kept[0], kept[-1]


def test_ratio_interval_agrees_with_fiellers_theorem() -> None:
    rng = np.random.default_rng(5)
    base = rng.normal(4.0, 0.5, size=150)
    aligned = 0.8 * base + rng.normal(0, 0.3, size=150)
    interval = ratio_interval(base.tolist(), aligned.tolist())
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx(fieller(base, aligned), abs=0.003)


def test_ratio_needs_a_positive_base() -> None:
    assert ratio_interval([0.0, 0.0], [1.0, 2.0]) is None


@settings(deadline=None)
@given(st.integers(1, 60), st.data())
def test_win_rate_agrees_with_scipy(n: int, data: st.DataObject) -> None:
    wins = data.draw(st.integers(0, n))
    rate = win_rate([1.0] * wins + [-1.0] * (n - wins))
    oracle = stats.binomtest(wins, n).proportion_ci(0.95, method="wilson")
    assert (rate.value, rate.low, rate.high) == pytest.approx((wins / n, oracle.low, oracle.high), abs=1e-9)


def test_ties_count_half_a_win() -> None:
    assert win_rate([0.0, 0.0]).value == 0.5
    assert win_rate([1.0, 0.0, 0.0, -1.0]) == win_rate([1.0, 1.0, -1.0, -1.0])
    with pytest.raises(ValueError, match="at least one"):
        win_rate([])


def brute_vendi(features: np.ndarray) -> float:
    """The definition, with the kernel built entry by entry and the general eigenvalue solver."""
    n = len(features)
    kernel = [[float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for b in features] for a in features]
    values = np.linalg.eigvals(np.array(kernel) / n).real
    return math.exp(-sum(v * math.log(v) for v in values if v > 1e-12))


def test_vendi_score_of_equal_orthogonal_and_random_rows() -> None:
    assert vendi_score(torch.ones(5, 3)) == pytest.approx(1.0)
    assert vendi_score(3.0 * torch.eye(4)) == pytest.approx(4.0)
    assert vendi_score(torch.eye(2).repeat(3, 1)) == pytest.approx(2.0)
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    assert vendi_score(features) == pytest.approx(brute_vendi(features.double().numpy()), rel=1e-6)


def test_pairwise_distance_of_equal_orthogonal_and_random_rows() -> None:
    assert pairwise_distance(torch.ones(5, 3)) == pytest.approx(0.0, abs=1e-12)
    assert pairwise_distance(torch.eye(4)) == pytest.approx(1.0)
    assert math.isnan(pairwise_distance(torch.ones(1, 3)))
    features = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    pairs = [(i, j) for i in range(7) for j in range(i)]
    oracle = np.mean([1 - float(torch.cosine_similarity(features[i], features[j], dim=0)) for i, j in pairs])
    assert pairwise_distance(features) == pytest.approx(float(oracle), abs=1e-6)
    differences = [math.sqrt(float((features[i] - features[j]).square().mean())) for i, j in pairs]
    assert pairwise_rms(features) == pytest.approx(np.mean(differences), rel=1e-6)
    assert math.isnan(pairwise_rms(features[:1]))
