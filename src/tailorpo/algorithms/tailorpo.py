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

`step_reward` replaces Eq. 12 by an estimate that looks further ahead (`futures`); `train_steps: {auto: K}` chooses the
steps by a measurement (`step_choice`).

A KL penalty, a KL target that a controller holds, and references that move are in docs/kl.md; all are off by default:

    loss = (objective where KL_k <= kl_mask, otherwise 0) + kl_penalty KL_k

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
from tailorpo.algorithms.checks import setting_problems
from tailorpo.algorithms.gated import gated_kl
from tailorpo.algorithms.groups import Group, StoredGroups, group_scores
from tailorpo.algorithms.kl_step import KLStep, StoredKLStep, note_kl, penalised_step
from tailorpo.algorithms.pairs import (
    CandidatePair,
    Pair,
    StoredCandidates,
    StoredPairs,
    candidate_log_ratios,
    current_step,
    logit_of,
)
from tailorpo.algorithms.ranking import rank
from tailorpo.algorithms.safeguard import guarded, loser_scale
from tailorpo.futures import StepReward
from tailorpo.gaussian_step import GaussianStep
from tailorpo.guidance import Guidance, SigmaGuidance
from tailorpo.moving_reference import MovingReference
from tailorpo.noise import Noise
from tailorpo.objectives import dpo, ipo, plackett_luce, soft_dpo
from tailorpo.policy import Policy
from tailorpo.rollout import Branch, Trajectories, rollout_branches
from tailorpo.samplers import DDIM
from tailorpo.step_choice import AutoSteps, Steps
from tailorpo.step_rewards import Score

StoredRanking = StoredPairs | StoredCandidates | StoredGroups
"""What a later epoch needs of the candidates of a step, by what the loss needs."""
StoredSample = StoredRanking | StoredKLStep


