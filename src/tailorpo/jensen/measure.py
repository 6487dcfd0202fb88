"""The measurement: state after state, each finished (step, group of states) on the disk before the next begins.

A unit is a group of states at one step. What a unit draws depends on the seed and on the number of the state alone, so
a stopped measurement goes on with the numbers that it would have had, and more states or other steps later add to what
is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tailorpo.experiments.measurement import Lines
from tailorpo.jensen.posterior import posterior
from tailorpo.jensen.settings import Sizes
from tailorpo.jensen.siblings import Walk, scores, sibling_values, walk
from tailorpo.noise import Noise
from tailorpo.policy import Policy
from tailorpo.step_rewards import Score
from tailorpo.train import Reporter

Row = dict[str, Any]
WALK = -1
"""Stands for the step of a row that holds the end of a trajectory."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is measured.

    Attributes:
        policy: the model under the run's sampler.
        prompts: state i has prompt i modulo their number.
        rewards: by name.
        differentiable: the names of those that have a gradient.
        seed: of every random number.
    """

    policy: Policy
    prompts: Sequence[str]
    rewards: Mapping[str, Score]
    differentiable: Sequence[str]
    seed: int

    @cached_property
    def plain(self) -> Policy:
        """The same without guidance."""
        return Policy(self.policy.model, replace(self.policy.sampler, guidance_scale=1.0))

    def walk(self, part: str, states: Sequence[int]) -> Walk:
        """The trajectories of some states."""
        prompts = [self.prompts[state % len(self.prompts)] for state in states]
        policy = self.plain if part == "posterior" else self.policy
        keys: list[tuple[int | str, ...]] = [("jensen", part, state) for state in states]
        return walk(policy, prompts, noise=Noise(self.seed), keys=keys)


def measured_steps(policy: Policy, steps: Sequence[int]) -> tuple[int, ...]:
    """Those that draw siblings at all: a step without noise (the last of some models, or eta 0) does not."""
    return tuple(k for k in steps if policy.sampler.std(policy.schedule, k) > 0)


def measure(subject: Subject, sizes: Sizes, steps: Sequence[int], *, lines: Lines, reporter: Reporter) -> None:
    """Measure what is not among the lines yet and add it to them.

    Args:
        subject: model, rewards, prompts.
        sizes: how much.
        steps: which, as `measured_steps` leaves them.
        lines: what is measured already.
        reporter: hears of the progress, in states times steps.
    """
    open_ = [k for k in steps if k < subject.policy.schedule.steps - 1]
    parts = (
        ("pairs", "ranking siblings", steps, sizes.states, sizes.group),
        ("posterior", "posterior variance, without guidance", open_, sizes.plain_states, sizes.plain_group),
    )
    for part, words, wanted, states, group in parts:
        if not states:
            continue
        reporter.phase(words)
        total, done = states * (1 + len(wanted)), 0
        for first in range(0, states, group):
            members = range(first, min(first + group, states))
            for rows in _units(subject, sizes, part, members, wanted, lines=lines):
                for row in rows:
                    lines.add(row)
                done += len(members)
                reporter.step(done, total)


def _units(
    subject: Subject, sizes: Sizes, part: str, states: range, steps: Sequence[int], *, lines: Lines
) -> Iterator[list[Row]]:
    """The rows of one group of states that are missing, a list for every unit; empty for what is there."""
    known = {(row["k"], row["state"]) for row in lines.rows if row["part"] == part}
    walked: Walk | None = None
    for k in (WALK, *steps):
        missing = [state for state in states if (k, state) not in known]
        if not missing:
            yield []
            continue
        # A unit is measured whole even if some of it is known: its batch decides the last digits.
        walked = walked or subject.walk(part, states)
        if k == WALK:
            values = _ends(subject, walked)
        elif part == "pairs":
            values = _pairs(subject, sizes, walked, k)
        else:
            values = _posterior(subject, sizes, walked, k)
        rows = zip(states, walked.prompts, values, strict=True)
        yield [
            {"part": part, "k": k, "state": state, "prompt": prompt, **value}
            for state, prompt, value in rows
            if state in missing
        ]


@torch.no_grad()
def _ends(subject: Subject, walked: Walk) -> list[Row]:
    pictures = subject.policy.model.decode(walked.latents[-1])
    found = scores(subject.rewards, pictures, walked.prompts, time=None)
    return [
        {"rewards": {name: float(values[i]) for name, values in zip(subject.rewards, found, strict=True)}}
        for i in range(len(walked.prompts))
    ]


def _pairs(subject: Subject, sizes: Sizes, walked: Walk, k: int) -> list[Row]:
    found = sibling_values(
        subject.policy,
        walked,
        k=k,
        rewards=subject.rewards,
        noise=Noise(subject.seed),
        continuations=sizes.continuations,
        ahead=sizes.lookahead,
        batch=sizes.batch,
    )
    return [
        {
            "rewards": {
                name: {
                    "guess": value.guess[i].tolist(),
                    "ahead": value.ahead[i].tolist(),
                    "ends": value.ends[i].tolist(),
                }
                for name, value in found.items()
            }
        }
        for i in range(len(walked.prompts))
    ]


def _posterior(subject: Subject, sizes: Sizes, walked: Walk, k: int) -> list[Row]:
    """The state whose clean picture step k's siblings are scored by is x_{k+1}."""
    found = posterior(
        subject.plain,
        walked,
        k=k + 1,
        rewards=subject.rewards,
        differentiable=subject.differentiable,
        noise=Noise(subject.seed),
        probes=sizes.probes,
    )
    return [
        {
            "trace": found.trace[:, i].tolist(),
            "denoising": float(found.denoising[i]),
            "increments": float(found.increments[i]),
            "guess": {name: float(values[i]) for name, values in found.guess.items()},
            "local": {name: _numbers(vars(local), i) for name, local in found.local.items()},
        }
        for i in range(len(walked.prompts))
    ]


def _numbers(tensors: Mapping[str, Tensor], index: int) -> dict[str, float]:
    return {name: float(values[index]) for name, values in tensors.items()}
