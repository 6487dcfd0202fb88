"""TailorPO and TailorPO-G (Ren et al. 2025, arXiv 2502.01667).

At a trained step candidates (two in the paper) are drawn from the SAME x_k, ranked by the reward of their predicted
clean pictures (Eq. 12), and the best and the worst are trained with

    L = -log sigmoid(beta [log pi(x_w | x_k) / pi_ref(x_w | x_k) - log pi(x_l | x_k) / pi_ref(x_l | x_k)])   (Eq. 10)

in the closed form of `gaussian_step`: one policy evaluation and one reference evaluation serve any number of
candidates. `objective` has other losses (`objectives`), `labels` says how sure a ranking is. The trajectory goes on
from the winner. TailorPO-G first moves the winner along the gradient of its reward (Eq. 14, `guidance`).

beta is in nats of the sum over dimensions. The paper leaves open: beta, which steps are trained, when the policy is
updated, and whether the walk goes on from the guided winner. Here: every choice is a field, the update comes after all
trajectories of a batch, and the walk goes on from the guided winner, whose evaluation the next step needs anyway.

Left out: the ratio clamp of D3PO's and SPO's code (see `objectives`), and all pairs of k candidates as pairs, for which
the list's own likelihood stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tailorpo.algorithms.base import Cost, Gather, Update, alone, check_counts, common_problems
from tailorpo.algorithms.groups import Group, StoredGroups, group_scores
from tailorpo.algorithms.guided import move_pair
from tailorpo.algorithms.labels import label_problems, pair_probability, stage_targets, temperature
from tailorpo.algorithms.misranks import misrank_at
from tailorpo.algorithms.pairs import (
    CandidatePair,
    Pair,
    StoredCandidates,
    StoredPairs,
    candidate_log_ratios,
    pair_logit,
    pair_step,
)
from tailorpo.algorithms.safeguard import guarded, loser_scale
from tailorpo.guidance import Guidance, SigmaGuidance, length
from tailorpo.noise import Noise
from tailorpo.objectives import dpo, ipo, plackett_luce, soft_dpo
from tailorpo.policy import Policy
from tailorpo.rollout import Branch, Trajectories, rollout_branches
from tailorpo.samplers import DDIM
from tailorpo.step_rewards import Score

StoredRanking = StoredPairs | StoredCandidates | StoredGroups
"""What a later epoch needs of the candidates of a step, by what the loss needs."""


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
        objective: "dpo" as in the paper or "ipo", of the best and the worst candidate; or "plackett_luce", of all in
            their order, which is dpo for two.
        beta: strength of the tie to the reference, in nats of the sum over dimensions.
        candidates: drawn at each trained step; every one after the second costs one network evaluation.
        train_steps: which of the sampler's steps are trained: a count, spread evenly; a list of 0-based steps; or
            {first, last, count}.
        offset: where in its stratum each of `count` steps lies: "centred", or "random", drawn anew for every update.
        step_weights: "normalised" divides beta by |d mean / d output| / sigma of the step, so that one change of the
            network counts the same at every step; "uniform" is the loss as written.
        labels: "hard" as in the paper, or "soft": the winner is better with probability sigmoid(gap / tau).
        tau: label temperature, needed for soft labels: in units of the reward, the same for all steps, or "auto", the
            running root mean square of the gaps between siblings at the step.
        label_smoothing: the chance, below 1/2, that the step reward orders two siblings wrongly; or "auto", as measured
            at the step (`misranks`).
        misranks: the jensen.json of `tailorpo jensen`, for label_smoothing: auto.
        safeguard: scale the loser's part of the gradient so that the winner's likelihood does not fall to first order;
            for dpo with hard labels.
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
    objective: Literal["dpo", "ipo", "plackett_luce"] = "dpo"
    beta: float = 0.1
    candidates: int = 2
    train_steps: int | tuple[int, ...] | Steps = 5
    offset: Literal["centred", "random"] = "centred"
    step_weights: Literal["uniform", "normalised"] = "uniform"
    labels: Literal["hard", "soft"] = "hard"
    tau: float | Literal["auto"] | None = None
    label_smoothing: float | Literal["auto"] = 0.0
    misranks: str | None = None
    safeguard: bool = False
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
        if self.candidates < 2:
            raise ValueError(f"candidates must be at least 2, got {self.candidates}")
        if isinstance(self.tau, int | float) and not self.tau > 0:
            raise ValueError(f"tau must be positive or auto, got {self.tau}")
        if isinstance(self.label_smoothing, int | float) and not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be auto or at least 0 and below 0.5, got {self.label_smoothing}")
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
        found += label_problems(
            labels=self.labels, tau=self.tau, label_smoothing=self.label_smoothing, misranks=self.misranks
        )
        if self.safeguard and (self.objective != "dpo" or self.labels == "soft" or self.label_smoothing != 0):
            found.append(
                "algorithm.safeguard keeps one winner's likelihood from falling, and other losses than dpo with hard"
                " labels lower it on purpose once it has gone too far; set algorithm.objective to dpo, labels to hard"
                " and label_smoothing to 0, or leave safeguard out"
            )
        if self.guidance is not None and not differentiable:
            found.append(
                "algorithm.guidance (TailorPO-G) needs the gradient of the reward, and this reward is not"
                " differentiable; use guidance: null (TailorPO) or a differentiable reward"
            )
        if self.objective == "plackett_luce" and isinstance(self.guidance, SigmaGuidance) and self.guidance.symmetric:
            found.append(
                "algorithm.guidance.symmetric moves the two of a pair, and a list has more: set algorithm.objective to"
                " dpo or ipo, or symmetric to false"
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
                    forwards += self.candidates + rescored
                    known = guidance is None or rescored or self.continue_from != "winner"
                    input_gradients += guidance is not None and guidance.jacobian == "full"
        epochs = 1 if inline else self.inner_epochs
        return Cost(
            forwards=forwards + (0 if inline else epochs * len(trained)),
            backwards=epochs * len(trained),
            input_gradients=input_gradients,
            reward_queries=len(trained) * (self.candidates + rescored) + (self.finish or steps - 1 in trained),
            references=len(trained),
            picture_gradients=0 if guidance is None else self.candidates * len(trained),
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
    ) -> Iterator[Pair]:
        """Walk the trajectories to the end and yield the ranked candidates of each at every trained step.

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
            candidates=self.candidates,
            score=score,
            decide=decide,
            graph=self.update == "inline",
            gradient="none" if self.guidance is None else self.guidance.jacobian,
            finish=self.finish,
            on_step=on_step,
        )

    def prepare(
        self, stored: Sequence[StoredRanking], memory: dict[str, list[float]], gather: Gather = alone
    ) -> Sequence[StoredRanking]:
        """Nothing: a pair is labelled when it is drawn."""
        return stored

    def loss(self, policy: Policy, pair: Pair | StoredRanking) -> Tensor:
        """The objective of each row, (B,), from the graph that the rollout left or from a new evaluation of x_k.

        It is zero for candidates without an order.
        """
        weight = 1.0
        if self.step_weights == "normalised":
            weight = policy.sampler.noise_weight(policy.schedule, pair.k, kind=policy.model.prediction_type)
        beta = self.beta / weight
        if isinstance(pair, Group | StoredGroups):
            loss = plackett_luce(group_scores(policy, pair), beta=beta, targets=pair.targets)
        elif isinstance(pair, CandidatePair | StoredCandidates):
            gaussian = pair_step(policy, pair)
            scale = loser_scale(gaussian, pair.winner, pair.loser)
            loss = dpo(guarded(*candidate_log_ratios(pair, gaussian), scale), beta=beta)
        elif self.objective == "ipo":
            loss = ipo(pair_logit(policy, pair) / weight, beta=self.beta, probability=pair.probability)
        elif self.labels == "soft" or self.label_smoothing:
            loss = soft_dpo(pair_logit(policy, pair), beta=beta, probability=pair.probability)
        else:
            loss = dpo(pair_logit(policy, pair), beta=beta)
        return torch.where(pair.valid, loss, torch.zeros_like(loss))

    @torch.no_grad()
    def _rank(self, policy: Policy, branch: Branch, trajectories: Trajectories, *, score: Score, noise: Noise) -> Pair:
        """Label a branch: order, guidance, and where to go on."""
        batch, count, k = len(trajectories), self.candidates, branch.k
        rows = torch.arange(batch, device=branch.latents.device)
        reward = branch.scored.reward.view(count, batch)
        # A candidate without a reward comes last; of equals the one drawn first comes first.
        order = reward.nan_to_num(nan=-torch.inf).argsort(dim=0, descending=True, stable=True) * batch + rows
        having = reward.isfinite().sum(dim=0)
        first, second = order[0], order.gather(0, (having - 1).clamp(min=1).unsqueeze(0))[0]
        reward_winner, reward_loser = branch.scored.reward[first], branch.scored.reward[second]
        present = having >= (count if self.objective == "plackett_luce" else 2)
        tie = present & (reward_winner == reward_loser)

        gaussian = branch.step.detach().gaussian
        moved = move_pair(self.guidance, policy, branch, trajectories, first, second, score=score)
        noises = branch.noises.flatten(0, 1)
        noise_winner = noises[first] + moved.push / gaussian.std
        noise_loser = noises[second] + moved.push_loser / gaussian.std
        noise_difference = noise_winner - noise_loser
        gap, push = reward_winner - reward_loser, length(moved.push) / gaussian.std
        tau = temperature(self.tau, reward, scales=trajectories.gaps, k=k)
        smoothing = self._smoothing(int(policy.schedule.time[k]))

        reference = policy.reference_step(branch.latents, branch.k, trajectories.cond)
        next_latents, next_step = moved.latents, moved.step
        if self.continue_from != "winner":
            chosen = second
            if self.continue_from == "random":
                draws = [noise.integer(count, *key, "step", k, "continue") for key in trajectories.keys]
                chosen = torch.tensor(draws, device=rows.device) * batch + rows
            scored = branch.scored
            next_latents, next_step = scored.latents[chosen], scored.step.rows(chosen) if scored.step else None
        extra = branch.scored.comparison.figures(first, second)
        if self.guidance is not None:
            extra |= {"guidance_size": push, "guidance_accepted": moved.accepted.float()}
        if count > 2:  # of all of them, not of the two ends
            extra |= {"reward_mean": reward.mean(dim=0)}
        if self.tau == "auto" and tau is not None:
            extra |= {"tau": tau}
        pair = Pair(
            k=k,
            prompts=trajectories.prompts,
            latents=branch.latents,
            cond=trajectories.cond,
            noise_difference=noise_difference,
            probability=pair_probability(gap + moved.gain, tau=tau, smoothing=smoothing),
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
            extra=extra,
            pictures_winner=branch.scored.pictures[first],
            pictures_loser=branch.scored.pictures[second],
            step=branch.step if self.update == "inline" else None,
            reference=reference,
            next_latents=next_latents,
            next_step=next_step,
        )
        if self.objective == "plackett_luce":
            placed = torch.cat([noise_winner.unsqueeze(0), noises[order[1:]]])
            ranked = branch.scored.reward[order]
            ranked[0] += moved.gain
            targets = stage_targets(ranked.T, tau=tau, smoothing=smoothing)
            return Group(**vars(pair), noise_differences=placed[:-1] - placed[-1], targets=targets)
        if self.safeguard:
            winner, loser = gaussian.sample(noise_winner), gaussian.sample(noise_loser)
            pair.extra["safeguarded"] = (loser_scale(gaussian, winner, loser) < 1).float()
            return CandidatePair(**vars(pair), winner=winner, loser=loser)
        return pair

    def _smoothing(self, time: int) -> float:
        """The chance of a wrong order at a time of the network."""
        if self.label_smoothing == "auto":
            return misrank_at(self.misranks or "", time)
        return self.label_smoothing
