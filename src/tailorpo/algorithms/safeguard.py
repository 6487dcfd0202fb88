"""The winner's safeguard: scale the loser's part of a pair's gradient so that the winner's likelihood does not fall.

Diffusion-SDPO (Fu et al. 2025, arXiv 2511.03317), in the form it takes for two candidates from the same x_k. With
e = (x - mean) / sigma, the gradient of a candidate's log-density with respect to the mean (in units of sigma) is its e.
A descent step on the pair's loss with the loser's part scaled by lambda moves the mean along e_w - lambda e_l, and to
first order the winner's log-density changes by

    e_w . (e_w - lambda e_l) = |e_w|^2 - lambda e_w . e_l

times a positive factor: it does not fall for any lambda up to

    lambda = min(1, |e_w|^2 / e_w . e_l)  where e_w . e_l > 0,  and 1 where it is not.

A freshly drawn candidate has e = z, so lambda is below 1 only where the loser lies further out along the winner's own
direction. For independent noises in D dimensions that has probability E Phi(-|z|): 15 % for D = 2, and nothing that
could be observed for a latent of D = 768 or more. So siblings from one x_k hardly need the guard, unlike pairs with two
inputs, for which it was made; it is there for stale pairs and to be sure.

What it cannot promise: the mean is moved through parameters that all inputs share, by an optimizer that rescales the
gradient (Adam), together with the other pairs of the batch, and by steps of finite length.

Left out: the same in the space of the parameters, which needs a backward pass for each candidate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tailorpo.gaussian_step import GaussianStep, per_sample_sum


@torch.no_grad()
def loser_scale(gaussian: GaussianStep, winner: Tensor, loser: Tensor) -> Tensor:
    """lambda of each pair, (B,), for candidates x_{k+1} (B, C, h, w) of this step."""
    own, other = ((x - gaussian.mean) / gaussian.std for x in (winner, loser))
    square, product = per_sample_sum(own * own), per_sample_sum(own * other)
    return torch.where(product > square, square / product, torch.ones_like(square))


def guarded(winner: Tensor, loser: Tensor, scale: Tensor) -> Tensor:
    """The logit, winner minus loser (B,), whose value is untouched and whose gradient has the loser's part scaled."""
    return winner - (scale * loser + (1 - scale) * loser.detach())
