"""How much diversity does a better judge cost by itself? The base model, weighted until its judge is as good.

A model that stops drawing the bad ones among the pictures of a prompt loses distance between them. How much of its loss
is that, and how much is collapse? The yardstick is the base model itself, its pictures weighted so that their mean
judge is the aligned model's:

    p_lambda(x | c)  ~  p_base(x | c) exp(lambda J(x, c))

Of all distributions with that mean judge it is the nearest to the base in KL, and what training towards J with a KL
penalty converges to. From N pictures of a prompt, with w_i ~ exp(lambda J_i), sum w = 1:

    judge     sum_i w_i J_i
    distance  sum_{i != j} w_i w_j d_ij / sum_{i != j} w_i w_j        d = 1 - cosine of the features

The distance is that of two independent draws, without the pairs of a picture with itself. lambda is shared by all
prompts; judge and distance are averaged over them and read as gain and share against lambda = 0.

It is no upper bound: a model could keep more than the nearest distribution does, and one that draws a better picture
from every noise, instead of fewer noises, does. Few pictures of a prompt make the share too high, since they weigh
themselves: on the miniature, where 24 say 78 % at a gain of 0.45, 8 say 79 and 4 say 82 (docs/evaluation.md). That is
against the aligned model. From two pictures nothing can be said: their one pair stays whatever it weighs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from tailorpo.statistics import Interval, jackknife_interval

Array = NDArray[np.floating[Any]]

STRENGTHS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
LEAST = 0.25
"""The curve ends where the weights leave a smaller part of the pictures in effect, 1 / sum w^2."""
FEWEST = 4
"""Pictures of a prompt from which a curve can be drawn."""


@dataclass(frozen=True)
class Held:
    """An aligned model beside the weighted base.

    Attributes:
        share: what the weighted base keeps of the base's distance at the aligned model's gain.
        of_it: what the aligned model keeps, as a share of that.
        effective: pictures of a prompt in effect, 1 / sum w^2.
        beyond: whether the gain lies beyond the end of the curve, whose last share then stands, too high.
    """

    share: Interval
    of_it: Interval
    effective: float
    beyond: bool


def distances(features: Tensor) -> Array:
    """(N, D) -> 1 - cosine of every two rows, (N, N)."""
    rows = normalize(features.detach().double().cpu(), dim=-1).numpy()
    return 1.0 - rows @ rows.T


def reweighted(judge: Array, between: Array, strength: float) -> tuple[float, float, float]:
    """Judge, distance and effective number of the pictures of one prompt under the weights of a strength.

    Args:
        judge: (N,).
        between: (N, N), their distances.
        strength: lambda.
    """
    weights = np.exp(strength * (judge - judge.max()))
    weights /= weights.sum()
    pairs = np.outer(weights, weights)
    np.fill_diagonal(pairs, 0.0)
    total = float(pairs.sum())
    # Under a strength that leaves one picture there is no pair, and nothing between them.
    distance = float((pairs * between).sum()) / total if total > 0 else 0.0
    return float(weights @ judge), distance, float(1 / (weights @ weights))


def curve(judge: Array, between: Array, *, spread: float = 1.0) -> Array:
    """(len(STRENGTHS), 3): `reweighted` of one prompt by strength, each in units of 1 / spread."""
    return np.array([reweighted(judge, between, strength / spread) for strength in STRENGTHS])


def frontier(curves: Array) -> tuple[Array, Array, Array]:
    """Gain of the judge, share of the distance, and effective pictures by strength, over the prompts of (P, S, 3)."""
    means = curves.mean(axis=0)
    means = means[means[:, 2] >= LEAST * means[0, 2]]
    return means[:, 0] - means[0, 0], means[:, 1] / means[0, 1], means[:, 2]


def price(curves: Array, gain: float) -> float:
    """The share that the weighted base keeps at a gain; 1 for none, and the last share beyond the end."""
    gains, shares, _ = frontier(curves)
    return float(np.interp(gain, gains, shares))


def held(
    curves: Array, gains: Sequence[float], base: Sequence[float], aligned: Sequence[float], *, confidence: float
) -> Held | None:
    """An aligned model beside the weighted base, with jackknife intervals over prompts; None where the base has no
    distance.

    Args:
        curves: of every prompt, (P, S, 3).
        gains: aligned minus base judge of every prompt.
        base: distance between the base's pictures of every prompt.
        aligned: the same of the aligned model.
        confidence: of the intervals.
    """

    def both(rows: NDArray[np.int64]) -> tuple[float, float] | None:
        below = min(np.asarray(base)[rows].mean(), curves[rows, 0, 1].mean()) if len(rows) else 0.0
        if not below > 0:
            return None
        share = price(curves[rows], float(np.mean(np.asarray(gains)[rows])))
        kept = float(np.mean(np.asarray(aligned)[rows]) / np.mean(np.asarray(base)[rows]))
        return share, kept / share if share > 0 else math.inf

    every = np.arange(len(curves))
    all_of_them = both(every)
    if all_of_them is None:
        return None
    share, of_it = all_of_them
    found = [both(np.delete(every, row)) for row in every]
    # Where one prompt has all of the distance there is no telling how much it matters.
    without = [each for each in found if each is not None] if None not in found else []
    reached, _, effective = frontier(curves)
    gain = float(np.mean(gains))
    return Held(
        share=jackknife_interval(share, [each[0] for each in without], confidence=confidence),
        of_it=jackknife_interval(of_it, [each[1] for each in without], confidence=confidence),
        effective=float(np.interp(gain, reached, effective)),
        beyond=bool(gain > reached[-1]),
    )
