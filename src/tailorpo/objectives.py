"""Preference losses on the logit of a pair or the scores of k candidates, as pure functions: (B,) out, nothing reduced.

The logit is Delta = log pi(x_w)/pi_ref(x_w) - log pi(x_l)/pi_ref(x_l) in nats of the sum over dimensions.

    hard labels     -log sigmoid(beta Delta)                                                     (TailorPO Eq. 10; DPO)
    soft labels     -p log sigmoid(beta Delta) - (1 - p) log sigmoid(-beta Delta),  p = P(the winner is better)
    IPO             p (Delta - 1/(2 beta))^2 + (1 - p) (Delta + 1/(2 beta))^2     (Azar et al. 2023, arXiv 2310.12036)
    Plackett-Luce   -sum_j sum_{i >= j} q_ji log softmax_{i >= j}(beta s)_i

In the last, candidates stand in the order of their rewards, s_i is the log-ratio of candidate i up to a constant that
all share, and stage j chooses among those that are left, with targets q_j. One-hot targets give the negative log of the
Plackett-Luce probability of the order (Diffusion-LPO, arXiv 2510.01540, for pairs of k = 2 Eq. 10); q_ji ~ exp(r_i /
tau) is the cross-entropy to the same model with the rewards for scores.

Hard labels have no fixed point: where rewards separate the candidates, Delta grows for ever and beta sets a speed. In
the locally linear model, with u = (mean - mean_ref) / sigma and s the time of the expected gradient flow of u, |u|
tends to (1.39 s / beta)^(1/3). With p = sigmoid(gap / tau) the loss is smallest at beta Delta = gap / tau: the policy
tilted by exp(reward / (beta tau)), for any k. IPO with hard labels of pairs comes to rest at |u| = 1 / (2 beta
sqrt(pi)), whatever the unit of the reward: KL = 1 / (8 pi beta^2) a step. Under soft labels small gaps, whose order is
mostly noise, pull with little weight instead of full weight.

The clamp of the ratios of D3PO's and SPO's code makes the gradient zero outside, in both directions; PPO's clipped
surrogate (Schulman et al. 2017, arXiv 1707.06347) only takes away the reason to move further out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid


def dpo(logit: Tensor, *, beta: float) -> Tensor:
    """Direct preference optimisation with the winner known: log 2 where the logit is 0."""
    return -logsigmoid(beta * logit)


def soft_dpo(logit: Tensor, *, beta: float, probability: Tensor) -> Tensor:
    """The same where the winner is better with the given probability, (B,); equals `dpo` at probability 1."""
    return -probability * logsigmoid(beta * logit) - (1 - probability) * logsigmoid(-beta * logit)


def ipo(logit: Tensor, *, beta: float, probability: Tensor) -> Tensor:
    """Identity preference optimisation: the squared distance of the logit to +-1/(2 beta), where the winner is better
    with the given probability, (B,)."""
    margin = 1 / (2 * beta)
    return probability * (logit - margin) ** 2 + (1 - probability) * (logit + margin) ** 2


def plackett_luce(scores: Tensor, *, beta: float, targets: Tensor) -> Tensor:
    """The listwise loss of k candidates.

    Args:
        scores: (B, k) in nats, in the order of the rewards, best first; a constant added to a row changes nothing.
        beta: as of a pair: for k = 2 this is `dpo` or `soft_dpo` of the difference.
        targets: (B, k - 1, k), what stage j = 0..k-2 should choose among candidates j..k-1; sums to 1 over them.
    """
    left = torch.ones_like(targets, dtype=torch.bool).triu()
    stages = (beta * scores).unsqueeze(1).expand_as(targets).masked_fill(~left, -torch.inf)
    shares = log_softmax(stages, dim=2).masked_fill(~left, 0.0)
    return -(targets * shares).sum(dim=(1, 2))


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
