"""DDPO-IS (Black et al. 2024, arXiv 2305.13301): the policy gradient of the final reward, with PPO's clipped ratio.

    L_k = max(-A w, -A clamp(w, 1 +- clip)),  w = pi(x_{k+1} | x_k) / pi_old(x_{k+1} | x_k),  A = (r(x_K) - mean) / std

pi_old drew the samples. Mean and std are those of the prompt's latest rewards once there are enough of them, else
those of the update's batch; |A| is limited. As in the official code the log of w is the MEAN over the D dimensions of a
latent (`reduction: mean`), where clip 1e-4 stands for 1e-4 D nats: 1.6 for SD 1.5, 0.08 for the bundled miniature.

No reference is evaluated: nothing ties the policy to the model it started from, and no KL is logged.

Left out: the reward-weighted variant (DDPO-RWR), training on a part of the steps, and a last step without noise
(schedulers with `set_alpha_to_one`), which has no density.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, pstdev
from typing import Literal, cast

import torch
from torch import Tensor

from tailorpo.algorithms.base import Cost, Gather, Shown, Update, alone, check_counts, common_problems
from tailorpo.algorithms.d3po import Reduction
from tailorpo.gaussian_step import GaussianStep
from tailorpo.models import Conditioning
from tailorpo.noise import Key, Noise
from tailorpo.objectives import ppo_clip
from tailorpo.policy import Policy
from tailorpo.rollout import Trajectories, walk_chains
from tailorpo.samplers import DDIM
from tailorpo.step_rewards import Score


@dataclass(frozen=True)
class Transition:
    """Step k of chains that have ended: x_k, x_{k+1} and the mean of the policy that drew it, (B, C, h, w); the reward
    of the finished picture and, once the whole batch is known, its advantage, (B,)."""

    k: int
    prompts: Sequence[str]
    keys: Sequence[tuple[Key, ...]]
    cond: Conditioning
    latents: Tensor
    next_latents: Tensor
    old_mean: Tensor
    reward: Tensor
    advantage: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def figures(self) -> dict[str, Tensor]:
        """What there is to log."""
        return {"reward_mean": self.reward, "present": self.reward.isfinite()}

    def shown(self) -> Shown | None:
        """Nothing: no two pictures are compared."""
        return None

    def stored(self, policy: Policy) -> Transition:
        """Itself: it has no graph."""
        return self

    def rows(self, index: Tensor) -> Transition:
        """A selection of the batch."""
        return replace(
            self,
            prompts=[self.prompts[i] for i in cast(list[int], index.tolist())],
            keys=[self.keys[i] for i in cast(list[int], index.tolist())],
            cond=self.cond.rows(index),
            latents=self.latents[index],
            next_latents=self.next_latents[index],
            old_mean=self.old_mean[index],
            reward=self.reward[index],
            advantage=self.advantage[index],
        )


@dataclass(frozen=True, kw_only=True)
class DDPO:
    """The `algorithm` section of a run file, and the algorithm.

    Attributes:
        clip: the ratio is clamped to 1 - clip .. 1 + clip, after the reduction.
        reduction: "mean" over dimensions as in the official code, or "sum".
        advantage_clip: largest |A|.
        history: how many of a prompt's latest rewards are remembered.
        history_min: with fewer of them the whole batch's mean and std are taken.
        inner_epochs: passes over the buffer.
        minibatch: rows of a minibatch of the buffer.
        accumulate: minibatches whose gradients make one optimizer step.
    """

    name: Literal["ddpo"] = "ddpo"
    clip: float = 1e-4
    reduction: Reduction = "mean"
    advantage_clip: float = 5.0
    history: int = 16
    history_min: int = 16
    inner_epochs: int = 1
    minibatch: int = 8
    accumulate: int = 20

    def __post_init__(self) -> None:
        check_counts(self)
        for name, value in (("clip", self.clip), ("advantage_clip", self.advantage_clip)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 1 <= self.history_min <= self.history:
            raise ValueError(
                f"history_min must be in 1..history, got history_min {self.history_min} and history {self.history}"
            )

    @property
    def update(self) -> Update:
        """Advantages need the whole batch, so samples are stored first."""
        return "buffered"

    @property
    def needs_gradient(self) -> bool:
        """The reward only weighs."""
        return False

    def problems(self, *, sampler: DDIM, differentiable: bool, trainable: bool) -> list[str]:
        """Everything about this algorithm that cannot work with the rest of the run, in words."""
        return common_problems(sampler=sampler, trainable=trainable, update=self.update, inner_epochs=self.inner_epochs)

    def trained_steps(self, steps: int, *, noise: Noise, update: int) -> tuple[int, ...]:
        """Every step."""
        return tuple(range(steps))

    def cost(self, steps: int, trained: Sequence[int]) -> Cost:
        """What one chain costs."""
        again = len(trained) * self.inner_epochs
        return Cost(forwards=steps + again, backwards=again, input_gradients=0, reward_queries=1)

    def collect(
        self,
        policy: Policy,
        trajectories: Trajectories,
        *,
        trained: Sequence[int],
        score: Score,
        noise: Noise,
        on_step: Callable[[int], None] | None = None,
    ) -> Iterator[Transition]:
        """Walk the chains to the end, then yield their steps with the reward of the end."""
        chain = list(walk_chains(policy, trajectories, noise=noise, on_step=on_step))
        with torch.no_grad():
            reward = score(policy.model.decode(trajectories.latents), trajectories.prompts)
        trajectories.reward = reward
        for at in chain:
            if at.k in trained and at.step.gaussian.std > 0:
                yield Transition(
                    k=at.k,
                    prompts=trajectories.prompts,
                    keys=trajectories.keys,
                    cond=trajectories.cond,
                    latents=at.latents,
                    next_latents=at.next_latents,
                    old_mean=at.step.gaussian.mean,
                    reward=reward,
                    advantage=torch.zeros_like(reward),
                )

    def prepare(
        self, stored: Sequence[Transition], memory: dict[str, list[float]], gather: Gather = alone
    ) -> Sequence[Transition]:
        """The same transitions with their advantages among all processes' chains; `memory` keeps each prompt's latest
        rewards.

        A chain without a reward gets advantage 0 and leaves no trace.
        """
        own = {
            key: (prompt, float(reward))
            for each in stored
            for key, prompt, reward in zip(each.keys, each.prompts, each.reward, strict=True)
            if bool(reward.isfinite())
        }
        ends = {key: end for part in gather(own) for key, end in part.items()}
        for prompt, reward in ends.values():
            memory[prompt] = [*memory.get(prompt, []), reward][-self.history :]
        batch = [reward for _, reward in ends.values()]
        moments: dict[str, tuple[float, float]] = {}
        for prompt in {prompt for prompt, _ in ends.values()}:
            known = memory[prompt] if len(memory[prompt]) >= self.history_min else batch
            moments[prompt] = fmean(known), pstdev(known)

        def advantage(prompt: str, reward: float) -> float:
            mean, std = moments[prompt]
            return max(-self.advantage_clip, min(self.advantage_clip, (reward - mean) / (std + 1e-6)))

        advantages = {key: advantage(prompt, reward) for key, (prompt, reward) in ends.items()}
        return [
            replace(each, advantage=each.reward.new_tensor([advantages.get(key, 0.0) for key in each.keys]))
            for each in stored
        ]

    def loss(self, policy: Policy, sample: Transition) -> Tensor:
        """The clipped surrogate of each row, (B,)."""
        gaussian = policy.step(sample.latents, sample.k, sample.cond).gaussian
        log_ratio = gaussian.log_ratio(sample.next_latents, GaussianStep(sample.old_mean, gaussian.std))
        if self.reduction == "mean":
            log_ratio = log_ratio / math.prod(sample.latents.shape[1:])
        return ppo_clip(log_ratio, sample.advantage, clip=self.clip)
