"""A tie to the reference where the rewards disagree: GARDO's gate (arXiv 2512.24138), for pairs.

    L = L_pair + lambda d KL_k,   KL_k = |mean - mean_ref|^2 / (2 sigma^2) of the step that drew the pair

with d in 0..1 the disagreement of an ensemble's members on that pair (`objectives.disagreement`). Where all members see
the same gap the pair trains freely; where they contradict one another, which is where one of them is being exploited,
the step is pulled back. A pair without an order (the ensemble abstains) is pulled back, too.

GARDO weighs the penalty of single pictures and switches it on for the most uncertain ones of a batch; here the pair is
the unit and the weight is smooth. Left out: its refreshing of the reference and its diversity term.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tailorpo.algorithms.pairs import Pair, StoredPairs


def with_gated_kl(loss: Tensor, pair: Pair | StoredPairs, *, strength: float) -> Tensor:
    """The loss of each pair, (B,), with the penalty, whose gradient goes through the graph of the pair's own step.

    Args:
        loss: of the pairs.
        pair: with the graph of an inline update, and an ensemble's "disagreement" among its figures.
        strength: lambda.
    """
    if strength == 0 or isinstance(pair, StoredPairs) or pair.step is None:
        return loss
    gate = torch.where(pair.present, pair.extra["disagreement"], torch.zeros_like(loss))
    return loss + strength * gate * pair.step.gaussian.kl(pair.reference)
