"""What the Jensen gap |E r(x_0) - r(E x_0)| of one posterior cannot exceed, by what is known of the reward.

    smooth       L / 2 * tr Cov      |Hessian of r| <= L everywhere        (Taylor's formula to second order)
    Lipschitz    M * sqrt(tr Cov)    |gradient of r| <= M everywhere       (and Jensen's inequality for the root)
    directional  the smaller of the same two for r(x) = h(w . x), with q = w' Cov w for tr Cov, sup|h''| for L and
                 sup|h'| for M: only the posterior's variance along w counts

The smaller of smooth and Lipschitz is the Lipschitz one where tr Cov > 4 M^2 / L^2. With constants that hold everywhere
they are theorems, as for the rewards of the closed-form mixture; with constants measured at one point of a neural
reward they are estimates of size, and can be exceeded.

Numbers or tensors of any one shape; the results have that shape.
"""

from __future__ import annotations

from torch import Tensor


def smooth_bound(curvature: Tensor | float, variance: Tensor) -> Tensor:
    """L / 2 * variance for the largest absolute second derivative L."""
    return curvature / 2 * variance.clamp(min=0)


def lipschitz_bound(slope: Tensor | float, variance: Tensor) -> Tensor:
    """M * sqrt(variance) for the largest slope M."""
    return slope * variance.clamp(min=0).sqrt()
