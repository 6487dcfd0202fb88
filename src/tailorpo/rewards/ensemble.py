"""Ensembles of rewards: what several rewards that disagree say about two pictures of one prompt.

Member i, of weight w_i, sees a gap g_i = sign(w_i) (s_i(x) - s_i(y)) / scale_i between two siblings, candidates that
are compared because they come from one x_k. A rule makes of all gaps one preference G for x over y: its sign orders the
pair, 0 is an abstention, and G(y, x) = -G(x, y). With v_i = |w_i| / sum |w|, m = sum v_i g_i and M members:

    mean          G = m
    worst_case    G = (M min_i v_i g_i + M max_i v_i g_i) / 2
    uncertainty   G = sign(m) max(0, |m| - penalty sd),   sd^2 = sum v_i (g_i - m)^2
    majority      G = sum v_i sign(g_i)
    pareto        G = m where the sign of m is never opposed: no gap is beyond the tolerance the other way and one is
                  beyond it this way; else 0
    soft_vote     G = log(p / (1 - p)),   p = sum v_i sigmoid(g_i / temperature)

worst_case: with each score counted from the siblings' mean, z_i = +- g_i / 2, a candidate is worth its worst member,
min_i M v_i z_i, and G is the difference of the two worths. It is minimax regret: the one member with the largest gap
decides. Of two members of one weight it is the mean.

scale_i is the running root mean square of the member's own gaps at the same denoising step (`GapScales`), never the
spread of its scores: those differ by prompt, which no pair compares (theory: z-scores of pair gaps).

Sources: worst case and mean minus uncertainty, Coste et al. 2023 (arXiv 2310.02743), there of the scores of single
answers; majority, BalancedDPO (arXiv 2503.12575); Pareto dominance, D3PO's official code.

Left out: the literal minimum over the gaps of a pair, which is positive in one order only where all members agree, and
so is `pareto`; averaging weights of reward models (WARM), which needs one architecture; weights that are learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Squares = dict[str, list[float]]
Rule = Literal["mean", "worst_case", "uncertainty", "majority", "pareto", "soft_vote"]


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """The `ensemble` section of a run file.

    Attributes:
        rule: how the members' gaps become one preference.
        normalise: "pair_gaps" divides each member's gaps by their running scale at the step, so that its unit and its
            spread do not matter and `weight` is importance; "none" takes them as they are.
        decay: of the running mean of squared gaps, per update that has some; corrected for its start at zero.
        penalty: standard deviations that the mean has to exceed, for `uncertainty`.
        tolerance: a gap up to this counts as no opinion, for `pareto`; in units of the normalised gap.
        temperature: the gap that is a preference of odds e, for `soft_vote`; in units of the normalised gap.
    """

    rule: Rule = "mean"
    normalise: Literal["pair_gaps", "none"] = "pair_gaps"
    decay: float = 0.99
    penalty: float = 1.0
    tolerance: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {self.decay}")
        if not self.penalty >= 0 or not self.tolerance >= 0:
            raise ValueError(f"penalty and tolerance must not be negative, got {self.penalty} and {self.tolerance}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        for name, owner, default in (
            ("penalty", "uncertainty", 1.0),
            ("tolerance", "pareto", 0.0),
            ("temperature", "soft_vote", 1.0),
        ):
            if self.rule != owner and getattr(self, name) != default:
                raise ValueError(f"{name} has no effect under rule {self.rule}; leave it out or take rule {owner}")

    @property
    def differentiable(self) -> bool:
        """Whether the preference has a gradient; a count of votes has none."""
        return self.rule != "majority"

    def preference(self, gaps: Tensor, weights: Tensor) -> Tensor:
        """The rule: normalised gaps (M, ...) of members with weights (M,), whose sign is in the gaps -> G, (...)."""
        shares = (weights.abs() / weights.abs().sum()).view(-1, *[1] * (gaps.ndim - 1))
        if self.rule == "mean":
            return (shares * gaps).sum(0)
        if self.rule == "worst_case":
            loads = len(gaps) * shares * gaps
            return (loads.amin(0) + loads.amax(0)) / 2
        if self.rule == "uncertainty":
            return _certain(gaps, shares, self.penalty)
        if self.rule == "majority":
            return _votes(gaps, shares)
        if self.rule == "pareto":
            return _unopposed(gaps, shares, self.tolerance)
        return _log_odds(gaps / self.temperature, shares)


def _certain(gaps: Tensor, shares: Tensor, penalty: float) -> Tensor:
    mean = (shares * gaps).sum(0)
    variance = (shares * (gaps - mean).square()).sum(0)
    # The root's infinite slope at zero would make the gradient of members that agree NaN.
    deviation = variance.clamp(min=torch.finfo(variance.dtype).tiny).sqrt()
    return mean.sign() * (mean.abs() - penalty * deviation).clamp(min=0)


def _votes(gaps: Tensor, shares: Tensor) -> Tensor:
    balance = (shares * gaps.sign()).sum(0)
    # Shares such as a third do not add up to zero exactly.
    return torch.where(balance.abs() < 1e-6, torch.zeros_like(balance), balance)


def _unopposed(gaps: Tensor, shares: Tensor, tolerance: float) -> Tensor:
    mean = (shares * gaps).sum(0)
    along = gaps * mean.detach().sign()
    ordered = (along >= -tolerance).all(0) & (along > tolerance).any(0)
    return torch.where(ordered, mean, torch.zeros_like(mean))


def _log_odds(gaps: Tensor, shares: Tensor) -> Tensor:
    # In log-space: far from zero p and 1 - p are 1 and 0 in float32, and their odds are lost.
    yes = (shares.log() + logsigmoid(gaps)).logsumexp(0)
    no = (shares.log() + logsigmoid(-gaps)).logsumexp(0)
    return yes - no


def sibling_gaps(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Every sibling's score minus every other's, which is held constant.

    Args:
        scores: (M, n, B), NaN where a candidate has none.

    Returns:
        Gaps (M, n, n, B), [:, j, i] is of j over i; which of them are there, (n, n, B). Where they are not, for want of
        a score or because j is i, the gap is a constant 0.
    """
    valid = scores.detach().isfinite().all(0)
    others = ~torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device).unsqueeze(2)
    both = valid.unsqueeze(1) & valid.unsqueeze(0) & others
    gaps = scores.unsqueeze(2) - scores.detach().unsqueeze(1)
    return torch.where(both, gaps, torch.zeros_like(gaps)), both


