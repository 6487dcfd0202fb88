"""The statistics of experiments: against brute force, other libraries, and their promise on data made for it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from tailorpo.experiments.statistics import Matrix, improvement, iqm, mean


def crossed(rng: np.random.Generator, *, seeds: int, of_seed: float, of_prompt: float, rest: float) -> Matrix:
    """Numbers whose true mean is zero, with effects of the seed and of the prompt, 45 prompts."""
    effects = rng.normal(size=(seeds, 1)) * of_seed + rng.normal(size=(1, 45)) * of_prompt
    return effects + rng.normal(size=(seeds, 45)) * rest


def test_one_seed_is_students_interval_over_prompts() -> None:
    values = np.random.default_rng(1).normal(size=(1, 30))
    found = mean(values)
    expected = stats.t.interval(0.95, 29, values.mean(), stats.sem(values[0]))
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.seeds == 1


def test_without_an_effect_of_prompts_it_is_students_interval_over_seeds() -> None:
    """Every prompt says the same of a seed: S numbers, and nothing else."""
    seeds = np.array([0.3, 0.5, 0.1, 0.45])
    found = mean(np.repeat(seeds[:, None], 40, axis=1))
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 3, seeds.mean(), stats.sem(seeds)))


def test_the_standard_error_is_that_of_the_crossed_model() -> None:
    """Over many data sets the mean varies by the variance that a single one estimates."""
    rng, seeds = np.random.default_rng(2), 5
    widths, means = [], []
    for _ in range(600):
        values = crossed(rng, seeds=seeds, of_seed=0.2, of_prompt=0.5, rest=0.4)
        found = mean(values)
        assert found.low is not None
        assert found.high is not None
        widths.append((found.high - found.low) / 2)
        means.append(found.value)
    true = math.sqrt(0.2**2 / seeds + 0.5**2 / 45 + 0.4**2 / (45 * seeds))
    assert np.std(means) == pytest.approx(true, rel=0.1)
    # t quantiles of the degrees of freedom that such data have lie between those of 4 and of infinitely many
    assert 1.96 * true < np.mean(widths) < 2.9 * true


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(("of_seed", "of_prompt"), [(0.0, 0.3), (0.1, 0.3), (0.3, 0.1)])
def test_intervals_cover_the_truth_about_as_often_as_they_say(seeds: int, of_seed: float, of_prompt: float) -> None:
    """And percentiles of the plain bootstrap do not, where seeds differ: the reason for stretching them."""
    rng, trials = np.random.default_rng(3), 250
    hits = {"mean": 0, "iqm": 0, "percentile": 0}
    for trial in range(trials):
        values = crossed(rng, seeds=seeds, of_seed=of_seed, of_prompt=of_prompt, rest=0.2)
        for name, found in (("mean", mean(values)), ("iqm", iqm(values, resamples=200, seed=trial))):
            assert found.low is not None
            assert found.high is not None
            hits[name] += found.low <= 0 <= found.high
        rows = rng.integers(seeds, size=(200, seeds))
        low, high = np.quantile(values.mean(1)[rows].mean(1), [0.025, 0.975])
        hits["percentile"] += low <= 0 <= high
    assert hits["mean"] / trials > 0.91
    assert hits["iqm"] / trials > 0.90
    if of_seed > of_prompt:
        assert hits["percentile"] / trials < 0.87


def test_iqm_is_scipys_trimmed_mean_and_shrugs_off_an_outlier() -> None:
    values = np.random.default_rng(4).normal(size=(5, 45))
    assert iqm(values).value == pytest.approx(float(stats.trim_mean(values.ravel(), 0.25)))
    before = iqm(values).value
    values[0, 0] = 1e6
    assert iqm(values).value == pytest.approx(before, abs=0.02)
    assert mean(values).value > 1000


def test_equal_numbers_give_an_interval_without_width() -> None:
    for found in (mean(np.full((3, 20), 0.25)), iqm(np.full((3, 20), 0.25))):
        assert (found.value, found.low, found.high) == (0.25, 0.25, 0.25)


def test_improvement_counts_pairs_of_runs() -> None:
    rng = np.random.default_rng(5)
    first, second = rng.integers(0, 4, size=(3, 6)).astype(float), rng.integers(0, 4, size=(4, 6)).astype(float)
    wins = [
        1.0 if a[p] > b[p] else 0.5 if a[p] == b[p] else 0.0
        for a, b in itertools.product(first, second)
        for p in range(6)
    ]
    found, other = improvement(first, second), improvement(second, first)
    assert found.value == pytest.approx(sum(wins) / len(wins))
    assert found.value + other.value == pytest.approx(1)
    # one prompt: the Mann-Whitney statistic over its pairs
    u = stats.mannwhitneyu(first[:, 0], second[:, 0]).statistic / 12
    assert improvement(first[:, :1], second[:, :1]).value == pytest.approx(u)
    better = improvement(first + 10, second)
    assert (better.value, better.low, better.high) == (1, 1, 1)


@pytest.mark.parametrize("values", [np.zeros(3), np.zeros((0, 3)), np.array([[1.0, math.nan]])])
def test_what_is_no_matrix_of_numbers_is_refused(values: Matrix) -> None:
    for function in (mean, iqm):
        with pytest.raises(ValueError, match=r"finite numbers \(seeds, prompts\)"):
            function(values)
    with pytest.raises(ValueError, match="same prompts"):
        improvement(np.zeros((2, 3)), np.zeros((2, 4)))
