"""TailorPO and TailorPO-G (Ren et al. 2025, arXiv 2502.01667).

At a trained step two candidates are drawn from the SAME x_k, ranked by the reward of their predicted clean pictures
(Eq. 12), and the pair is trained with

    L = -log sigmoid(beta [log pi(x_w | x_k) / pi_ref(x_w | x_k) - log pi(x_l | x_k) / pi_ref(x_l | x_k)])   (Eq. 10)

in the closed form of `gaussian_step`: one policy evaluation and one reference evaluation serve the pair. The
trajectory goes on from the winner. TailorPO-G first moves the winner along the gradient of its reward (Eq. 14,
`guidance`).

beta is in nats of the sum over dimensions. The paper leaves open: beta, which steps are trained, when the policy is
updated, and whether the walk goes on from the guided winner. Here: every choice is a field, the update comes after all
trajectories of a batch, and the walk goes on from the guided winner, whose evaluation the next step needs anyway.

Left out: the ratio clamp of D3PO's and SPO's code (see `objectives`), and more than two candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tailorpo.algorithms.base import Cost, Gather, Update, alone, check_counts, common_problems
from tailorpo.algorithms.guided import move_pair
from tailorpo.algorithms.pairs import Pair, StoredPairs, pair_logit
from tailorpo.guidance import Guidance, SigmaGuidance, length
from tailorpo.noise import Noise
from tailorpo.objectives import dpo, soft_dpo
from tailorpo.policy import Policy
from tailorpo.rollout import Branch, Trajectories, rollout_branches
from tailorpo.samplers import DDIM
from tailorpo.step_rewards import Score


@dataclass(frozen=True, kw_only=True)
class Steps:
    """`count` trained steps spread evenly over first..last (0-based, both included)."""

    first: int
    last: int
    count: int


@dataclass(frozen=True, kw_only=True)
class TailorPO:
    """The `algorithm` section of a run file, and the algorithm.

    Attributes:
        beta: strength of the tie to the reference, in nats of the sum over dimensions.
        train_steps: which of the sampler's steps are trained: a count, spread evenly; a list of 0-based steps; or
            {first, last, count}.
        offset: where in its stratum each of `count` steps lies: "centred", or "random", drawn anew for every update.
        step_weights: "normalised" divides beta by |d mean / d output| / sigma of the step, so that one change of the
            network counts the same at every step; "uniform" is the loss as written.
        labels: "hard" as in the paper, or "soft": the winner is better with probability sigmoid(gap / tau).
        tau: label temperature in units of the reward, the same for all steps; needed for soft labels.
        continue_from: which candidate the trajectory goes on from.
        finish: walk on to the picture after the last trained step. Only the log's `reward_final` needs it; without it
            every trajectory saves the evaluations after that step, one decode and one reward query.
        guidance: moves the winner before training (TailorPO-G); null for none.
        update: "inline": the sampling forward's graph serves the loss, one optimizer step per update; "buffered":
            pairs are collected first and trained in shuffled minibatches.
        inner_epochs: passes over the buffer.
        minibatch: pairs of a minibatch of the buffered update.
        accumulate: minibatches whose gradients make one optimizer step.
    """

    name: Literal["tailorpo"] = "tailorpo"
    beta: float = 0.1
    train_steps: int | tuple[int, ...] | Steps = 5
    offset: Literal["centred", "random"] = "centred"
    step_weights: Literal["uniform", "normalised"] = "uniform"
    labels: Literal["hard", "soft"] = "hard"
    tau: float | None = None
    continue_from: Literal["winner", "random", "loser"] = "winner"
    finish: bool = True
    guidance: Guidance | None = None
    update: Update = "inline"
    inner_epochs: int = 1
    minibatch: int = 8
    accumulate: int = 1

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if self.tau is not None and not self.tau > 0:
            raise ValueError(f"tau must be positive, got {self.tau}")
        check_counts(self)

    @property
    def needs_gradient(self) -> bool:
        """Guidance does."""
        return self.guidance is not None

    def problems(self, *, sampler: DDIM, differentiable: bool, trainable: bool) -> list[str]:
        """Everything about this algorithm that cannot work with the rest of the run, in words."""
        found = common_problems(
            sampler=sampler, trainable=trainable, update=self.update, inner_epochs=self.inner_epochs
        )
        steps, wanted = sampler.steps, self.train_steps
        if isinstance(wanted, int):
            if not 1 <= wanted <= steps:
                found.append(f"algorithm.train_steps must be in 1..{steps} (sampler.steps), got {wanted}")
        elif isinstance(wanted, Steps):
            if not (0 <= wanted.first <= wanted.last < steps and 1 <= wanted.count <= wanted.last - wanted.first + 1):
                found.append(
                    f"algorithm.train_steps: need 0 <= first <= last < {steps} (sampler.steps) and count in"
                    f" 1..last-first+1, got first {wanted.first}, last {wanted.last}, count {wanted.count}"
                )
        elif not wanted or len(set(wanted)) < len(wanted) or not all(0 <= k < steps for k in wanted):
            found.append(
                f"algorithm.train_steps must be different whole numbers in 0..{steps - 1} (sampler.steps - 1),"
                f" got {list(wanted)}"
            )
        if self.offset == "random" and not isinstance(wanted, int):
            found.append("algorithm.offset: random needs train_steps to be a count")
        if self.labels == "soft" and self.tau is None:
            found.append("algorithm.labels is soft, which needs algorithm.tau, in units of the reward")
        if self.labels == "hard" and self.tau is not None:
            found.append("algorithm.tau has no effect with hard labels; set algorithm.labels to soft or leave tau out")
        if self.guidance is not None and not differentiable:
            found.append(
                "algorithm.guidance (TailorPO-G) needs the gradient of the reward, and this reward is not"
                " differentiable; use guidance: null (TailorPO) or a differentiable reward"
            )
        if isinstance(self.guidance, SigmaGuidance) and self.guidance.corrected_beta and self.labels == "soft":
            found.append(
                "algorithm.guidance.corrected_beta is for hard labels: soft ones grow with the push themselves, and"
                " their optimum lies where it did; set labels to hard or corrected_beta to false"
            )
        return found

    def at(self, update: int) -> TailorPO:
        """The same with the guidance of an update, 0-based, and the beta that belongs to it."""
        if not isinstance(self.guidance, SigmaGuidance):
            return self
        guidance = self.guidance.at(update)
        beta = self.beta / guidance.gain if guidance.corrected_beta else self.beta
        return replace(self, guidance=guidance, beta=beta)

    def trained_steps(self, steps: int, *, noise: Noise, update: int) -> tuple[int, ...]:
        """The trained steps of one update, ascending."""
        wanted = self.train_steps
        if isinstance(wanted, int):
            if self.offset == "centred":
                return tuple((2 * i + 1) * steps // (2 * wanted) for i in range(wanted))
            shift = noise.integer(steps, "offset", update)
            return tuple(sorted((i * steps + shift) // wanted for i in range(wanted)))
        if isinstance(wanted, Steps):
            span, gaps = wanted.last - wanted.first, max(wanted.count - 1, 1)
            return tuple(wanted.first + round(i * span / gaps) for i in range(wanted.count))
        return tuple(sorted(wanted))

    def cost(self, steps: int, trained: Sequence[int]) -> Cost:
        """What one trajectory costs with the given trained steps, in the first epoch."""
        guidance, inline = self.guidance, self.update == "inline"
        rescored = guidance is not None and guidance.accept_reject
        forwards, input_gradients, known = 0, 0, False
        for k in range(steps if self.finish else max(trained) + 1):
            branching = k in trained
            # The walk's own evaluation; a graph for the loss needs a new one even where a score left one without.
            forwards += not known or (inline and branching)
            known = False
            if branching:
                forwards += 1  # reference
                if k + 1 < steps:  # finished latents are scored without the network
                    forwards += 2 + rescored
                    known = guidance is None or rescored or self.continue_from != "winner"
                    input_gradients += guidance is not None and guidance.jacobian == "full"
        epochs = 1 if inline else self.inner_epochs
        return Cost(
            forwards=forwards + (0 if inline else epochs * len(trained)),
            backwards=epochs * len(trained),
            input_gradients=input_gradients,
            reward_queries=len(trained) * (2 + rescored) + (self.finish or steps - 1 in trained),
            references=len(trained),
            picture_gradients=0 if guidance is None else 2 * len(trained),
            scored_rows=2,
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
    ) -> Iterator[Pair]:
        """Walk the trajectories to the end and yield a ranked pair of each at every trained step.

        Under an inline update a pair carries the graph of its step: run the loss and its backward before asking for
        the next.
        """

        def decide(branch: Branch) -> Pair:
            return self._rank(policy, branch, trajectories, score=score, noise=noise)

        yield from rollout_branches(
            policy,
            trajectories,
            noise=noise,
            trained=trained,
            candidates=2,
            score=score,
            decide=decide,
            graph=self.update == "inline",
            gradient="none" if self.guidance is None else self.guidance.jacobian,
            finish=self.finish,
            on_step=on_step,
        )

    def prepare(
        self, stored: Sequence[StoredPairs], memory: dict[str, list[float]], gather: Gather = alone
    ) -> Sequence[StoredPairs]:
        """Nothing: a pair is labelled when it is drawn."""
        return stored

    def loss(self, policy: Policy, pair: Pair | StoredPairs) -> Tensor:
        """Eq. 10 of each pair, (B,), from the graph that the rollout left or from a new evaluation of x_k.

        It is zero for pairs without an order.
        """
        logit, beta = pair_logit(policy, pair), self.beta
        if self.step_weights == "normalised":
            beta = beta / policy.sampler.noise_weight(policy.schedule, pair.k, kind=policy.model.prediction_type)
        soft = self.labels == "soft"
        loss = soft_dpo(logit, beta=beta, probability=pair.probability) if soft else dpo(logit, beta=beta)
        return torch.where(pair.valid, loss, torch.zeros_like(loss))

    @torch.no_grad()
    def _rank(self, policy: Policy, branch: Branch, trajectories: Trajectories, *, score: Score, noise: Noise) -> Pair:
        """Label a branch: winner, loser, guidance, and where to go on."""
        batch = len(trajectories)
        rows = torch.arange(batch, device=branch.latents.device)
        reward = branch.scored.reward.view(2, batch)
        # A candidate without a reward never wins against one with; where neither is better candidate 0 takes the role.
        order = reward.nan_to_num(nan=-torch.inf)
        winner = (order[1] > order[0]).long()
        first, second = winner * batch + rows, (1 - winner) * batch + rows
        reward_winner, reward_loser = branch.scored.reward[first], branch.scored.reward[second]
        present = reward.isfinite().all(dim=0)
        tie = present & (reward_winner == reward_loser)

        gaussian = branch.step.detach().gaussian
        moved = move_pair(self.guidance, policy, branch, trajectories, first, second, score=score)
        noises = branch.noises.flatten(0, 1)
        noise_winner = noises[first] + moved.push / gaussian.std
        noise_loser = noises[second] + moved.push_loser / gaussian.std
        noise_difference = noise_winner - noise_loser
        gap, push = reward_winner - reward_loser, length(moved.push) / gaussian.std
        soft = torch.ones_like(gap) if self.tau is None else torch.sigmoid((gap + moved.gain) / self.tau)

        reference = policy.reference_step(branch.latents, branch.k, trajectories.cond)
        next_latents, next_step = moved.latents, moved.step
        if self.continue_from != "winner":
            chosen = second
            if self.continue_from == "random":
                coins = [noise.integer(2, *key, "step", branch.k, "continue") for key in trajectories.keys]
                chosen = torch.tensor(coins, device=rows.device) * batch + rows
            scored = branch.scored
            next_latents, next_step = scored.latents[chosen], scored.step.rows(chosen) if scored.step else None
        return Pair(
            k=branch.k,
            prompts=trajectories.prompts,
            latents=branch.latents,
            cond=trajectories.cond,
            noise_difference=noise_difference,
            probability=soft.nan_to_num(0.5),
            valid=present & (~tie | (self.labels == "soft")),
            tie=tie,
            present=present,
            reward_winner=reward_winner,
            reward_loser=reward_loser,
            gap=gap,
            logit=gaussian.pair_logit(noise_difference, reference),
            kl=gaussian.kl(reference),
            log_ratio_winner=gaussian.log_ratio(gaussian.sample(noise_winner), reference),
            log_ratio_loser=gaussian.log_ratio(gaussian.sample(noise_loser), reference),
            push=push,
            extra=branch.scored.comparison.figures(first, second)
            | ({} if self.guidance is None else {"guidance_size": push, "guidance_accepted": moved.accepted.float()}),
            pictures_winner=branch.scored.pictures[first],
            pictures_loser=branch.scored.pictures[second],
            step=branch.step if self.update == "inline" else None,
            reference=reference,
            next_latents=next_latents,
            next_step=next_step,
        )
