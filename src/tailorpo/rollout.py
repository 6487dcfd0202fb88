"""Sampling: two visible loops over the denoising steps.

`walk_chains` draws one latent per step: plain sampling. `rollout_branches` draws several candidates from the same
x_k at the trained steps, scores them, and continues from where its consumer wants it to.

What a branching rollout costs, in guided network evaluations of one latent (F): K_all for the walk, and at each
trained step one for every candidate but the chosen, whose evaluation is the next step's. The walk's own evaluation at
a trained step carries the graph of the loss, so the loss needs none. Where two trained steps follow each other, the
second is evaluated anew, because a score carries no graph. Latents after the last step are scored as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tailorpo.device import sent
from tailorpo.errors import UserError
from tailorpo.futures import Draw, StepReward
from tailorpo.models import Conditioning
from tailorpo.noise import Key, Noise
from tailorpo.policy import Policy, PolicyStep
from tailorpo.rewards.ensemble import GapScales
from tailorpo.step_rewards import GradientPath, Score, Scored, score_latents


@dataclass
class Trajectories:
    """A batch of trajectories on their way from noise to picture; a rollout advances `latents` in place.

    Attributes:
        prompts: the B prompts.
        cond: the same, encoded.
        keys: the noise stream of each trajectory; nothing else decides what it draws.
        latents: the current x_k, (B, C, h, w) float32.
        step: the policy's step from there, without a graph, where it is known already.
        finished: whether `latents` are those of pictures: a rollout may end with its last trained step.
        reward: of the finished pictures, (B,), where a method has scored them; NaN where it finished none.
        members: the same of each member of an ensemble, by name.
        gaps: the running gaps between siblings at each step, for a method whose labels depend on them.
        measured: of how many trajectories, the first ones, the KL to the base model is wanted at every step.
        kl: what a method knows of that KL: by step, in nats, (n,) with the measured trajectories first.
    """

    prompts: Sequence[str]
    cond: Conditioning
    keys: Sequence[tuple[Key, ...]]
    latents: Tensor
    step: PolicyStep | None = None
    finished: bool = False
    reward: Tensor | None = None
    members: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    gaps: GapScales | None = None
    measured: int = 0
    kl: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    def __len__(self) -> int:
        return len(self.prompts)

    def go_on(self, latents: Tensor, step: PolicyStep | None = None) -> None:
        """Make `latents` the current ones, whose step is `step`, if that is known already."""
        self.latents, self.step = latents, step


def start_trajectories(
    policy: Policy, prompts: Sequence[str], *, noise: Noise, keys: Sequence[tuple[Key, ...]]
) -> Trajectories:
    """Trajectories at x_0, drawn from each key's own stream."""
    model = policy.model
    initial = sent(noise.normals(model.latent_shape, keys, "initial"), model.device)
    return Trajectories(prompts, model.encode(prompts), keys, initial)


@dataclass(frozen=True)
class ChainStep:
    """One step of plain sampling: from `latents`, x_k (B, C, h, w), to `next_latents` by the Gaussian of `step`."""

    k: int
    latents: Tensor
    step: PolicyStep
    next_latents: Tensor


def walk_chains(
    policy: Policy,
    trajectories: Trajectories,
    *,
    noise: Noise,
    graph: Callable[[int], bool] = lambda k: False,
    on_step: Callable[[int], None] | None = None,
) -> Iterator[ChainStep]:
    """Sample to the end and yield every step; `graph` says at which steps the network's graph is kept.

    The graph of one step does not reach into the step before: every x_k is a constant.
    """
    for k in range(policy.schedule.steps):
        x = trajectories.latents
        with torch.set_grad_enabled(graph(k)):
            step = policy.step(x, k, trajectories.cond)
        with torch.no_grad():
            drawn = step.gaussian.sample(step_noise(noise, trajectories, k, like=x))
        trajectories.go_on(drawn)
        trajectories.finished = k + 1 == policy.schedule.steps
        yield ChainStep(k, x, step, drawn)
        if on_step:
            on_step(k + 1)


def rollout_chains(
    policy: Policy, trajectories: Trajectories, *, noise: Noise, on_step: Callable[[int], None] | None = None
) -> Tensor:
    """Sample to the end and return the finished latents, (B, C, h, w)."""
    for _ in walk_chains(policy, trajectories, noise=noise, on_step=on_step):
        pass
    return trajectories.latents


