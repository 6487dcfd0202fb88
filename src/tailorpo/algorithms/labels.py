"""How sure a label is: temperature, smoothing, and the targets of a list.

    pair              p = sigmoid(gap / tau), or 1 with hard labels;        then  p' = eps + (1 - 2 eps) p
    stage of a list   q ~ exp(r / tau) over the n candidates that are left,
                      or shared by those with the best reward;              then  q' = 2 eps / n + (1 - 2 eps) q

eps is the chance that the step reward orders two siblings wrongly: p' is cDPO's label (Mitchell 2023, *A note on DPO
with noisy preferences*), and a list of two is a pair.

`tau: auto` is the running root mean square of the reward gaps between siblings at the step, over the updates before, so
that a typical pair has odds of e. The unit of the reward drops out: in the locally linear model soft labels come to
rest at KL_k = s_k^2 / (4 (beta tau)^2), where s_k is that very gap, so every trained step rests at 1 / (4 beta^2). What
is given up is one common tilt exp(reward / (beta tau)): steps with small gaps are pulled as far as those with large
ones. Until a step has a running gap, each trajectory's own siblings give it.

Left out: labels learnt from margins, and a smoothing per pair.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tailorpo.rewards.ensemble import GapScales, own_scale, sibling_gaps

Temperature = float | Literal["auto"] | None
Smoothing = float | Literal["auto"]

GAP_DECAY = 0.99
"""Of the running mean of squared gaps, per update; as of an ensemble's scales."""


def label_problems(
    *, labels: Literal["hard", "soft"], tau: Temperature, label_smoothing: Smoothing, misranks: str | None
) -> list[str]:
    """What these settings of `algorithm` cannot mean together, in words."""
    found: list[str] = []
    if labels == "soft" and tau is None:
        found.append("algorithm.labels is soft, which needs algorithm.tau, in units of the reward, or auto")
    if labels == "hard" and tau is not None:
        found.append("algorithm.tau has no effect with hard labels; set algorithm.labels to soft or leave tau out")
    if label_smoothing == "auto" and misranks is None:
        found.append(
            "algorithm.label_smoothing is auto, which needs algorithm.misranks: the jensen.json that `tailorpo jensen`"
            " has written for this model and reward"
        )
    if label_smoothing != "auto" and misranks is not None:
        found.append("algorithm.misranks has no effect without label_smoothing: auto; set that or leave misranks out")
    return found


def temperature(tau: float | Literal["auto"], reward: Tensor, *, scales: GapScales | None, k: int) -> Tensor:
    """The label temperature of each trajectory, (B,), for soft labels.

    Args:
        tau: the setting.
        reward: of the siblings, (n, B), NaN where one has none.
        scales: what is known of the gaps, and takes note of these; None where the caller keeps none.
        k: the step.
    """
    if tau != "auto":
        return torch.full_like(reward[0], tau)
    gaps, both = sibling_gaps(reward.unsqueeze(0))
    own = own_scale(gaps, both)[0]
    if scales is None:
        known = None
    else:
        known = scales.get(str(k), "siblings")
        once = both & torch.ones_like(both[:, :, 0]).tril(-1).unsqueeze(2)
        scales.gather(str(k), "siblings", gaps[0][once].square())
    # Where all gaps are zero any temperature gives even odds.
    return own.where(own > 0, 1) if known is None else torch.full_like(own, known)


def pair_probability(gap: Tensor, *, tau: Tensor | None, smoothing: float) -> Tensor:
    """How probable it is that the winner is better, (B,); even odds where the gap is missing."""
    certain = torch.ones_like(gap) if tau is None else torch.sigmoid(gap / tau).nan_to_num(0.5)
    return smoothing + (1 - 2 * smoothing) * certain


def stage_targets(reward: Tensor, *, tau: Tensor | None, smoothing: float) -> Tensor:
    """What each stage of a list should choose, (B, k - 1, k); zeros where a reward is missing.

    Args:
        reward: (B, k), best first.
        tau: (B,), or None for hard labels.
        smoothing: the chance of a wrong order of two.
    """
    count = reward.shape[1]
    left = torch.ones(count - 1, count, dtype=torch.bool, device=reward.device).triu()
    rows = reward.unsqueeze(1).expand(-1, count - 1, -1)
    if tau is None:
        best = (rows == reward[:, :-1].unsqueeze(2)) & left
        chosen = best.to(reward.dtype) / best.sum(dim=2, keepdim=True)
    else:
        chosen = torch.softmax((rows / tau.view(-1, 1, 1)).masked_fill(~left, -torch.inf), dim=2)
    even = left.to(reward.dtype) / left.sum(dim=1, keepdim=True)
    return (2 * smoothing * even + (1 - 2 * smoothing) * chosen).nan_to_num(0.0)
