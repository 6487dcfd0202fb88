"""Siblings, their step rewards, and what becomes of them.

Two x_{k+1} are drawn from one x_k. Their truth is the mean reward at the ends of n continuations by the run's own
sampler. The i-th continuation of both siblings has the same noises: what matters is the difference of the two truths,
and most of the noise cancels in it.

    step reward   r(decode(x0hat(x_{k+1})))                                   1 evaluation
    lookahead     r of the picture predicted m deterministic steps ahead      m more (`futures.Lookahead`)
    continuation  r at the end of the K - k - 1 steps that are left           K - k - 1 evaluations

The evaluation of a sibling is shared: x0hat, the first step of the lookahead and that of all continuations come from
it. Siblings after the last step are finished pictures, whose step reward is the truth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tailorpo.device import sent
from tailorpo.futures import Lookahead
from tailorpo.models import Conditioning
from tailorpo.noise import Key, Noise
from tailorpo.policy import Policy, PolicyStep
from tailorpo.rollout import start_trajectories, walk_chains
from tailorpo.step_rewards import Score, compare

Keys = Sequence[tuple[Key, ...]]


@dataclass(frozen=True)
class Walk:
    """Trajectories with everything on the way kept.

    Attributes:
        prompts: the S prompts.
        cond: the same, encoded.
        keys: their noise streams.
        latents: x_0 .. x_K, (S, C, h, w) each.
        steps: the policy's step from each but the last, without a graph.
    """

    prompts: Sequence[str]
    cond: Conditioning
    keys: Keys
    latents: Sequence[Tensor]
    steps: Sequence[PolicyStep]


@dataclass(frozen=True)
class SiblingValues:
    """Rewards of S pairs of siblings.

    Attributes:
        guess: step rewards, (S, 2) float64.
        ahead: after the lookahead, (S, 2).
        ends: of the finished continuations, (S, 2, n); (S, 2, 1) after the last step.
    """

    guess: Tensor
    ahead: Tensor
    ends: Tensor


@torch.no_grad()
def walk(policy: Policy, prompts: Sequence[str], *, noise: Noise, keys: Keys) -> Walk:
    """Plain sampling from start to end."""
    start = start_trajectories(policy, prompts, noise=noise, keys=keys)
    latents, steps = [start.latents], list[PolicyStep]()
    for taken in walk_chains(policy, start, noise=noise):
        latents.append(taken.next_latents)
        steps.append(taken.step)
    return Walk(prompts, start.cond, keys, latents, steps)


def scores(rewards: Mapping[str, Score], pictures: Tensor, prompts: Sequence[str], *, time: int | None) -> Tensor:
    """All rewards of pictures (B, 3, H, W), (rewards, B) float64 on the CPU; `time` as in `step_rewards.compare`."""
    values = [compare(score, pictures, prompts, siblings=1, time=time).reward for score in rewards.values()]
    return torch.stack([value.double().cpu() for value in values])


@torch.no_grad()
def sibling_values(
    policy: Policy,
    walked: Walk,
    *,
    k: int,
    rewards: Mapping[str, Score],
    noise: Noise,
    continuations: int,
    ahead: int,
    batch: int,
) -> dict[str, SiblingValues]:
    """Draw the siblings of step k from every trajectory and value them by every reward.

    Args:
        policy: the model under the run's sampler.
        walked: where they come from.
        k: the step.
        rewards: by name.
        noise: the run's random numbers.
        continuations: of each sibling.
        ahead: deterministic steps of the lookahead.
        batch: latents at once.
    """
    states, model, schedule = len(walked.prompts), policy.model, policy.schedule
    shape = walked.latents[k].shape[1:]
    drawn = [noise.normals(shape, walked.keys, "step", k, "candidate", j) for j in (0, 1)]
    # Row j * S + s is sibling j of state s.
    siblings = walked.steps[k].gaussian.sample(sent(torch.stack(drawn), model.device)).flatten(0, 1)
    prompts, cond = [*walked.prompts] * 2, walked.cond.repeat(2)
    if k == schedule.steps - 1:
        final = scores(rewards, model.decode(siblings), prompts, time=None).view(-1, 2, states).transpose(1, 2)
        return {name: SiblingValues(row, row, row[..., None]) for name, row in zip(rewards, final, strict=True)}
    step = policy.step(siblings, k + 1, cond)
    guess = scores(rewards, model.decode_draft(step.x0), prompts, time=int(schedule.time[k + 1]))
    end = Lookahead(lookahead=ahead).look(policy, siblings, step, k=k + 1, cond=cond)
    later = scores(rewards, model.decode_draft(end.clean), prompts, time=end.time)
    ends: list[Tensor] = []
    group = max(1, batch // (2 * states))
    for first in range(0, continuations, group):
        numbers = range(first, min(first + group, continuations))
        keys = [(*key, "future", k, n) for key in walked.keys for n in numbers]
        pictures = _continue(policy, step, cond, k=k + 1, noise=noise, keys=keys, times=len(numbers))
        texts = [prompt for prompt in prompts for _ in numbers]
        ends.append(scores(rewards, pictures, texts, time=None).view(-1, 2, states, len(numbers)))
    # (rewards, 2, S, ...) becomes (S, 2, ...) for each reward.
    finished = torch.cat(ends, dim=-1).transpose(1, 2)
    pairs = [value.view(-1, 2, states).transpose(1, 2) for value in (guess, later)]
    return {name: SiblingValues(*rows) for name, *rows in zip(rewards, *pairs, finished, strict=True)}


def _continue(
    policy: Policy, step: PolicyStep, cond: Conditioning, *, k: int, noise: Noise, keys: Keys, times: int
) -> Tensor:
    """Pictures at the ends of `times` continuations of every row of x_k whose step is given; the two halves of the
    rows, which are the siblings, share the noise of each key."""

    def drawn(at: int, mean: Tensor) -> Tensor:
        return sent(noise.normals(mean.shape[1:], keys, "step", at), mean.device).repeat(2, *[1] * (mean.ndim - 1))

    rows = torch.arange(len(step.x0), device=step.x0.device).repeat_interleave(times)
    gaussian, many = step.rows(rows).gaussian, cond.rows(rows)
    latents = gaussian.sample(drawn(k, gaussian.mean))
    for at in range(k + 1, policy.schedule.steps):
        gaussian = policy.step(latents, at, many).gaussian
        latents = gaussian.sample(drawn(at, gaussian.mean))
    return policy.model.decode(latents)
