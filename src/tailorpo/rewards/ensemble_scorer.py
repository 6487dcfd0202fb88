"""The Scorer of an ensemble: one number per picture as any Scorer, and siblings compared by the ensemble's rule.

A picture alone has no value to an ensemble: scales belong to gaps, and votes are about pairs. What ranks n siblings x_1
.. x_n of one trajectory is therefore

    u_j = (1/n) sum_i G(x_j, x_i)

with G(x, x) = 0. For two that is +- G / 2, so that their difference is the preference itself; for `mean` it is the
normalised score counted from the siblings' mean; for `majority` it is Copeland's count with margins. Guidance follows
the gradient of sum_i G(x_j, x_i) / (n - 1) with the siblings held constant, for `mean` that of the weighted normalised
sum.

Until a step has a running scale, each trajectory's own siblings give it. Of two siblings every gap is then +1 or -1, so
the first update already does not depend on any member's unit.

Called as any Scorer, it returns the weighted sum of raw scores: what is logged of finished pictures beside every
member's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tailorpo.device import sent
from tailorpo.objectives import disagreement
from tailorpo.rewards.ensemble import Ensemble, GapScales, own_scale, sibling_gaps
from tailorpo.rewards.scorer import Reward, Scorer


@dataclass(frozen=True)
class Comparison:
    """n siblings of each of B trajectories, compared; row j * B + b is sibling j of trajectory b.

    Attributes:
        reward: what ranks the siblings, (n B,): the reward itself, or what an ensemble makes of its members'; NaN where
            it was invalid.
        objective: what guidance follows the gradient of, (n B,), with its graph if there is one.
        total: the reward of each picture alone, (n B,): the weighted sum of raw scores.
        members: every member's raw scores by name, (n B,); empty where there is no ensemble.
        weights: of the members.
        scales: of the members' gaps, (n B,); what they were divided by.
    """

    reward: Tensor
    objective: Tensor
    total: Tensor
    members: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    weights: dict[str, float] = field(default_factory=dict[str, float])
    scales: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @classmethod
    def single(cls, reward: Tensor) -> Comparison:
        """Of siblings whose reward is one number each."""
        return cls(reward.detach(), reward, reward.detach())

    def figures(self, winner: Tensor, loser: Tensor) -> dict[str, Tensor]:
        """What there is to log of pairs of rows, (P,) each; nothing without an ensemble."""
        return self._opinions(winner, loser) if self.members else {}

    def _opinions(self, winner: Tensor, loser: Tensor) -> dict[str, Tensor]:
        """What each member says of the pairs.

        `agreement` is 1 where a member orders the pair as the ensemble does, 0 where the other way round, and 1/2 where
        either abstains; `abstained` is 1 where the ensemble does although some member does not; `disagreement` is how
        far the members are from seeing the same gap (`objectives.disagreement`).
        """
        decision = (self.reward[winner] - self.reward[loser]).sign()
        found: dict[str, Tensor] = {}
        opinions, gaps = torch.zeros_like(decision), list[Tensor]()
        for name, score in self.members.items():
            gap = score[winner] - score[loser]
            opinion = math.copysign(1, self.weights[name]) * gap.sign()
            opinions += opinion.abs()
            scale = self.scales[name][winner]
            gaps.append(math.copysign(1, self.weights[name]) * gap / scale.where(scale > 0, 1))
            found[f"reward_winner:{name}"] = score[winner]
            found[f"reward_loser:{name}"] = score[loser]
            found[f"gap:{name}"] = gap
            found[f"agreement:{name}"] = (1 + opinion * decision) / 2
            found[f"scale:{name}"] = scale
        weights = sent(torch.tensor(list(self.weights.values())), decision.device)
        found["disagreement"] = disagreement(torch.stack(gaps), weights)
        found["abstained"] = ((decision == 0) & (opinions > 0)).float()
        return found


class EnsembleScorer(Scorer):
    """Several rewards under an `Ensemble`; `scales` is what it remembers from update to update."""

    def __init__(
        self,
        members: Sequence[tuple[Reward, float]],
        ensemble: Ensemble,
        *,
        on_invalid: Literal["stop", "skip"] = "stop",
        devices: Sequence[torch.device] = (),
    ) -> None:
        """As `Scorer`; raises ValueError for fewer than two members or a weight of zero."""
        super().__init__(members, on_invalid=on_invalid, devices=devices)
        if len(members) < 2 or not all(weight for _, weight in members):
            raise ValueError("an ensemble needs at least two rewards, and none of weight 0")
        self.ensemble = ensemble
        self.scales = GapScales(ensemble.decay)

    def compare(self, images: Tensor, prompts: Sequence[str], *, siblings: int, time: int | None) -> Comparison:
        """Score and compare; errors as `__call__`.

        Args:
            images: (n B, 3, H, W), sibling by sibling.
            prompts: of the same rows.
            siblings: n.
            time: the network's time at which the pictures were predicted; None for finished ones.
        """
        rows = self._scores(images, prompts, time)
        weights = sent(torch.tensor([weight for _, weight in self.members]), images.device)
        gaps, both = sibling_gaps(torch.stack(rows).view(len(rows), siblings, -1))
        scale = self._scale(gaps, both, step="finished" if time is None else str(time))
        used = scale.where(scale > 0, 1).view(len(rows), 1, 1, -1)  # where it is zero, so are the gaps
        preference = self.ensemble.preference(gaps * weights.sign().view(-1, 1, 1, 1) / used, weights)

        rivals, summed = both.sum(1), preference.sum(1)
        reward = (summed.detach() / (rivals + 1)).flatten()
        total = self._sum(rows).detach()
        names = self.names
        return Comparison(
            reward.where(total.isfinite(), torch.nan),
            (summed / rivals.clamp(min=1)).flatten(),
            total,
            {name: row.detach() for name, row in zip(names, rows, strict=True)},
            {name: weight for name, (_, weight) in zip(names, self.members, strict=True)},
            {name: each.repeat(siblings) for name, each in zip(names, scale, strict=True)},
        )

    def _scale(self, gaps: Tensor, both: Tensor, *, step: str) -> Tensor:
        """What each member's gaps are divided by, (M, B); takes note of them for the updates to come."""
        own = own_scale(gaps, both)
        if self.ensemble.normalise == "none":
            return torch.ones_like(own)
        below = torch.ones_like(both[:, :, 0]).tril(-1)  # every two siblings once
        scales: list[Tensor] = []
        for name, member, scale in zip(self.names, gaps.detach(), own, strict=True):
            known = self.scales.get(step, name)
            scales.append(scale if known is None else torch.full_like(scale, known))
            self.scales.gather(step, name, member[both & below.unsqueeze(2)].square())
        return torch.stack(scales)
