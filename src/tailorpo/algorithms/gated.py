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

from tailorpo.algorithms.pairs import Pair
from tailorpo.gaussian_step import GaussianStep


def gated_kl(pair: Pair, gaussian: GaussianStep) -> Tensor:
    """d KL_k of each pair, (B,), 0 where a reward is missing.

    Args:
        pair: an ensemble has put "disagreement" among its figures.
        gaussian: the policy's step from x_k, with its graph.
    """
    gate = torch.where(pair.present, pair.extra["disagreement"], torch.zeros_like(pair.extra["disagreement"]))
    return gate * gaussian.kl(pair.reference)
