"""The G of TailorPO-G: the winner of a pair is moved along the gradient of its step reward before the loss sees it.

Two forms of the push at step k, g = d r_t / d x at the winner, sigma the std of the step:

    target   x+ = x - eta_t d/dx (r_high - r_t)^2 = x + 2 eta_t (r_high - r_t) g      (TailorPO Eq. 14)
             with r_high = r_t + delta, or a constant target; then it is never negative, since Eq. 14 as written would
             push the reward DOWN where it is above the target. eta_t is constant or the paper's cosine on [0.1, 0.2].
    sigma    x+ = x + k sigma g / |g|

The first depends on the units of the reward: with delta = 0.5 it moves a miniature's latent by a hundredth of sigma.
The second says how unlikely the winner becomes under its own policy and nothing else. `trust_region` bounds |x+ - x|
by that many sigma in the first form; in the second, k is that bound itself.

What the second form does to the loss, with u = (mean - mean_ref) / sigma and the noises z that made the candidates:

    Delta+ = (z_w - z_l) . u + k g . u / |g|

Where the reward is locally linear, (z_w - z_l) . g / |g| is |N(0, 2)| with mean 2 / sqrt(pi) = 1.128, so a push of k
makes the useful part of a pair 1 + k sqrt(pi) / 2 = 1 + 0.886 k times as large and leaves its noise as it is. Three
settings follow from that:

    symmetric       winner by +k / 2, loser by -k / 2, both along g = g_w + g_l: the same Delta+ for any given g, but
                    the pair's mean stays where the policy put it, and the walk goes on from a winner moved half as far
    corrected_beta  beta' = beta / (1 + 0.886 k): the mean of beta' Delta+ is what that of beta Delta was, so the pull
                    at the reference is the same, and a gradient flow needs the same time to come to any |u| up to
                    3 / beta within a quarter, for every k. Beyond, no scale can do it: a plain loss keeps on pulling as
                    0.46 / (beta |u|^2), by pairs whose order is nearly even, of which a push leaves none
    shell           z+ <- z+ |z| / |z+|: the noise keeps the length that it was drawn with, after DSG (Yang et al. 2024,
                    arXiv 2402.03201). It shrinks z+ by about k^2 / (2 D), so it matters where D is small

`anneal` takes k to another value over the updates.

With `accept_reject` x+ is scored too, and where its step reward is not higher the winner stays where it was; the
evaluation of x+ is the next step's, so only a decode and a reward query are added.

Guo et al. 2024 (arXiv 2404.14743) is the source of Eq. 14's form. Left out: a direction for each of a symmetric pair
(it moves the pair's mean, by k / 4 of their difference); k = sigma |g| / beta, the size that the tilt by
exp(reward / beta) asks for, which brings back the reward's units; a trust region beside k, which is one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Jacobian = Literal["full", "free"]


@dataclass(frozen=True, kw_only=True)
class Anneal:
    """A straight line from k at the first update to another value.

    Attributes:
        to: k from update `over` on, in units of sigma_t, positive.
        over: after how many updates, at least 1.
    """

    to: float
    over: int

    def __post_init__(self) -> None:
        if not (self.to > 0 and math.isfinite(self.to)):
            raise ValueError(f"anneal.to must be a positive number, got {self.to}; for no guidance at all use null")
        if self.over < 1:
            raise ValueError(f"anneal.over is a number of updates and must be at least 1, got {self.over}")

    def at(self, update: int, *, start: float) -> float:
        """k at an update, 0-based."""
        return start + (self.to - start) * min(update / self.over, 1.0)


@dataclass(frozen=True, kw_only=True)
class SigmaGuidance:
    """A push of k standard deviations of the step.

    Attributes:
        k: how far winner and loser are moved apart in units of sigma_t, positive; 0.5 to 2 is usual.
        symmetric: the winner moves up by half of it and the loser down by half; otherwise the winner moves alone.
        shell: scale the moved noises back to the length that they were drawn with.
        corrected_beta: divide the algorithm's beta by 1 + 0.886 k; for hard labels.
        anneal: {to, over}: where k goes over the updates; null: it stays.
        accept_reject: keep the push only where the winner's step reward rises.
        jacobian: "full" gradient through the network, or "free" of its Jacobian.
    """

    form: Literal["sigma"] = "sigma"
    k: float = 1.0
    symmetric: bool = False
    shell: bool = False
    corrected_beta: bool = False
    anneal: Anneal | None = None
    accept_reject: bool = False
    jacobian: Jacobian = "full"

    def __post_init__(self) -> None:
        if not self.k > 0:
            raise ValueError(f"guidance k must be positive, got {self.k}")

    @property
    def gain(self) -> float:
        """By what a push multiplies the useful part of a pair: 1 + k sqrt(pi) / 2; its square is how many plain pairs
        one pair is worth."""
        return 1 + self.k * math.sqrt(math.pi) / 2

    def at(self, update: int) -> SigmaGuidance:
        """The same with the k of an update, 0-based."""
        return self if self.anneal is None else replace(self, k=self.anneal.at(update, start=self.k), anneal=None)

    def push(self, gradient: Tensor, reward: Tensor, *, std: float, progress: float) -> Tensor:
        """x+ - x, of the gradient's shape; zero where the gradient is zero or not finite."""
        del reward, progress  # this form depends on neither
        unit, _ = _unit(gradient)
        return self.k * std * unit


