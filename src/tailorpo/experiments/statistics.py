"""Statistics of a grid: one number per training seed and prompt, and what they say about a method.

The data of a method is a matrix (S, P): S training seeds, each evaluated on the same P prompts; a number is already a
mean over the pictures of the prompt. Both seeds and prompts are samples, so an interval has to cover another seed AND
another prompt. Few seeds (3 to 5) are the hard part: a percentile bootstrap over 3 seeds covers far too little, since
it cannot know that it has seen so few.

    mean        t interval of the crossed random-effects analysis of variance: Var = (MS_s + MS_p - MS_e) / (S P), its
                degrees of freedom by Satterthwaite 1946
    iqm         interquartile mean (Agarwal et al. 2021, arXiv 2108.13264) of the S P numbers; bootstrap in which
                seeds and prompts are drawn anew independently (pigeonhole bootstrap, Owen 2007), its deviations
                stretched by what the same bootstrap of the MEAN lacks against the t interval
    improvement P(X > Y): over pairs of seeds of X and Y, for the same prompt, averaged over prompts; ties count half;
                percentile bootstrap of both sets of seeds and of the prompts

With one seed there is no telling what another would give; then an interval covers prompts only, and says so (`seeds`).

Left out: rliable. It computes the interquartile mean and its bootstrap over runs of tasks, but nothing over prompts,
and it needs arch, statsmodels, pandas and seaborn (docs/decisions/0003-statistics-of-experiments.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tailorpo.statistics import Interval

Matrix = NDArray[np.float64]

RESAMPLES = 4000


@dataclass(frozen=True)
class Estimate(Interval):
    """An estimate with its 95 % interval and the number of training seeds behind it."""

    seeds: int


def mean(values: Matrix, *, confidence: float = 0.95) -> Estimate:
    """The mean of (S, P) with its interval over seeds and prompts.

    Raises:
        ValueError: not a matrix of finite numbers.
    """
    _check(values)
    value, error, degrees = _crossed(values)
    if math.isnan(error):
        return Estimate(value, None, None, len(values))
    half = _t(confidence, degrees) * error
    return Estimate(value, value - half, value + half, len(values))


def iqm(values: Matrix, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """The interquartile mean of (S, P) with its interval over seeds and prompts.

    Raises:
        ValueError: not a matrix of finite numbers.
    """
    _check(values)
    value = float(_interquartile(values.ravel()))
    if values.shape[1] < 2:
        return Estimate(value, None, None, len(values))
    rng = np.random.default_rng(seed)
    rows, columns = (rng.integers(n, size=(resamples, n)) for n in values.shape)
    drawn = values[rows[:, :, None], columns[:, None, :]].reshape(resamples, -1)
    low, high = np.quantile(_interquartile(drawn), _ends(confidence))
    _, error, degrees = _crossed(values)
    spread = float(drawn.mean(axis=1).std())
    wanted = _t(confidence, degrees) * error
    stretch = max(1.0, wanted / (_t(confidence, math.inf) * spread)) if spread > 0 else 1.0
    return Estimate(value, value - stretch * (value - float(low)), value + stretch * (float(high) - value), len(values))


def improvement(
    first: Matrix, second: Matrix, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """The probability that a run of the first method beats one of the second on a prompt, (S1, P) against (S2, P).

    Raises:
        ValueError: different prompts, or not matrices of finite numbers.
    """
    for values in (first, second):
        _check(values)
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"both need the same prompts, got {first.shape[1]} and {second.shape[1]}")
    wins = (np.sign(first[:, None] - second[None]) + 1) / 2  # (S1, S2, P)
    value = float(wins.mean())
    rng = np.random.default_rng(seed)
    ours, theirs, prompts = (rng.integers(n, size=(resamples, n)) for n in wins.shape)
    drawn = wins[ours[:, :, None, None], theirs[:, None, :, None], prompts[:, None, None, :]].mean(axis=(1, 2, 3))
    low, high = np.quantile(drawn, _ends(confidence))
    return Estimate(value, float(low), float(high), min(len(first), len(second)))


def _check(values: Matrix) -> None:
    if values.ndim != 2 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"expected finite numbers (seeds, prompts), got {values.shape}: {values!r:.200}")


def _interquartile(values: Matrix) -> Matrix:
    """Mean of the last axis without its lowest and highest quarter (rounded down, as scipy's trim_mean does)."""
    count = values.shape[-1]
    return np.sort(values, axis=-1)[..., count // 4 : count - count // 4].mean(axis=-1)


def _ends(confidence: float) -> tuple[float, float]:
    return 0.5 - confidence / 2, 0.5 + confidence / 2


def _t(confidence: float, degrees: float) -> float:
    """Student's quantile; the normal one for infinitely many degrees of freedom."""
    return float(stats.t.ppf(0.5 + confidence / 2, degrees))


def _crossed(values: Matrix) -> tuple[float, float, float]:
    """Mean, its standard error and degrees of freedom, of a crossed design without repeats."""
    rows, columns = values.shape
    value = float(values.mean())
    if columns < 2:
        return value, math.nan, math.nan
    by_prompt = values.mean(0)
    if rows < 2:  # one seed: prompts alone
        return value, float(by_prompt.std(ddof=1)) / math.sqrt(columns), columns - 1.0
    by_seed = values.mean(1)
    seeds, prompts = columns * float(by_seed.var(ddof=1)), rows * float(by_prompt.var(ddof=1))
    rest = values - by_seed[:, None] - by_prompt[None] + value
    free = (rows - 1.0, columns - 1.0, (rows - 1.0) * (columns - 1.0))
    errors = float((rest**2).sum()) / free[2]
    # By chance the difference can come out too small; it is no less than what either sample alone implies.
    total = max(seeds + prompts - errors, seeds, prompts)
    squares = sum(each**2 / degrees for each, degrees in zip((seeds, prompts, errors), free, strict=True))
    degrees = max(1.0, total**2 / squares) if squares > 0 else 1.0
    return value, math.sqrt(total / (rows * columns)), degrees
