"""Which steps are worth training: `train_steps: {auto: K, measured: FILE}`, from a measurement by `tailorpo jensen`.

What one pair teaches at step k. The siblings are mean + sigma z; let Q(x) = E[r(x_0) | x] be linear over so short a
distance, so that Q_1 - Q_2 = s g . (z_1 - z_2) with a unit vector g. Then V = E(Q_1 - Q_2)^2 / 2 = s^2: the variance of
the true value between siblings. The step reward orders them by another direction g' with g . g' = rho, so it misranks
with probability p = arccos(rho) / pi, and the winner's noise less the loser's is on average

    E[z_w - z_l] = (2 / sqrt(pi)) g',      of which the part along g is (2 / sqrt(pi)) cos(pi p)

(1 - 2 p in place of cos(pi p) would hold for labels that are flipped whatever the gap. Misranked pairs are those with
small gaps: of the share of the gain kept in benchmarks/results/experiments/step-reward.md, twelve rows, cos(pi p) is
off by 0.06 on average and 1 - 2 p by 0.20.)

With w = |d mean / d output| / sigma, a pair moves the network's output at its step by h (z_w - z_l) under
`step_weights: normalised` and by h w (z_w - z_l) under `uniform`, and so the mean of the step by h w^a (z_w - z_l)
sigmas, a = 1 or 2. Summed over the trained steps S, per pair and to first order,

    gain  =  h (2 / sqrt(pi)) sum_S w^a sqrt(V) cos(pi p)
    KL    =  h^2 / 2 sum_S w^2a |z_w - z_l|^2,   |z_w - z_l|^2 = 2 D: nearly all of it noise, the same at all steps

How far the policy moves is up to the learning rate and beta, so steps are compared at equal KL, where h drops out:

    choose S of K steps with the largest   sum_S w^a sqrt(V) cos(pi p)  /  sqrt(sum_S w^2a)

For equal w these are the K steps with the largest sqrt(V) cos(pi p). A step with a large w (5.4 at t = 51 of Stable
Diffusion's 20 steps) has to pay for its KL.

The quotient G / sqrt(C) is quasi-convex, so over the subsets its maximum is at a corner of the hull of their points
(C, G), and every such corner is the best sum of K of G - lambda C for some lambda >= 0. Between two of the lambdas at
which a pair of steps changes places the best K stay the same, so trying one lambda of each interval finds the optimum.

Left out:
- measuring on the way. Sibling gaps are free where steps are trained, but they are gaps of the step reward: on the
  miniature 0.9 to 1.7 times the true ones. Nothing that training sees anyway says how often it misranks, and steps that
  are not trained show nothing at all, so the choice would confirm itself.
- sampling steps in proportion to sqrt(V) (Neyman). That is the least noisy estimate of a SUM over all steps in which
  each drawn step counts 1 / probability; here trained steps count the same, and a hard label is as noisy at every step.
- that a trained step right after another costs one evaluation more under an inline update, and that steps teach one
  another through the parameters they share.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, cast

from tailorpo.errors import UserError
from tailorpo.models.source import assets

BUNDLED = ("emoji_preference",)
"""Measurements that ship with the package: of this reward on the bundled miniature under its recipes' sampler."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """`count` trained steps spread evenly over first..last (0-based, both included)."""

    first: int
    last: int
    count: int


@dataclass(frozen=True, kw_only=True)
class AutoSteps:
    """`auto` trained steps, chosen by what a measurement says of each.

    Attributes:
        auto: how many.
        measured: the file that `tailorpo jensen` wrote for this model, sampler and reward, or one of `BUNDLED`. Its
            `steps` are objects with k, v and misrank, and possibly noise_weight; without the latter every step's KL is
            priced alike. Steps that it does not have are not chosen.
    """

    auto: int
    measured: str

    def __post_init__(self) -> None:
        if self.auto < 1:
            raise ValueError(f"auto must be at least 1, got {self.auto}")

    def missing(self) -> list[str]:
        """What is wrong with the file, one line each."""
        try:
            read_signals(self.measured)
        except UserError as error:
            return [str(error)]
        return []

    def problems(self, steps: int) -> list[str]:
        """What of it cannot work with a sampler of so many steps; nothing where the file cannot be read."""
        if self.missing():
            return []
        signals = read_signals(self.measured)
        beyond = [each.k for each in signals if not 0 <= each.k < steps]
        if beyond:
            return [
                f"algorithm.train_steps.measured: {self.measured} was measured with more steps than the {steps} of"
                f" sampler.steps (it has step {max(beyond)}); measure again with `tailorpo jensen`"
            ]
        useful = sum(each.gain > 0 for each in signals)
        if self.auto > useful:
            return [
                f"algorithm.train_steps.auto is {self.auto}, and {self.measured} has {useful} steps at which the step"
                " reward ranks better than a coin; take fewer, or name the steps"
            ]
        return []

    def choose(self, *, power: int) -> tuple[int, ...]:
        """The chosen steps, ascending.

        Args:
            power: of the noise weight in a step's movement: 1 under normalised step weights, 2 under uniform ones.

        Raises:
            UserError: the file cannot be used.
        """
        signals = read_signals(self.measured)
        moved = [each.noise_weight**power for each in signals]
        gains = [move * each.gain for move, each in zip(moved, signals, strict=True)]
        chosen = best_subset(gains, [move**2 for move in moved], count=self.auto)
        return tuple(sorted(signals[i].k for i in chosen))


