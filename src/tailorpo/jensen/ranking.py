"""What the pairs of one step say about a step reward m against the truth Q, of which only noisy means are seen.

With d = Q_1 - Q_2 and its measured value D = d + noise, the mean of n differences between continuations that share
their noises, and s^2 the variance of that mean,

    V            = E d^2 / 2, without bias as the mean of (D^2 - s^2) / 2; D^2 - s^2 is the mean product of two
                   different continuations: split halves, averaged over all splits
    correlation  = E m D / sqrt(E m^2 E d^2): of the step reward with the truth, not with its noisy mean. Siblings are
                   interchangeable, so all differences have mean zero
    misrank raw  = share of pairs with sign m != sign D, ties half, with Wilson's interval
    misrank      = arccos(cos(pi raw) / sqrt(c)) / pi: the same without the noise of the truth, where c is the
                   correlation that means of n continuations would have with one another, from the share h of pairs
                   that two halves of the continuations order differently: cos(pi h), and Spearman and Brown's formula
                   from halves to the whole

Signs of two normal numbers with correlation r differ with probability arccos(r) / pi, which is why the correction is
exact for normal differences. It works on signs throughout, because a few pairs with large differences, and large noise,
decide a correlation of values, and a correction by values overshoots.

Noise in the truth pushes the raw share towards one half. The interval of `misrank` reaches from the lower end of the
corrected to the upper end of the raw one (or the other way round above one half), so that it does not rest on the
correction alone: what is called reliable is so without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tailorpo.statistics import Interval, mean_interval, win_rate

Array = NDArray[np.float64]
Rows = NDArray[np.int64]
RESAMPLES = 999
SPLITS = 30
"""Ways of halving the continuations that are averaged."""


@dataclass(frozen=True)
class Pairs:
    """N pairs of siblings of one step under one reward.

    Attributes:
        guess: their step rewards, (N, 2).
        ahead: after the lookahead, (N, 2).
        ends: of their continuations, (N, 2, n); n is 1 where the siblings are finished, and the truth is exact.
    """

    guess: Array
    ahead: Array
    ends: Array

    @property
    def exact(self) -> bool:
        """Whether the truth has no noise."""
        return self.ends.shape[2] == 1

    @property
    def truth(self) -> Array:
        """The mean over continuations, (N, 2)."""
        return self.ends.mean(2)

    @property
    def true_difference(self) -> Array:
        """D, (N,)."""
        return self.truth[:, 0] - self.truth[:, 1]

    @property
    def noise(self) -> Array:
        """s^2, the variance of D given the pair, (N,)."""
        if self.exact:
            return np.zeros(len(self.ends))
        return (self.ends[:, 0] - self.ends[:, 1]).var(1, ddof=1) / self.ends.shape[2]

    @property
    def noise_of_each(self) -> Array:
        """The variance of a sibling's truth, (N, 2)."""
        return np.zeros(self.truth.shape) if self.exact else self.ends.var(2, ddof=1) / self.ends.shape[2]

    @property
    def reliability(self) -> float:
        """What the order by D has to do with that by another D of as many continuations, as a correlation: 1 for an
        exact truth, 0 or less where only noise is seen."""
        if self.exact:
            return 1.0
        differences = self.ends[:, 0] - self.ends[:, 1]
        count = differences.shape[1]
        half = count // 2
        generator = np.random.default_rng(0)
        apart: list[float] = []
        for _ in range(SPLITS):
            order = generator.permutation(count)
            one, two = (differences[:, order[first : first + half]].mean(1) for first in (0, half))
            apart.append(float(np.mean(disagreement(one, two))))
        found = math.cos(math.pi * float(np.mean(apart)))
        times = count / half
        if found <= 0:
            return found
        return times * found / (1 + (times - 1) * found)


def disagreement(one: Array, two: Array) -> Array:
    """1 where the signs differ, 1/2 where either is 0."""
    product = one * two
    return np.where(product < 0, 1.0, np.where(product == 0, 0.5, 0.0))


def signal(pairs: Pairs) -> Interval:
    """V = E (Q_1 - Q_2)^2 / 2 with its interval over states; a measured value may be negative by chance."""
    return mean_interval(list((pairs.true_difference**2 - pairs.noise) / 2), resamples=RESAMPLES)


