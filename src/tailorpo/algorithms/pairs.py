"""Ranked pairs of candidates from the same x_k: what TailorPO and SPO train on, and their losses' logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from tailorpo.algorithms.base import Shown, Stored
from tailorpo.gaussian_step import GaussianStep
from tailorpo.models import Conditioning
from tailorpo.policy import Policy, PolicyStep


@dataclass
class Pair:
    """One ranked pair per trajectory, at one step: what the loss needs, and what the log wants to know.

    Everything is (B,) or (B, C, h, w). `noise_difference` is z_w - z_l after guidance, `push` its size there in sigma,
    rewards are those before it; `extra` are figures of the method's own. `step` carries the graph of the rollout under
    an inline update and is None otherwise; the walk goes on from `next_latents`, where its step is `next_step`, if that
    is known. `keep_reference` is for losses that need the reference's whole mean in later epochs, and not only its
    projection on the pair.
    """

    k: int
    prompts: Sequence[str]
    latents: Tensor
    cond: Conditioning
    noise_difference: Tensor
    probability: Tensor
    valid: Tensor
    present: Tensor
    reward_winner: Tensor
    reward_loser: Tensor
    logit: Tensor
    kl: Tensor
    log_ratio_winner: Tensor
    log_ratio_loser: Tensor
    push: Tensor
    extra: dict[str, Tensor]
    pictures_winner: Tensor
    pictures_loser: Tensor
    step: PolicyStep | None
    reference: GaussianStep
    next_latents: Tensor
    next_step: PolicyStep | None
    keep_reference: bool = field(default=False, kw_only=True)

    @property
    def gap(self) -> Tensor:
        """By how much the winner's reward is higher, (B,)."""
        return self.reward_winner - self.reward_loser

    @property
    def tie(self) -> Tensor:
        """Pairs with two equal rewards, (B,)."""
        return self.present & (self.reward_winner == self.reward_loser)

    def figures(self) -> dict[str, Tensor]:
        """What there is to log; `accuracy` is 1 where the policy's own log-ratios order the pair as the reward does,
        1/2 where they are equal."""
        return {
            "reward_winner": self.reward_winner,
            "reward_loser": self.reward_loser,
            "reward_mean": (self.reward_winner + self.reward_loser) / 2,
            "gap": self.gap,
            "log_ratio_winner": self.log_ratio_winner,
            "log_ratio_loser": self.log_ratio_loser,
            "kl": self.kl,
            "accuracy": (torch.sign(self.logit) + 1) / 2,
            **self.extra,
            "present": self.present,
            "tie": self.tie,
        }

    def shown(self) -> Shown:
        """Both candidates' predicted clean pictures."""
        return Shown(
            self.prompts,
            self.pictures_winner,
            self.pictures_loser,
            self.reward_winner,
            self.reward_loser,
            guided=self.push > 0,
        )

    def stored(self, policy: Policy) -> Stored:
        """What a later epoch needs of it."""
        origin = policy.origin(self.latents, self.k)
        return StoredPairs(
            k=self.k,
            latents=self.latents,
            cond=self.cond,
            noise_difference=self.noise_difference,
            probability=self.probability,
            valid=self.valid,
            reference_projection=self.reference.projection(self.noise_difference, origin),
            reference=self.reference if self.keep_reference else None,
        )


@dataclass(frozen=True)
class StoredPairs:
    """The part of a pair that a later epoch needs: no graph, no pictures, one number for the reference."""

    k: int
    latents: Tensor
    cond: Conditioning
    noise_difference: Tensor
    probability: Tensor
    valid: Tensor
    reference_projection: Tensor
    reference: GaussianStep | None = None
    step: None = None

    def __len__(self) -> int:
        return len(self.latents)

    def rows(self, index: Tensor) -> StoredPairs:
        """A selection of the batch."""
        return replace(
            self,
            latents=self.latents[index],
            cond=self.cond.rows(index),
            noise_difference=self.noise_difference[index],
            probability=self.probability[index],
            valid=self.valid[index],
            reference_projection=self.reference_projection[index],
            reference=self.reference and GaussianStep(self.reference.mean[index], self.reference.std),
        )


class FromStep(Protocol):
    """What a loss trains on: made at step k from `latents`, x_k, with the graph of that step if the rollout left it."""

    @property
    def k(self) -> int: ...
    @property
    def latents(self) -> Tensor: ...
    @property
    def cond(self) -> Conditioning: ...
    @property
    def step(self) -> PolicyStep | None: ...


def current_step(policy: Policy, sample: FromStep) -> GaussianStep:
    """The policy's step from x_k: with the graph that the rollout left, or from a new evaluation."""
    return (sample.step or policy.step(sample.latents, sample.k, sample.cond)).gaussian


def logit_of(policy: Policy, pair: Pair | StoredPairs, gaussian: GaussianStep) -> Tensor:
    """Log-ratio of the winner minus that of the loser in nats, (B,), under the policy's step from x_k."""
    if isinstance(pair, StoredPairs):
        origin = policy.origin(pair.latents, pair.k)
        return gaussian.projection(pair.noise_difference, origin) - pair.reference_projection
    return gaussian.pair_logit(pair.noise_difference, pair.reference)


@dataclass
class CandidatePair(Pair):
    """A pair whose loss needs the log-ratio of each candidate and not only their difference.

    `winner` and `loser` are the candidates themselves, x_{k+1}.
    """

    winner: Tensor
    loser: Tensor

    def stored(self, policy: Policy) -> StoredCandidates:
        """What a later epoch needs of it."""
        return StoredCandidates(
            self.k, self.latents, self.cond, self.winner, self.loser, valid=self.valid, reference=self.reference
        )


@dataclass(frozen=True)
class StoredCandidates:
    """The part of such a pair that a later epoch needs: here the reference's whole mean."""

    k: int
    latents: Tensor
    cond: Conditioning
    winner: Tensor
    loser: Tensor
    _: KW_ONLY
    valid: Tensor
    reference: GaussianStep
    step: None = None

    def __len__(self) -> int:
        return len(self.latents)

    def rows(self, index: Tensor) -> StoredCandidates:
        """A selection of the batch."""
        return StoredCandidates(
            self.k,
            self.latents[index],
            self.cond.rows(index),
            self.winner[index],
            self.loser[index],
            valid=self.valid[index],
            reference=GaussianStep(self.reference.mean[index], self.reference.std),
        )


def candidate_log_ratios(pair: CandidatePair | StoredCandidates, gaussian: GaussianStep) -> tuple[Tensor, Tensor]:
    """Log-ratios of winner and loser in nats, (B,) each, under the policy's step from x_k (`current_step`)."""
    return gaussian.log_ratio(pair.winner, pair.reference), gaussian.log_ratio(pair.loser, pair.reference)
