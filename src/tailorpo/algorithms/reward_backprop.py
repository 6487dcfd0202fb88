"""Reward backpropagation: the gradient of the final reward through the last denoising steps.

    L = -r(c, decode(x_K)),   x_{k+1} = mean_theta(x_k) + std z,   differentiated through the last `last_steps` steps

DRaFT-K (Clark et al. 2024, arXiv 2309.17400) truncates at a fixed number of steps, AlignProp (Prabhudesai et al. 2023,
arXiv 2310.03739) at a random one (`truncation: random`, uniform in 1..last_steps, drawn for every trajectory). It is
the upper reference for rewards with a gradient: TailorPO-G uses the same gradient, but to choose a target for the
policy.

Nothing ties the policy to the model it started from, and no reference is evaluated, so no KL is logged. Memory grows
with `last_steps`.

Left out: DRaFT-LV, which averages several noises of the last step, gradient checkpointing, and AlignProp's early stop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tailorpo.algorithms.base import Cost, Gather, Shown, Stored, Update, alone
from tailorpo.device import sent
from tailorpo.noise import Noise
from tailorpo.policy import Policy
from tailorpo.rollout import Trajectories, step_noise
from tailorpo.samplers import DDIM
from tailorpo.step_rewards import Score


@dataclass(frozen=True)
class Finished:
    """Finished pictures' rewards with their graph, (B,)."""

    k: int
    reward: Tensor

    def __len__(self) -> int:
        return len(self.reward)

    def figures(self) -> dict[str, Tensor]:
        """What there is to log."""
        return {"reward_mean": self.reward, "present": self.reward.isfinite()}

    def shown(self) -> Shown | None:
        """Nothing: no two pictures are compared."""
        return None

    def stored(self, policy: Policy) -> Stored:
        """Impossible: without its graph it is worth nothing."""
        raise NotImplementedError("the gradient of the reward lives in the graph of the rollout; update inline")


@dataclass(frozen=True, kw_only=True)
class RewardBackprop:
    """The `algorithm` section of a run file, and the algorithm.

    Attributes:
        last_steps: how many of the last steps the gradient goes through.
        truncation: "fixed" (DRaFT-K), or "random": a number in 1..last_steps drawn for every trajectory.
    """

    name: Literal["reward_backprop"] = "reward_backprop"
    last_steps: int = 1
    truncation: Literal["fixed", "random"] = "fixed"

    def __post_init__(self) -> None:
        if self.last_steps < 1:
            raise ValueError(f"last_steps must be at least 1, got {self.last_steps}")

    @property
    def update(self) -> Update:
        """The graph is the point."""
        return "inline"

    @property
    def inner_epochs(self) -> int:
        """Every picture once."""
        return 1

    @property
    def minibatch(self) -> int:
        """There is no buffer."""
        return 1

    @property
    def accumulate(self) -> int:
        """There is no buffer."""
        return 1

    @property
    def needs_gradient(self) -> bool:
        """It is all there is."""
        return True

    def problems(self, *, sampler: DDIM, differentiable: bool, trainable: bool) -> list[str]:
        """Everything about this algorithm that cannot work with the rest of the run, in words."""
        # A deterministic sampler (eta 0) is fine here: no density is needed.
        found = (
            [] if trainable else ["model.lora is null: there is nothing to train; set model.lora, or model.full: true"]
        )
        if self.last_steps > sampler.steps:
            found.append(f"algorithm.last_steps must be in 1..{sampler.steps} (sampler.steps), got {self.last_steps}")
        if not differentiable:
            found.append(
                "algorithm.name is reward_backprop, which needs the gradient of the reward, and this reward is not"
                " differentiable; use tailorpo, d3po or ddpo, or a differentiable reward"
            )
        return found

    def trained_steps(self, steps: int, *, noise: Noise, update: int) -> tuple[int, ...]:
        """The last one: the loss is one number per trajectory."""
        return (steps - 1,)

    def cost(self, steps: int, trained: Sequence[int]) -> Cost:
        """What one trajectory costs; at most, where the truncation is random."""
        return Cost(
            forwards=steps,
            backwards=self.last_steps,
            input_gradients=0,
            reward_queries=1,
            picture_gradients=1,
            graphs=self.last_steps,
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
    ) -> Iterator[Finished]:
        """Walk to the end, keep the graph of the last steps, and yield the rewards."""
        depths = [self.last_steps] * len(trajectories)
        if self.truncation == "random":
            depths = [1 + noise.integer(self.last_steps, *key, "truncation") for key in trajectories.keys]
        steps, x = policy.schedule.steps, trajectories.latents
        depth = sent(torch.tensor(depths), x.device).view(-1, 1, 1, 1)
        for k in range(steps):
            with torch.set_grad_enabled(k >= steps - max(depths)):
                step = policy.step(x, k, trajectories.cond)
                x = step.gaussian.sample(step_noise(noise, trajectories, k, like=x))
                x = torch.where(depth >= steps - k, x, x.detach())
            if on_step:
                on_step(k + 1)
        with torch.enable_grad():
            pictures = policy.model.decode(x)
            reward = score(pictures, trajectories.prompts)
        present = reward.isfinite().view(-1, 1, 1, 1)

        def only_present(gradient: Tensor) -> Tensor:
            # Zero times the gradient of a missing reward may be NaN, and would reach every parameter.
            return torch.where(present, gradient, torch.zeros_like(gradient))

        pictures.register_hook(only_present)
        trajectories.latents, trajectories.reward = x.detach(), reward.detach()
        yield Finished(steps - 1, reward)

    def prepare(
        self, stored: Sequence[Stored], memory: dict[str, list[float]], gather: Gather = alone
    ) -> Sequence[Stored]:
        """Nothing is stored."""
        return stored

    def loss(self, policy: Policy, sample: Finished) -> Tensor:
        """Minus the reward of each row, (B,); zero where there is none."""
        present = sample.reward.isfinite()
        return torch.where(present, -sample.reward, torch.zeros_like(sample.reward))