@dataclass(frozen=True, kw_only=True)
class TailorPO:
    """The `algorithm` section of a run file, and the algorithm.

    Attributes:
        objective: "dpo" as in the paper or "ipo", of the best and the worst candidate; or "plackett_luce", of all in
            their order, which is dpo for two.
        beta: strength of the tie to the reference, in nats of the sum over dimensions; "auto" computes it from the gaps
            of the pairs so far, for soft labels and a `kl_target`.
        candidates: drawn at each trained step; every one after the second costs one network evaluation.
        train_steps: which of the sampler's steps are trained: a count, spread evenly; a list of 0-based steps;
            {first, last, count}; or {auto: count, measured: file of `tailorpo jensen`}, the steps that teach most.
        offset: where in its stratum each of `count` steps lies: "centred", or "random", drawn anew for every update.
        step_weights: "normalised" divides beta by |d mean / d output| / sigma of the step, so that one change of the
            network counts the same at every step; "uniform" is the loss as written.
        labels: "hard" as in the paper, or "soft": the winner is better with probability sigmoid(gap / tau).
        tau: label temperature, needed for soft labels: in units of the reward, the same for all steps, or "auto", the
            running root mean square of the gaps between siblings at the step.
        label_smoothing: the chance, below 1/2, that the step reward orders two siblings wrongly; or "auto", as measured
            at the step (`misranks`).
        misranks: the jensen.json of `tailorpo jensen`, or the name of a bundled one, for label_smoothing: auto.
        safeguard: scale the loser's part of the gradient so that the winner's likelihood does not fall to first order;
            for dpo with hard labels.
        step_reward: what the candidates are ranked by: "predicted", Eq. 12; {lookahead: n}, the picture predicted after
            n deterministic steps ahead; {continuations: n, cut: m}, the mean of n chains under shared noise, to the end
            or cut after m steps.
        continue_from: which candidate the trajectory goes on from.
        finish: walk on to the picture after the last trained step. Only the log's `reward_final` needs it; without it
            every trajectory saves the evaluations after that step, one decode and one reward query.
        guidance: moves the winner before training (TailorPO-G); null for none.
        update: "inline": the sampling forward's graph serves the loss, one optimizer step per update; "buffered":
            pairs are collected first and trained in shuffled minibatches.
        inner_epochs: passes over the buffer.
        minibatch: pairs of a minibatch of the buffered update.
        accumulate: minibatches whose gradients make one optimizer step.
        kl_target: nats from the base model over all steps of a trajectory that a controller holds: through beta with
            soft labels, through `kl_penalty` with hard ones; null for no controller.
        kl_penalty: lambda, what a nat of KL at a step costs in the loss; with `kl_target` and hard labels where the
            controller starts, 0 for a guess from beta.
        kl_steps: untrained steps at which the penalty acts, too, for one forward and one backward each; null for the
            last two if a controller has the penalty (which of them turns a change of the network into most nats is a
            matter of the schedule), otherwise none.
        kl_mask: nats of KL at a step beyond which its pair trains nothing; null for no limit.
        gated_kl: lambda, what a nat of KL at a step costs in the loss where the rewards of an ensemble disagree
            completely on the pair (`gated`); 0 for nothing.
        reference: what the loss compares with: "base", the model as it was, or a copy that follows the policy:
            {ema: 0.9} or {every: 10}.
        kl_measured: of how many trajectories of an update the KL to the base model is measured at every step, at one
            evaluation for each step that is not trained; 0 for none.
    """

    name: Literal["tailorpo"] = "tailorpo"
    objective: Literal["dpo", "ipo", "plackett_luce"] = "dpo"
    beta: float | Literal["auto"] = 0.1
    candidates: int = 2
    train_steps: int | tuple[int, ...] | Steps | AutoSteps = 5
    offset: Literal["centred", "random"] = "centred"
    step_weights: Literal["uniform", "normalised"] = "uniform"
    labels: Literal["hard", "soft"] = "hard"
    tau: float | Literal["auto"] | None = None
    label_smoothing: float | Literal["auto"] = 0.0
    misranks: str | None = None
    safeguard: bool = False
    step_reward: StepReward = "predicted"
    continue_from: Literal["winner", "random", "loser"] = "winner"
    finish: bool = True
    guidance: Guidance | None = None
    update: Update = "inline"
    inner_epochs: int = 1
    minibatch: int = 8
    accumulate: int = 1
    kl_target: float | None = None
    kl_penalty: float = 0.0
    kl_steps: tuple[int, ...] | None = None
    kl_mask: float | None = None
    gated_kl: float = 0.0
    reference: Literal["base"] | MovingReference = "base"
    kl_measured: int = 1

    def __post_init__(self) -> None:
        if self.beta != "auto" and not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if self.candidates < 2:
            raise ValueError(f"candidates must be at least 2, got {self.candidates}")
        if isinstance(self.tau, int | float) and not self.tau > 0:
            raise ValueError(f"tau must be positive or auto, got {self.tau}")
        if isinstance(self.label_smoothing, int | float) and not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be auto or at least 0 and below 0.5, got {self.label_smoothing}")
        for name in ("kl_target", "kl_mask"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive (nats) or null, got {value}")
        for name in ("kl_penalty", "gated_kl", "kl_measured"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        check_counts(self)

    @property
    def needs_gradient(self) -> bool:
        """Guidance does."""
        return self.guidance is not None

    @property
    def controlled(self) -> Literal["beta", "kl_penalty"] | None:
        """What the controller of `kl_target` moves: with soft labels beta, with hard ones, where beta sets no KL, the
        penalty."""
        return None if self.kl_target is None else "beta" if self.labels == "soft" else "kl_penalty"

    def problems(self, *, sampler: DDIM, differentiable: bool, trainable: bool) -> list[str]:
        """Everything about this algorithm that cannot work with the rest of the run, in words."""
        found = common_problems(
            sampler=sampler, trainable=trainable, update=self.update, inner_epochs=self.inner_epochs
        )
        return found + setting_problems(self, steps=sampler.steps, differentiable=differentiable)

    def at(self, update: int) -> TailorPO:
        """The same with the guidance of an update, 0-based, and the beta that belongs to it."""
        if not isinstance(self.guidance, SigmaGuidance):
            return self
        guidance = self.guidance.at(update)
        if self.beta == "auto" or not guidance.corrected_beta:
            return replace(self, guidance=guidance)
        return replace(self, guidance=guidance, beta=self.beta / guidance.gain)

    def penalised_between(self, steps: int, trained: Sequence[int]) -> tuple[int, ...]:
        """The untrained steps whose KL is penalised, ascending."""
        last = range(max(steps - 2, 0), steps) if self.controlled == "kl_penalty" else ()
        walked = steps if self.finish else max(trained) + 1
        wanted = {*(last if self.kl_steps is None else self.kl_steps)} - {*trained}
        return tuple(k for k in sorted(wanted) if k < walked)

    def measured_between(self, steps: int, trained: Sequence[int]) -> int:
        """How many evaluations of the base model the KL of one measured trajectory takes."""
        if not self.finish:
            return 0
        known = {*trained, *self.penalised_between(steps, trained)} if self.reference == "base" else set[int]()
        return steps - len(known)

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
        if isinstance(wanted, AutoSteps):
            return wanted.choose(power=1 if self.step_weights == "normalised" else 2)
        return tuple(sorted(wanted))

    def cost(self, steps: int, trained: Sequence[int]) -> Cost:
        """What one trajectory costs with the given trained steps, in the first epoch."""
        guidance, inline = self.guidance, self.update == "inline"
        rescored = guidance is not None and guidance.accept_reject
        ends = self.finish or steps - 1 in trained
        forwards, input_gradients, pictures, finished, known = 0, 0, 0, int(ends), False
        penalised = self.penalised_between(steps, trained)
        for k in range(steps if self.finish else max(trained) + 1):
            branching = k in trained
            # The walk's own evaluation; a graph for the loss needs a new one even where a score left one without.
            forwards += not known or (inline and (branching or k in penalised))
            known = False
            forwards += k in penalised  # reference
            if branching:
                forwards += 1  # reference
                ahead = None if self.step_reward == "predicted" else self.step_reward
                left, count = steps - k - 1, self.candidates
                if ahead is None or not left:
                    pictures += count + rescored
                else:
                    forwards += count * ahead.evaluations(left)
                    pictures += count * ahead.ends
                    finished += count * ahead.finished(left)
                if left:  # finished latents are scored without the network
                    forwards += count + rescored
                    known = guidance is None or rescored or self.continue_from != "winner"
                    input_gradients += guidance is not None and guidance.jacobian == "full"
        epochs, samples = 1 if inline else self.inner_epochs, len(trained) + len(penalised)
        return Cost(
            forwards=forwards + (0 if inline else epochs * samples),
            backwards=epochs * samples,
            input_gradients=input_gradients,
            reward_queries=pictures + ends,
            finished=finished,
            references=samples,
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
    ) -> Iterator[Pair | KLStep]:
        """Walk the trajectories to the end and yield the ranked candidates of each at every trained step, and the KL
        of the other steps that are penalised.

        Under an inline update a pair carries the graph of its step: run the loss and its backward before asking for
        the next.
        """
        penalised = self.penalised_between(policy.schedule.steps, trained)
        measured = self.kl_measured > 0 and self.finish  # a part of a trajectory has no KL to log
        inline = self.update == "inline"
        for at in rollout_branches(
            policy,
            trajectories,
            noise=noise,
            trained=trained,
            candidates=self.candidates,
            score=score,
            graph=lambda k: inline and (k in trained or k in penalised),
            gradient="none" if self.guidance is None else self.guidance.jacobian,
            step_reward=self.step_reward,
            finish=self.finish,
            on_step=on_step,
        ):
            sample: Pair | KLStep | None = None
            density = at.step.gaussian.std > 0  # the last step of some schedulers has none
            if isinstance(at, Branch):
                sample = rank(self, policy, at, trajectories, score=score, noise=noise)
                trajectories.go_on(sample.next_latents, sample.next_step)
            elif at.k in penalised and density:
                sample = penalised_step(policy, trajectories, at, graph=inline)
            if measured and density:
                note_kl(policy, trajectories, at, known=sample.kl if sample else None)
            if sample:
                yield sample
            del at, sample  # let go of the graph before the walk goes on

    def prepare(
        self, stored: Sequence[StoredSample], memory: dict[str, list[float]], gather: Gather = alone
    ) -> Sequence[StoredSample]:
        """Nothing: a pair is labelled when it is drawn."""
        return stored

    def loss(self, policy: Policy, sample: Pair | KLStep | StoredSample) -> Tensor:
        """The objective of each row, (B,), from the graph that the rollout left or from a new evaluation of x_k.

        It is zero for candidates without an order; penalties of the KL, if there are any, are added to all of them.
        """
        gaussian = current_step(policy, sample)
        if isinstance(sample, KLStep | StoredKLStep):
            return self.kl_penalty * gaussian.kl(sample.reference)
        loss = self._objective(policy, sample, gaussian)
        loss = torch.where(sample.valid, loss, torch.zeros_like(loss))
        if self.kl_penalty and sample.reference is not None:
            loss = loss + self.kl_penalty * gaussian.kl(sample.reference)
        if self.gated_kl and isinstance(sample, Pair):
            loss = loss + self.gated_kl * gated_kl(sample, gaussian)
        return loss

    def _objective(self, policy: Policy, pair: Pair | StoredRanking, gaussian: GaussianStep) -> Tensor:
        if self.beta == "auto":
            raise ValueError("beta: auto stands for a number that `control.adapted` puts in its place for an update")
        weight = 1.0
        if self.step_weights == "normalised":
            weight = policy.sampler.noise_weight(policy.schedule, pair.k, kind=policy.model.prediction_type)
        beta = self.beta / weight
        if isinstance(pair, Group | StoredGroups):
            return plackett_luce(group_scores(policy, pair, gaussian), beta=beta, targets=pair.targets)
        if isinstance(pair, CandidatePair | StoredCandidates):
            scale = loser_scale(gaussian, pair.winner, pair.loser)
            return dpo(guarded(*candidate_log_ratios(pair, gaussian), scale), beta=beta)
        logit = logit_of(policy, pair, gaussian)
        if self.objective == "ipo":
            return ipo(logit / weight, beta=self.beta, probability=pair.probability)
        if self.labels == "soft" or self.label_smoothing:
            return soft_dpo(logit, beta=beta, probability=pair.probability)
        return dpo(logit, beta=beta)
