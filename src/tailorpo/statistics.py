"""The statistics of an evaluation: intervals of paired differences and ratios, win rates, diversity.

    interval of a mean       BCa bootstrap over prompts (Efron 1987), seeded
    interval of a win rate   Wilson (1927); a tie counts half a win
    diversity                mean pairwise cosine distance; Vendi score (Friedman and Dieng 2023, arXiv 2210.02410)

The unit is the prompt: pictures of one prompt are alike, and counting them as independent would make intervals too
narrow. With few prompts (below about ten) a bootstrap interval is somewhat too narrow all the same; the number of
prompts is therefore reported next to it. Left out: tests of significance (an interval says more).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor
from torch.nn.functional import normalize

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval; the ends are None where the data give none (fewer than 2 prompts)."""

    value: float
    low: float | None
    high: float | None


def mean_interval(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = 9999, seed: int = 0
) -> Interval:
    """The mean of one value per prompt with its BCa bootstrap interval; equal values give an interval of no width.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    data = _vector(values)

    def mean(sample: Vector, axis: int = -1) -> Any:
        return sample.mean(axis=axis)

    return _bootstrap((data,), mean, confidence=confidence, resamples=resamples, seed=seed)


def ratio_interval(
    base: Sequence[float], aligned: Sequence[float], *, confidence: float = 0.95, resamples: int = 9999, seed: int = 0
) -> Interval | None:
    """mean(aligned) / mean(base) with its interval, prompts resampled in pairs; None where mean(base) is not positive.

    Raises:
        ValueError: no values, different lengths, or a value that is not finite.
    """
    below, above = _vector(base), _vector(aligned)
    if len(below) != len(above):
        raise ValueError(f"pairs need equal lengths, got {len(below)} and {len(above)}")
    if not below.mean() > 0:
        return None

    def ratio(first: Vector, second: Vector, axis: int = -1) -> Any:
        return second.mean(axis=axis) / first.mean(axis=axis)

    return _bootstrap((below, above), ratio, confidence=confidence, resamples=resamples, seed=seed)


def _bootstrap(
    data: tuple[Vector, ...], statistic: Callable[..., Any], *, confidence: float, resamples: int, seed: int
) -> Interval:
    value = float(statistic(*data))
    if len(data[0]) < 2:
        return Interval(value, None, None)
    if all(bool(np.all(column == column[0])) for column in data):
        return Interval(value, value, value)
    ends: tuple[float, float] = (math.nan, math.nan)
    # BCa has no answer where every leave-one-out value is the same (constant proportion): then plain percentiles.
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            result: Any = stats.bootstrap(
                data,
                statistic,
                paired=len(data) > 1,
                vectorized=True,
                method=method,
                confidence_level=confidence,
                n_resamples=resamples,
                rng=np.random.default_rng(seed),
            )
        ends = (float(result.confidence_interval.low), float(result.confidence_interval.high))
        if all(math.isfinite(end) for end in ends):
            return Interval(value, *ends)
    return Interval(value, None, None)


def _vector(values: Sequence[float]) -> Vector:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or len(data) == 0 or not np.isfinite(data).all():
        raise ValueError(f"expected at least one finite number per prompt, got {values!r:.200}")
    return data


def win_rate(differences: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """The share of positive differences, ties counting half, with its Wilson score interval.

    Raises:
        ValueError: no differences.
    """
    if not differences:
        raise ValueError("a win rate needs at least one difference")
    n = len(differences)
    wins = sum(1.0 if difference > 0 else 0.5 if difference == 0 else 0.0 for difference in differences)
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    p = wins / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half))


def pairwise_distance(features: Tensor) -> float:
    """Mean of 1 - cosine over all pairs of rows of (n, d); NaN for n < 2."""
    n = len(features)
    if n < 2:
        return math.nan
    rows = normalize(features.detach().double().cpu(), dim=-1)
    # the sum over pairs i < j of <a_i, a_j> is half of |sum a|^2 minus the n squared lengths
    cosine = (float(rows.sum(0).square().sum()) - float(rows.square().sum())) / (n * (n - 1))
    return max(0.0, 1.0 - cosine)


def vendi_score(features: Tensor) -> float:
    """Effective number of different rows of (n, d): exp of the entropy of the eigenvalues of the cosine kernel / n.

    1 for n equal rows, n for n orthogonal ones. It grows with n: compare at equal n only. NaN for n < 1.
    """
    n = len(features)
    if n < 1:
        return math.nan
    rows = normalize(features.detach().double().cpu(), dim=-1).numpy()
    eigenvalues = np.linalg.eigvalsh(rows @ rows.T / n)
    positive = eigenvalues[eigenvalues > 1e-12]
    return float(np.exp(-np.sum(positive * np.log(positive))))
