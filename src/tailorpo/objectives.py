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


def clamp_log_ratio(log_ratio: Tensor, *, clip: float) -> Tensor:
    """log of the ratio clamped to 1 - clip .. 1 + clip, without leaving log-space."""
    return log_ratio.clamp(math.log1p(-clip), math.log1p(clip))


def ppo_clip(log_ratio: Tensor, advantage: Tensor, *, clip: float) -> Tensor:
    """max(-A w, -A clamp(w, 1 +- clip)) with w = exp(log_ratio)."""
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