@dataclass(frozen=True)
class StepSignal:
    """One step of a measurement.

    Attributes:
        k: the step that draws the siblings.
        v: variance of the true value between siblings; unbiased, so it can be below zero.
        misrank: probability that the step reward orders two siblings otherwise than their values.
        noise_weight: |d mean / d output| / sigma.
    """

    k: int
    v: float
    misrank: float
    noise_weight: float = 1.0

    @property
    def gain(self) -> float:
        """sqrt(V) cos(pi p), not below zero: true reward per sigma along the direction that pairs teach."""
        if self.v <= 0 or self.misrank >= 0.5:
            return 0.0
        return math.sqrt(self.v) * math.cos(math.pi * self.misrank)


def best_subset(gains: Sequence[float], prices: Sequence[float], *, count: int) -> tuple[int, ...]:
    """The `count` indices with the largest sum of gains over the square root of the sum of prices, ascending.

    Args:
        gains: not negative.
        prices: positive.
        count: 1..len(gains).
    """
    turns = {0.0}
    for (gain, price), (other_gain, other_price) in combinations(zip(gains, prices, strict=True), 2):
        if price != other_price:
            turns.add(max((gain - other_gain) / (price - other_price), 0.0))
    ordered = sorted(turns)
    lambdas = [*ordered, *((a + b) / 2 for a, b in pairwise(ordered)), ordered[-1] + 1.0]

    def best(weight: float) -> tuple[int, ...]:
        order = sorted(range(len(gains)), key=lambda i: (weight * prices[i] - gains[i], i))
        return tuple(sorted(order[:count]))

    def worth(chosen: tuple[int, ...]) -> float:
        return sum(gains[i] for i in chosen) / math.sqrt(sum(prices[i] for i in chosen))

    return max(map(best, lambdas), key=worth)


def measurement(name: str) -> Path:
    """The file of a measurement: one of `BUNDLED`, or a path."""
    return assets("jensen") / f"{name}.json" if name in BUNDLED else Path(name).expanduser()


def read_signals(measured: str) -> tuple[StepSignal, ...]:
    """The steps of a measurement whose variance and misranking are known, by their number.

    Raises:
        UserError: there is no such file, or it is none that `tailorpo jensen` wrote.
    """
    path = measurement(measured)
    if not path.is_file():
        raise UserError(
            f"there is no file {measured} (looked from {Path.cwd()}), and the bundled measurement is"
            f" {', '.join(BUNDLED)}; `tailorpo jensen RECIPE` measures and writes one"
        )
    return _read(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _read(path: Path, _changed: int) -> tuple[StepSignal, ...]:
    try:
        content = json.loads(path.read_bytes())
        rows = cast(list[dict[str, Any]], content["steps"])
        known = [row for row in rows if row["v"] is not None and row["misrank"] is not None]
        found = tuple(
            StepSignal(int(row["k"]), float(row["v"]), float(row["misrank"]), float(row.get("noise_weight") or 1.0))
            for row in sorted(known, key=lambda row: row["k"])
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} is no measurement of `tailorpo jensen`: expected JSON with `steps`, a list of objects with k, v"
            f" and misrank ({type(error).__name__}: {error})"
        ) from error
    if not found or len({each.k for each in found}) < len(found):
        raise UserError(f"{path} has {'a step twice' if found else 'no step with v and misrank'}; measure again")
    if not all(0 <= each.misrank <= 1 and each.noise_weight > 0 for each in found):
        raise UserError(f"{path}: misrank must be in 0..1 and noise_weight positive; measure again")
    return found
