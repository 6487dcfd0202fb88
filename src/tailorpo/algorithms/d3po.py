"""D3PO (Yang et al. 2024, arXiv 2311.13231): preferences between whole trajectories, trained on every step.

Two chains start from the same x_0 and draw their own noise afterwards. The reward of the finished pictures names the
winner, and that label goes to every step of both chains, whose inputs differ by then:

    L_k = -log sigmoid(beta [rho(x^w_{k+1} | x^w_k) - rho(x^l_{k+1} | x^l_k)]),  rho = log clamp(pi / pi_ref, 1 +- clip)

As in the official code the log-ratio is the MEAN over the D dimensions of a latent (`reduction: mean`), with beta 0.1
and clip 0.1. Then |beta (rho_w - rho_l)| <= 0.1 (log 1.1 - log 0.9) = 0.020: the loss cannot leave [0.683, 0.703],
the sigmoid is as good as linear, Adam divides beta out, and a branch outside the clamp has no gradient, in either
direction.
`reduction: sum` is the density's own log-ratio, in nats.

Because the inputs differ, the gradient holds mu(x^l) - mu(x^w) beside the difference that was labelled (TailorPO's
Eq. 8); `tailorpo experiment gradient-direction` measures what that does.

Left out: the official code's second copy of the network (the adapter is switched off instead), its half-precision
buffer of latents, rewards that are vectors (compared by Pareto dominance there), the human in the loop, and a last step
without noise (schedulers with `set_alpha_to_one`), which has no density.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor

from tailorpo.algorithms.base import Cost, Gather, Shown, Update, alone, check_counts, common_problems
from tailorpo.gaussian_step import GaussianStep
from tailorpo.models import Conditioning
from tailorpo.noise import Noise
from tailorpo.objectives import clamp_log_ratio, dpo
from tailorpo.policy import Policy, PolicyStep
from tailorpo.rewards.ensemble_scorer import Comparison
from tailorpo.rollout import Trajectories, walk_chains
from tailorpo.samplers import DDIM
from tailorpo.step_rewards import Score, compare

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class ChainPair:
    """Step k of two chains per prompt, the winner's in column 0.

    Latents, next latents and the reference's means are (B, 2, C, h, w); rewards, log-ratios (nats of the sum) and KL
    at collection are (B, 2). `step` holds the graph of the rollout, rows winner 0..B-1 then loser 0..B-1, or nothing.
    `pictures` are the finished ones, at the last trained step only; `members` what the members of an ensemble said.
    """

    k: int
    prompts: Sequence[str]
    cond: Conditioning
    latents: Tensor
    next_latents: Tensor
    reference_mean: Tensor
    reward: Tensor
    log_ratio: Tensor
    kl: Tensor
    step: PolicyStep | None
    pictures: Tensor | None
    members: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def present(self) -> Tensor:
        """Pairs with two rewards, (B,)."""
        return self.reward.isfinite().all(dim=1)

    @property
    def tie(self) -> Tensor:
        """Pairs with two equal rewards, which do not train, (B,)."""
        return self.present & (self.reward[:, 0] == self.reward[:, 1])

    def figures(self) -> dict[str, Tensor]:
        """What there is to log; `accuracy` as for TailorPO, of log-ratios under their own inputs."""
        winner, loser = self.log_ratio.unbind(1)
        return {
            "reward_winner": self.reward[:, 0],
            "reward_loser": self.reward[:, 1],
            "reward_mean": self.reward.mean(dim=1),
            "gap": self.reward[:, 0] - self.reward[:, 1],
            "log_ratio_winner": winner,
            "log_ratio_loser": loser,
            "kl": self.kl.mean(dim=1),
            "accuracy": (torch.sign(winner - loser) + 1) / 2,
            **self.members,
            "present": self.present,
            "tie": self.tie,
        }

    def shown(self) -> Shown | None:
        """The finished pictures."""
        if self.pictures is None:
            return None
        winner, loser = self.pictures.unbind(1)
        nobody = torch.zeros(len(self), dtype=torch.bool)
        return Shown(self.prompts, winner, loser, self.reward[:, 0], self.reward[:, 1], guided=nobody)

    def stored(self, policy: Policy) -> ChainPair:
        """The same without graph and pictures."""
        return replace(self, step=None, pictures=None)

    def rows(self, index: Tensor) -> ChainPair:
        """A selection of the batch."""
        return replace(
            self,
            prompts=[self.prompts[i] for i in cast(list[int], index.tolist())],
            cond=self.cond.rows(index),
            latents=self.latents[index],
            next_latents=self.next_latents[index],
            reference_mean=self.reference_mean[index],
            reward=self.reward[index],
            log_ratio=self.log_ratio[index],
            kl=self.kl[index],
            members={name: each[index] for name, each in self.members.items()},
        )


@dataclass(frozen=True, kw_only=True)
class D3PO:
    """The `algorithm` section of a run file, and the algorithm.

    Attributes:
        beta: strength of the tie to the reference; of the mean over dimensions or of the sum, by `reduction`.
        reduction: "mean" as in the official code, or "sum", the log-ratio of the densities.
        clip: the ratio pi / pi_ref is clamped to 1 - clip .. 1 + clip, after the reduction; null for no clamp.
        ranking: "trajectory", the finished pictures label every step; "step", each pair of steps is labelled by the
            rewards of the predicted clean pictures of its two x_{k+1} (TailorPO's Eq. 12), although their inputs
            differ: half of the way to TailorPO, for its ablation.
        update: "buffered", the official schedule: 40 forwards of sampling, 40 of the reference and 40 of the policy
            with 40 backwards per pair of 20 steps; "inline" keeps the sampling graph of all steps instead of the last
            40 forwards, in memory that grows with the number of steps.
        inner_epochs: passes over the buffer.
        minibatch: pairs of a minibatch of the buffered update.
        accumulate: minibatches whose gradients make one optimizer step.
    """

    name: Literal["d3po"] = "d3po"
    beta: float = 0.1
    reduction: Reduction = "mean"
    clip: float | None = 0.1
    ranking: Literal["trajectory", "step"] = "trajectory"
    update: Update = "buffered"
    inner_epochs: int = 1
    minibatch: int = 8
    accumulate: int = 20

    def __post_init__(self) -> None:
        check_counts(self)
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if self.clip is not None and not 0 < self.clip < 1:
            raise ValueError(f"clip must be between 0 and 1, got {self.clip}")

    @property
    def needs_gradient(self) -> bool:
        """The reward only labels."""
        return False

    def problems(self, *, sampler: DDIM, differentiable: bool, trainable: bool) -> list[str]:
        """Everything about this algorithm that cannot work with the rest of the run, in words."""
        return common_problems(sampler=sampler, trainable=trainable, update=self.update, inner_epochs=self.inner_epochs)

    def trained_steps(self, steps: int, *, noise: Noise, update: int) -> tuple[int, ...]:
        """Every step."""
        return tuple(range(steps))

    def cost(self, steps: int, trained: Sequence[int]) -> Cost:
        """What one pair of chains costs."""
        again = self.inner_epochs if self.update == "buffered" else 0
        return Cost(
            forwards=2 * steps + 2 * len(trained) * (1 + again),
            backwards=2 * len(trained) * self.inner_epochs,
            input_gradients=0,
            reward_queries=2 + (2 * sum(k + 1 < steps for k in trained) if self.ranking == "step" else 0),
            references=2 * len(trained),
            scored_rows=2,
            graph_rows=2,
            graphs=1 if self.update == "buffered" else len(trained),
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
    ) -> Iterator[ChainPair]:
        """Walk two chains per trajectory to the end, then yield every step of both with the label of the end."""
        batch, inline = len(trajectories), self.update == "inline"
        both = Trajectories(
            [*trajectories.prompts] * 2,
            trajectories.cond.repeat(2),
            [*trajectories.keys, *((*key, "rival") for key in trajectories.keys)],
            trajectories.latents.repeat(2, 1, 1, 1),
        )
        walk = walk_chains(policy, both, noise=noise, graph=lambda k: inline and k in trained, on_step=on_step)
        walked = list(walk)
        clean = [each.step.x0.detach() for each in walked] if self.ranking == "step" else []
        chain = [each for each in walked if each.k in trained and each.step.gaussian.std > 0]
        del walked
        with torch.no_grad():
            pictures = policy.model.decode(both.latents)
            finished = compare(score, pictures, both.prompts, siblings=2, time=None)
        trajectories.reward, trajectories.members = finished.total, finished.members
        rows = torch.arange(batch, device=pictures.device)

        def ordered(label: Tensor) -> Tensor:
            order = label.view(2, batch).nan_to_num(nan=-torch.inf)
            winner = (order[1] > order[0]).long()
            return torch.cat([winner * batch + rows, (1 - winner) * batch + rows])

        def label(k: int) -> Comparison:
            """What ranks step k; the walk's next evaluation has predicted the clean latents of x_{k+1}."""
            if self.ranking == "trajectory" or k + 1 == policy.schedule.steps:
                return finished
            with torch.no_grad():
                time = int(policy.schedule.time[k + 1])
                return compare(score, policy.model.decode_draft(clean[k + 1]), both.prompts, siblings=2, time=time)

        def paired(x: Tensor) -> Tensor:
            return x[sides].view(2, batch, *x.shape[1:]).transpose(0, 1)

        while chain:
            at = chain.pop(0)
            compared = label(at.k)
            sides = ordered(compared.reward)
            reference = policy.reference_step(at.latents, at.k, both.cond)
            gaussian = at.step.detach().gaussian
            yield ChainPair(
                k=at.k,
                prompts=trajectories.prompts,
                cond=trajectories.cond,
                latents=paired(at.latents),
                next_latents=paired(at.next_latents),
                reference_mean=paired(reference.mean),
                reward=paired(compared.reward),
                log_ratio=paired(gaussian.log_ratio(at.next_latents, reference)),
                kl=paired(gaussian.kl(reference)),
                step=at.step.rows(sides) if inline else None,
                pictures=None if chain else paired(pictures),
                members=compared.figures(*sides.view(2, batch)),
            )
            del at

    def prepare(
        self, stored: Sequence[ChainPair], memory: dict[str, list[float]], gather: Gather = alone
    ) -> Sequence[ChainPair]:
        """Nothing: the pair knows its winner."""
        return stored

    def loss(self, policy: Policy, pair: ChainPair) -> Tensor:
        """The loss of each pair at its step, (B,); zero where it has no order."""
        step = pair.step or policy.step(_sides(pair.latents), pair.k, pair.cond.repeat(2))
        reference = GaussianStep(_sides(pair.reference_mean), step.gaussian.std)
        log_ratio = step.gaussian.log_ratio(_sides(pair.next_latents), reference)
        if self.reduction == "mean":
            log_ratio = log_ratio / math.prod(pair.latents.shape[2:])
        if self.clip is not None:
            log_ratio = clamp_log_ratio(log_ratio, clip=self.clip)
        winner, loser = log_ratio.view(2, len(pair))
        loss = dpo(winner - loser, beta=self.beta)
        return torch.where(pair.present & ~pair.tie, loss, torch.zeros_like(loss))


def _sides(x: Tensor) -> Tensor:
    """(B, 2, ...) -> (2B, ...), winners first."""
    return x.transpose(0, 1).flatten(0, 1)