@torch.no_grad()
def sample_images(
    policy: Policy,
    prompts: Sequence[str],
    *,
    noise: Noise,
    keys: Sequence[tuple[Key, ...]],
    batch_size: int = 8,
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """Finished pictures, (N, 3, H, W) in [0, 1]; picture i depends on prompts[i] and keys[i], not on its batch.

    `on_batch` is called with the number of pictures finished so far.
    """
    pictures: list[Tensor] = []
    for first in range(0, len(prompts), batch_size):
        rows = slice(first, first + batch_size)
        trajectories = start_trajectories(policy, prompts[rows], noise=noise, keys=keys[rows])
        pictures.append(policy.model.decode(rollout_chains(policy, trajectories, noise=noise)))
        if on_batch:
            on_batch(first + len(trajectories))
    return torch.cat(pictures)


@dataclass(frozen=True)
class Branch:
    """Candidates drawn from the same x_k.

    Attributes:
        k: the step.
        latents: x_k, (B, C, h, w).
        step: the policy's step from x_k, with its graph if the rollout was asked for one.
        noises: what made the candidates, (n, B, C, h, w).
        scored: the candidates, row j * B + b is candidate j of trajectory b.
    """

    k: int
    latents: Tensor
    step: PolicyStep
    noises: Tensor
    scored: Scored

    def random_rows(self, noise: Noise, trajectories: Trajectories) -> Tensor:
        """The row among the candidates of one drawn for each trajectory, (B,)."""
        count, batch = self.noises.shape[:2]
        draws = [noise.integer(count, *key, "step", self.k, "continue") for key in trajectories.keys]
        return sent(torch.tensor(draws) * batch + torch.arange(batch), self.latents.device)


def rollout_branches(
    policy: Policy,
    trajectories: Trajectories,
    *,
    noise: Noise,
    trained: Collection[int],
    candidates: int,
    score: Score,
    graph: Callable[[int], bool] = lambda k: False,
    gradient: GradientPath = "none",
    finish: bool = True,
    step_reward: StepReward = "predicted",
    on_step: Callable[[int], None] | None = None,
) -> Iterator[Branch | ChainStep]:
    """Sample to the end and yield every step: a branch at the trained ones, whose consumer says by
    `trajectories.go_on` where the walk goes on, and a step of plain sampling at the others.

    Args:
        policy: the model under its sampler.
        trajectories: where to start; advanced in place.
        noise: the run's random numbers.
        trained: the steps at which to branch.
        candidates: how many to draw there.
        score: the reward of (pictures, prompts).
        graph: at which steps the graph of the step from x_k is kept, so that a loss can use it; it lives until the
            consumer lets go of what was yielded, so memory does not grow with the number of steps.
        gradient: whether the scores come with their gradient.
        finish: walk on to the picture after the last trained step.
        step_reward: what the candidates are scored by.
        on_step: called with the number of steps done.

    Raises:
        UserError: a trained step has no noise and so no density.
    """
    steps, cond = policy.schedule.steps, trajectories.cond
    for k in trained:
        if policy.sampler.std(policy.schedule, k) == 0:
            raise UserError(_no_density(k))
    for k in range(steps if finish else max(trained) + 1):
        x, step = trajectories.latents, trajectories.step
        with torch.set_grad_enabled(graph(k)):
            if step is None or graph(k):
                step = policy.step(x, k, cond)
        trajectories.finished = k + 1 == steps
        if k in trained:
            noises = torch.stack(
                [step_noise(noise, trajectories, k, "candidate", j, like=x) for j in range(candidates)]
            )
            scored = score_latents(
                policy,
                step.detach().gaussian.sample(noises).flatten(0, 1),
                k=k + 1,
                cond=cond.repeat(candidates),
                prompts=[*trajectories.prompts] * candidates,
                score=score,
                gradient=gradient,
                siblings=candidates,
                step_reward=step_reward,
                draw=_futures(noise, trajectories, k, like=x),
            )
            yield Branch(k, x, step, noises, scored)
        else:
            drawn = step.detach().gaussian.sample(step_noise(noise, trajectories, k, like=x))
            trajectories.go_on(drawn)
            yield ChainStep(k, x, step, drawn)
        del step
        if on_step:
            on_step(k + 1)


def _no_density(k: int) -> str:
    return (
        f"step {k} cannot be trained: it adds no noise, because the model's scheduler ends at the clean latent"
        " (set_alpha_to_one); leave it out of algorithm.train_steps"
    )


def _futures(noise: Noise, trajectories: Trajectories, k: int, *, like: Tensor) -> Draw:
    """The noises of continuations of step k's candidates, which all candidates of a trajectory share."""
    return lambda number, step: step_noise(noise, trajectories, k, "future", number, step, like=like)


def step_noise(noise: Noise, trajectories: Trajectories, k: int, *suffix: Key, like: Tensor) -> Tensor:
    """The noise of step k, (B, *like.shape[1:]), from each trajectory's own stream."""
    return sent(noise.normals(like.shape[1:], trajectories.keys, "step", k, *suffix), like.device)
