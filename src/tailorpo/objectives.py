"""Preference losses on the logit of a pair, as pure functions: (B,) in, (B,) out, nothing reduced.

The logit is Delta = log pi(x_w)/pi_ref(x_w) - log pi(x_l)/pi_ref(x_l) in nats of the sum over dimensions.

    hard labels   -log sigmoid(beta Delta)                                                     (TailorPO Eq. 10; DPO)
    soft labels   -p log sigmoid(beta Delta) - (1 - p) log sigmoid(-beta Delta),  p = P(the winner is better)

Hard labels have no fixed point: where rewards separate the candidates, Delta grows for ever and beta sets a speed. With
p = sigmoid(gap / tau) the loss is smallest at beta Delta = gap / tau: the policy tilted by exp(reward / (beta tau)).
Small gaps, whose order is mostly noise, then pull with little weight instead of full weight.

Left out: the clamp of the ratios to [0.9, 1.1] of D3PO's and SPO's code, which makes the sigmoid linear and the
gradient zero outside.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo(logit: Tensor, *, beta: float) -> Tensor:
    """Direct preference optimisation with the winner known: log 2 where the logit is 0."""
    return -logsigmoid(beta * logit)


def soft_dpo(logit: Tensor, *, beta: float, probability: Tensor) -> Tensor:
    """The same where the winner is better with the given probability, (B,); equals `dpo` at probability 1."""
    return -probability * logsigmoid(beta * logit) - (1 - probability) * logsigmoid(-beta * logit)
