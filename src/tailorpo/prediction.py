"""What the network predicts, turned into the predicted clean latent and the predicted noise.

With x = alpha x_0 + sigma e:

    epsilon   the network predicts e
    v         the network predicts v = alpha e - sigma x_0          (Salimans and Ho 2022, arXiv 2202.00512)
    sample    the network predicts x_0

Both results are affine in the network's output, so guidance before or after the conversion is the same thing.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]


def to_x0_and_epsilon(
    output: Tensor, x: Tensor, *, alpha: float, sigma: float, kind: PredictionType
) -> tuple[Tensor, Tensor]:
    """The predicted clean latent and the predicted noise at x, each of x's shape."""
    if kind == "epsilon":
        return (x - sigma * output) / alpha, output
    if kind == "v_prediction":
        return alpha * x - sigma * output, sigma * x + alpha * output
    return output, (x - alpha * output) / sigma


def training_target(x0: Tensor, epsilon: Tensor, *, alpha: Tensor, sigma: Tensor, kind: PredictionType) -> Tensor:
    """What the network was trained to give at x = alpha x0 + sigma epsilon; alpha and sigma broadcast."""
    if kind == "epsilon":
        return epsilon
    return alpha * epsilon - sigma * x0 if kind == "v_prediction" else x0
