"""SPO, step-by-step preference optimisation (Liang et al. 2024, arXiv 2406.04314).

At every step from `first_step` on, k candidates are drawn from the SAME x_k; the best and the worst by the step reward
make a pair, unless they are too close; the trajectory goes on from a RANDOM candidate:

    L = -log sigmoid(beta [rho(x_best | x_k) - rho(x_worst | x_k)]),   rho = log clamp(pi / pi_ref, 1 +- clip)
    trained only where p_best - p_worst > threshold,  (p_best, p_worst) = softmax(r_best, r_worst)

As in the official code the log-ratio is the MEAN over the D dimensions of a latent (`reduction: mean`), with beta 10
and clip 0.1: then |beta (rho_best - rho_worst)| <= 2.0, and a branch outside the clamp has no gradient, in either
direction. `reduction: sum` is the density's own log-ratio, in nats. The softmax is over the pair alone, so the
threshold is on the reward's gap: tanh(gap / 2) > 0.3 is a gap above 0.62 nats of preference. A reward in another unit
is brought to nats by its `weight`.

The step reward is the reward of the predicted clean picture (`step_reward: predicted`, TailorPO's Eq. 12), or a
preference model that is told the time (`aware`, SPO's own; `rewards/step_preference.py`).

Both candidates of a pair have one input, so one policy and one reference evaluation serve the pair. The official code
sends that input twice through both networks, which doubles the cost of its training part and changes nothing.

Left out: the official code's second copy of the network (the adapter is switched off instead), and its exponential of
the log-ratio before the clamp (the clamp is on the logarithm).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tailorpo.algorithms.base import Cost, Gather, Update, alone, check_counts, common_problems
from tailorpo.algorithms.d3po import Reduction
from tailorpo.algorithms.pairs import CandidatePair, StoredCandidates, candidate_log_ratios, current_step
from tailorpo.noise import Noise
from tailorpo.objectives import clamp_log_ratio, dpo
from tailorpo.policy import Policy
from tailorpo.rollout import Branch, Trajectories, rollout_branches
from tailorpo.samplers import DDIM
from tailorpo.step_rewards import Score


@dataclass(frozen=True, kw_only=True)
class SPO:
    """The `algorithm` section of a run file, and the algorithm.

    Attributes:
        beta: strength of the tie to the reference; of the mean over dimensions or of the sum, by `reduction`.
        reduction: "mean" as in the official code, or "sum", the log-ratio of the densities.
        clip: the ratio pi / pi_ref is clamped to 1 - clip .. 1 + clip, after the reduction; null for no clamp.
        candidates: drawn at each trained step.
        first_step: the first trained step, 0-based; from there on every step is trained.
        threshold: a pair is dropped unless tanh(gap / 2), the difference of its two softmax scores, is above it.
        step_reward: what the run's reward is at a noisy step: "predicted", it scores the predicted clean picture as if
            that were finished; "aware", it is told the time of the prediction, which needs a reward that wants it
            (emoji_step_preference).
        update: "inline": the sampling forward's graph serves the loss, one optimizer step per update; "buffered", as
            in the official code: pairs are collected first, and those that were kept are trained in shuffled
            minibatches.
        inner_epochs: passes over the buffer.
        minibatch: pairs of a minibatch of the buffered update.
        accumulate: minibatches whose gradients make one optimizer step.
    """

    name: Literal["spo"] = "spo"
    beta: float = 10.0
    reduction: Reduction = "mean"
    clip: float | None = 0.1
    candidates: int = 4
    first_step: int = 4
    threshold: float = 0.3
    step_reward: Literal["predicted", "aware"] = "predicted"
    update: Update = "buffered"
    inner_epochs: int = 1
    minibatch: int = 10
    accumulate: int = 1

    def __post_init__(self) -> None:
        check_counts(self)
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if self.clip is not None and not 0 < self.clip < 1:
            raise ValueError(f"clip must be between 0 and 1, got {self.clip}")
        if self.candidates < 2:
            raise ValueError(f"candidates must be at least 2, got {self.candidates}")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must be at least 0 and below 1, got {self.threshold}")

    @property
    def needs_gradient(self) -> bool:
        """The reward only ranks."""
        return False

    def problems(self, *, sampler: DDIM, differentiable: bool, trainable: bool) -> list[str]:
        """Everything about this algorithm that cannot work with the rest of the run, in words."""
        found = common_problems(
            sampler=sampler, trainable=trainable, update=self.update, inner_epochs=self.inner_epochs
        )
        if not 0 <= self.first_step < sampler.steps:
            found.append(
                f"algorithm.first_step must be in 0..{sampler.steps - 1} (sampler.steps - 1), got {self.first_step}"
            )
        return found

    def trained_steps(self, steps: int, *, noise: Noise, update: int) -> tuple[int, ...]:
        """Every step from the first on."""
        return tuple(range(self.first_step, steps))

    def cost(self, steps: int, trained: Sequence[int]) -> Cost:
        """What one trajectory costs; under a buffered update each dropped pair saves the training part of its own."""
        inline, known, forwards = self.update == "inline", False, 0
        for k in range(steps):
            branching = k in trained
            # The walk's own evaluation; a graph for the loss needs a new one even where a score left one without.
            forwards += not known or (inline and branching)
            known = branching and k + 1 < steps  # finished latents are scored without the network
            forwards += branching + known * self.candidates  # the reference's, and the candidates'
        again = 0 if inline else self.inner_epochs
        return Cost(
            forwards=forwards + again * len(trained),
            backwards=self.inner_epochs * len(trained),
            input_gradients=0,
            # Where the last step is trained the finished picture is one of its candidates.
            reward_queries=self.candidates * len(trained) + (steps - 1 not in trained),
            references=len(trained),
            scored_rows=self.candidates,
        )

    def collect(
        self,
        policy: Policy,
        trajectories: Trajectories,
        *,
        trained: Sequence[int],
        score: Score,
        noise: Noise,
        on_step: Callable[[int], None] | None = None,
    ) -> Iterator[CandidatePair]:
        """Walk the trajectories to the end and yield best and worst of each at every trained step.

        Under an inline update a pair carries the graph of its step: run the loss and its backward before asking for
        the next.
        """

        for at in rollout_branches(
            policy,
            trajectories,
            noise=noise,
            trained=trained,
            candidates=self.candidates,
            score=score,
            graph=lambda k: self.update == "inline" and k in trained,
            on_step=on_step,
        ):
            if isinstance(at, Branch):
                pair = self._rank(policy, at, trajectories, noise=noise)
                trajectories.go_on(pair.next_latents, pair.next_step)
                yield pair
                del pair  # lets go of the graph before the walk goes on
            del at

    def prepare(
        self, stored: Sequence[StoredCandidates], memory: dict[str, list[float]], gather: Gather = alone
    ) -> Sequence[StoredCandidates]:
        """The pairs that were kept."""
        kept = [each.rows(each.valid.nonzero()[:, 0]) for each in stored]
        return [each for each in kept if len(each)]

    def loss(self, policy: Policy, pair: CandidatePair | StoredCandidates) -> Tensor:
        """The loss of each pair, (B,); zero where it was dropped."""
        dimensions = math.prod(pair.latents.shape[1:])
        winner, loser = (
            self._clamp(self._reduce(x, dimensions)) for x in candidate_log_ratios(pair, current_step(policy, pair))
        )
        loss = dpo(winner - loser, beta=self.beta)
        return torch.where(pair.valid, loss, torch.zeros_like(loss))

    def _reduce(self, log_ratio: Tensor, dimensions: int) -> Tensor:
        return log_ratio / dimensions if self.reduction == "mean" else log_ratio

    def _clamp(self, log_ratio: Tensor) -> Tensor:
        return log_ratio if self.clip is None else clamp_log_ratio(log_ratio, clip=self.clip)

    @torch.no_grad()
    def _rank(self, policy: Policy, branch: Branch, trajectories: Trajectories, *, noise: Noise) -> CandidatePair:
        """Best and worst of a branch, and the candidate to go on from."""
        count, batch, scored = self.candidates, len(trajectories), branch.scored
        rows = torch.arange(batch, device=branch.latents.device)
        reward = scored.reward.view(count, batch)
        # A candidate without a reward is neither best nor worst; two with one are enough for a pair.
        best = reward.nan_to_num(nan=-torch.inf).argmax(dim=0) * batch + rows
        worst = reward.nan_to_num(nan=torch.inf).argmin(dim=0) * batch + rows
        reward_best, reward_worst = scored.reward[best], scored.reward[worst]
        present = reward.isfinite().sum(dim=0) >= 2
        margin = torch.tanh((reward_best - reward_worst) / 2)

        gaussian = branch.step.detach().gaussian
        reference = policy.reference_step(branch.latents, branch.k, trajectories.cond)
        winner, loser, noises = scored.latents[best], scored.latents[worst], branch.noises.flatten(0, 1)
        difference = noises[best] - noises[worst]
        log_ratio = torch.stack([gaussian.log_ratio(winner, reference), gaussian.log_ratio(loser, reference)])
        reduced = self._reduce(log_ratio, math.prod(winner.shape[1:]))

        chosen = branch.random_rows(noise, trajectories)
        next_latents, next_step = scored.rows(chosen)
        if scored.step is None:
            trajectories.reward = scored.comparison.total[chosen]
            trajectories.members = {name: each[chosen] for name, each in scored.comparison.members.items()}
        return CandidatePair(
            k=branch.k,
            prompts=trajectories.prompts,
            latents=branch.latents,
            cond=trajectories.cond,
            noise_difference=difference,
            probability=torch.ones_like(margin),
            valid=present & (margin > self.threshold),
            present=present,
            reward_winner=reward_best,
            reward_loser=reward_worst,
            logit=gaussian.pair_logit(difference, reference),
            kl=gaussian.kl(reference),
            log_ratio_winner=log_ratio[0],
            log_ratio_loser=log_ratio[1],
            push=torch.zeros_like(margin),
            extra={
                "kept": (margin > self.threshold).float(),
                "softmax_gap": margin,
                "clamped": (self._clamp(reduced) != reduced).float().mean(dim=0),
                **scored.comparison.figures(best, worst),
            },
            pictures_winner=scored.pictures[best],
            pictures_loser=scored.pictures[worst],
            step=branch.step if self.update == "inline" else None,
            reference=reference,
            next_latents=next_latents,
            next_step=next_step,
            winner=winner,
            loser=loser,
        )
