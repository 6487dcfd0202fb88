"""Preference losses on the logit of a pair, as pure functions: (B,) in, (B,) out, nothing reduced.

The logit is Delta = log pi(x_w)/pi_ref(x_w) - log pi(x_l)/pi_ref(x_l) in nats of the sum over dimensions.

    hard labels   -log sigmoid(beta Delta)                                                     (TailorPO Eq. 10; DPO)
    soft labels   -p log sigmoid(beta Delta) - (1 - p) log sigmoid(-beta Delta),  p = P(the winner is better)

Hard labels have no fixed point: where rewards separate the candidates, Delta grows for ever and beta sets a speed. With
p = sigmoid(gap / tau) the loss is smallest at beta Delta = gap / tau: the policy tilted by exp(reward / (beta tau)).
Small gaps, whose order is mostly noise, then pull with little weight instead of full weight.

The clamp of the ratios of D3PO's and SPO's code makes the gradient zero outside, in both directions; PPO's clipped
surrogate (Schulman et al. 2017, arXiv 1707.06347) only takes away the reason to move further out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo(logit: Tensor, *, beta: float) -> Tensor:
    """Direct preference optimisation with the winner known: log 2 where the logit is 0."""
    return -logsigmoid(beta * logit)


def soft_dpo(logit: Tensor, *, beta: float, probability: Tensor) -> Tensor:
    """The same where the winner is better with the given probability, (B,); equals `dpo` at probability 1."""
    return -probability * logsigmoid(beta * logit) - (1 - probability) * logsigmoid(-beta * logit)


def disagreement(gaps: Tensor, weights: Tensor) -> Tensor:
    """How far several rewards are from agreeing on a pair, (B,) in 0..1: the part of their gaps' mean square that is
    not the square of their mean,

        1 - m^2 / (m^2 + sd^2),   m = sum v_i g_i,   sd^2 = sum v_i (g_i - m)^2,   v_i = |w_i| / sum |w|

    0 where all see the same gap, 1 where their gaps cancel.

    Args:
        gaps: (M, B), normalised, positive where a reward prefers the first of the pair.
        weights: (M,).
    """
    shares = (weights.abs() / weights.abs().sum()).unsqueeze(1)
    mean = (shares * gaps).sum(0)
    spread = (shares * (gaps - mean).square()).sum(0)
    whole = mean.square() + spread
    return torch.where(whole > 0, spread / whole.clamp(min=torch.finfo(gaps.dtype).tiny), torch.zeros_like(whole))


def clamp_log_ratio(log_ratio: Tensor, *, clip: float) -> Tensor:
    """log of the ratio clamped to 1 - clip .. 1 + clip, without leaving log-space."""
    return log_ratio.clamp(math.log1p(-clip), math.log1p(clip))


def ppo_clip(log_ratio: Tensor, advantage: Tensor, *, clip: float) -> Tensor:
    """max(-A w, -A clamp(w, 1 +- clip)) with w = exp(log_ratio)."""
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