def own_scale(gaps: Tensor, both: Tensor) -> Tensor:
    """Root mean square of each member's gaps among a trajectory's own siblings: (M, n, n, B), (n, n, B) -> (M, B)."""
    return (gaps.detach().square().sum((1, 2)) / both.sum((0, 1)).clamp(min=1)).sqrt()


class GapScales:
    """The running scale of every member's gaps at every step.

    Within an update the scales stand still; `settle` takes in what was gathered. They therefore depend on the updates
    before and on nothing else: not on `batch.micro`, nor on which of several processes saw which trajectory, for the
    sum of squares is exact and has no order.
    """

    def __init__(self, decay: float, running: dict[str, list[float]] | None = None) -> None:
        self.decay = decay
        self.running: dict[str, list[float]] = {} if running is None else running
        """By "step member": running mean of squared gaps and running weight, both started at zero; what is saved."""
        self._gathered: Squares = {}

    def get(self, step: str, member: str) -> float | None:
        """The scale, or None while there is none: before the step's first update, or where all gaps were zero."""
        mean, weight = self.running.get(f"{step} {member}", (0.0, 0.0))
        return math.sqrt(mean / weight) if mean > 0 else None

    def gather(self, step: str, member: str, squares: Tensor) -> None:
        """Take note of squared gaps, (N,)."""
        self._gathered.setdefault(f"{step} {member}", []).extend(map(float, squares.double()))

    def settle(self, gather: Callable[[Squares], list[Squares]]) -> None:
        """Take in what was gathered since the last time; without anything, nothing changes.

        Args:
            gather: returns what every process that shares the update passes to it, this one's among them.
        """
        joined: Squares = {}
        for part in gather(self._gathered):
            for key, squares in part.items():
                joined.setdefault(key, []).extend(squares)
        for key, squares in joined.items():
            mean, weight = self.running.get(key, (0.0, 0.0))
            latest = math.fsum(squares) / len(squares)
            self.running[key] = [
                self.decay * mean + (1 - self.decay) * latest,
                self.decay * weight + (1 - self.decay),
            ]
        self._gathered.clear()