@dataclass(frozen=True, kw_only=True)
class TargetGuidance:
    """Eq. 14 as in the paper.

    Attributes:
        eta: eta_t, a constant or "cosine": from 0.1 at the first step to 0.2 at the last.
        delta: r_high = current reward + delta.
        target: r_high as a constant; exactly one of delta and target is given.
        trust_region: largest |x+ - x| in units of sigma_t; null for none.
        accept_reject: keep the push only where the step reward rises.
        jacobian: "full" gradient through the network, or "free" of its Jacobian.
    """

    form: Literal["target"] = "target"
    eta: float | Literal["cosine"] = "cosine"
    delta: float | None = None
    target: float | None = None
    trust_region: float | None = None
    accept_reject: bool = False
    jacobian: Jacobian = "full"

    def __post_init__(self) -> None:
        if (self.delta is None) == (self.target is None):
            raise ValueError(f"give either delta or target, got delta {self.delta} and target {self.target}")
        if self.delta is not None and not self.delta > 0:
            raise ValueError(f"delta must be positive, got {self.delta}")
        if self.eta != "cosine" and not self.eta > 0:
            raise ValueError(f"eta must be positive or cosine, got {self.eta}")
        if self.trust_region is not None and not self.trust_region > 0:
            raise ValueError(f"trust_region must be positive, got {self.trust_region}")

    def eta_at(self, progress: float) -> float:
        """eta_t, where progress is k / K: 0 at the noisiest step, towards 1 at the last."""
        return 0.1 + 0.1 * (1 - math.cos(math.pi * progress)) / 2 if self.eta == "cosine" else self.eta

    def push(self, gradient: Tensor, reward: Tensor, *, std: float, progress: float) -> Tensor:
        """x+ - x, of the gradient's shape; zero where the gradient is not finite."""
        unit, norm = _unit(gradient)
        missing = torch.full_like(reward, self.delta) if self.delta is not None else (self.target or 0.0) - reward
        size = 2 * self.eta_at(progress) * missing.clamp(min=0) * norm
        if self.trust_region is not None:
            size = size.clamp(max=self.trust_region * std)
        return size.nan_to_num().view(-1, 1, 1, 1) * unit


Guidance = SigmaGuidance | TargetGuidance


def on_shell(push: Tensor, noise: Tensor, *, std: float) -> Tensor:
    """The push that ends where `push` does, scaled to the noise's length; all (B, C, h, w).

    No longer than `push` where that makes the noise longer, and at most by 1 / cos of half the turned angle else.
    """
    moved = noise + push / std
    scale = length(noise) / length(moved).clamp(min=torch.finfo(moved.dtype).tiny)
    return std * (scale.view(-1, 1, 1, 1) * moved - noise)


def length(x: Tensor) -> Tensor:
    """Euclidean length of each row: (B, ...) -> (B,)."""
    return x.flatten(1).square().sum(dim=1).sqrt()


def _unit(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The direction of each row (zero where it has none) and its length (B,)."""
    finite = gradient.flatten(1).isfinite().all(dim=1).view(-1, 1, 1, 1)
    safe = torch.where(finite, gradient, torch.zeros_like(gradient))
    norm = length(safe)
    return safe / norm.clamp(min=torch.finfo(norm.dtype).tiny).view(-1, 1, 1, 1), norm