def correlation(pairs: Pairs, guess: Array) -> Interval | None:
    """Of differences of `guess` (N, 2) with the true ones; None where the truth is all noise or nothing differs."""
    m, d, noise = guess[:, 0] - guess[:, 1], pairs.true_difference, pairs.noise

    def of(rows: Rows) -> Array:
        # (..., N) rows of indices to (...); where a resample has no signal left, nothing is known of it.
        product = (m[rows] ** 2).mean(-1) * (d[rows] ** 2 - noise[rows]).mean(-1)
        with np.errstate(all="ignore"):
            found = np.where(product > 0, (m[rows] * d[rows]).mean(-1) / np.sqrt(product), np.nan)
        return np.clip(found, -1, 1)

    value = float(of(np.arange(len(d))))
    if not math.isfinite(value):
        return None
    low, high = _percentiles(of, len(d))
    return Interval(value, low, high)


def raw_misranking(pairs: Pairs, guess: Array) -> Interval:
    """Share of pairs that `guess` orders otherwise than the measured truth; ties count half."""
    return win_rate(list(-(guess[:, 0] - guess[:, 1]) * pairs.true_difference))


def misranking(pairs: Pairs, guess: Array) -> Interval:
    """The same without the noise of the truth; where that is all there is, the raw share and an interval of 0 to 1."""
    raw, reliability = raw_misranking(pairs, guess), pairs.reliability
    low, high = raw.low or 0.0, 1.0 if raw.high is None else raw.high
    if reliability <= 0:
        return Interval(raw.value, 0.0, 1.0)
    corrected = [_without_noise(share, reliability) for share in (raw.value, low, high)]
    return Interval(corrected[0], min(low, corrected[1]), max(high, corrected[2]))


def share_of(correlated: float) -> float:
    """The misranking that a correlation means for normal differences, arccos(r) / pi."""
    return math.acos(max(-1.0, min(1.0, correlated))) / math.pi


def correlation_of_continuations(pairs: Pairs, count: int) -> float | None:
    """Of the mean of `count` fresh continuations with the truth, from the same variances; None where all is noise."""
    true = float((pairs.true_difference**2 - pairs.noise).mean())
    if true <= 0:
        return None
    one = float(pairs.noise.mean()) * pairs.ends.shape[2]
    return math.sqrt(true / (true + one / count))


@dataclass(frozen=True)
class Gap:
    """The Jensen gap Q - r(x0hat), in the reward's unit and without the noise of the truth.

    Attributes:
        mean: over siblings, with its interval over states.
        rms: root mean square over siblings.
        difference: root mean square of G_1 - G_2.
        signal: root mean square of Q_1 - Q_2.
        spread: standard deviation of the final reward given a sibling.
    """

    mean: Interval
    rms: float
    difference: float
    signal: float
    spread: float


def gap(pairs: Pairs) -> Gap:
    """Of the step rewards."""
    gaps = pairs.truth - pairs.guess
    difference = gaps[:, 0] - gaps[:, 1]
    return Gap(
        mean=mean_interval(list(gaps.mean(1)), resamples=RESAMPLES),
        rms=_root(float((gaps**2 - pairs.noise_of_each).mean())),
        difference=_root(float((difference**2 - pairs.noise).mean())),
        signal=_root(float((pairs.true_difference**2 - pairs.noise).mean())),
        spread=0.0 if pairs.exact else math.sqrt(float(pairs.ends.var(2, ddof=1).mean())),
    )


def _without_noise(share: float, reliability: float) -> float:
    return share_of(math.cos(math.pi * share) / math.sqrt(reliability))


def _root(value: float) -> float:
    return math.sqrt(max(value, 0.0))


def _percentiles(statistic: Callable[[Rows], Array], count: int) -> tuple[float | None, float | None]:
    """95 % by resampling states."""
    rows = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    values = statistic(rows)
    values = values[np.isfinite(values)]
    # Resamples without any signal could be anything: with many of them there is no interval.
    if len(values) < 0.9 * RESAMPLES:
        return None, None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
