"""One look: the fixed pictures drawn by a model, and their numbers per prompt.

Picture (prompt, seed) comes from the stream ("sentinel", prompt, seed) of the run's seed, at every look the same, so a
difference between two looks comes from the model alone. The KL of a trajectory is measured on the first seed of every
prompt, at one reference evaluation per step. Several processes draw a share of the batches each; the batches are those
of one process, so every process gets the numbers that one would, to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from tailorpo._distributed import Processes
from tailorpo.meter import Meter
from tailorpo.models import DiffusionModel
from tailorpo.noise import Noise
from tailorpo.picture_statistics import edge_energy, flat_share
from tailorpo.policy import Policy
from tailorpo.rollout import start_trajectories
from tailorpo.samplers import DDIM
from tailorpo.sentinels.config import Sentinels
from tailorpo.sentinels.rules import LOW_LEVEL, Look, Values
from tailorpo.statistics import pairwise_distance, plain, vendi_score, within_spread
from tailorpo.trajectory_kl import walk_with_kl


@dataclass(frozen=True)
class Cost:
    """What a look took: guided forwards of one latent, and pictures scored."""

    forwards: int
    pictures: int


@dataclass(frozen=True)
class _Picture:
    prompt: int
    scores: dict[str, float]
    features: Tensor
    kl: list[float] | None


def spread_evenly(prompts: Sequence[str], count: int) -> tuple[str, ...]:
    """`count` prompts from the whole length of the list, or all if there are not more; none twice."""
    different = list(dict.fromkeys(prompts))
    if len(different) <= count:
        return tuple(different)
    return tuple(different[index * len(different) // count] for index in range(count))


@dataclass(frozen=True)
class Probe:
    """Draws and measures.

    Attributes:
        config: the `sentinels` section.
        model: with its adapter.
        sampler: the run's.
        meter: rewards and judge; its scorer counts the pictures on an account of its own.
        prompts: the fixed prompts.
        noise: the run's.
        processes: those that share the pictures.
    """

    config: Sentinels
    model: DiffusionModel
    sampler: DDIM
    meter: Meter
    prompts: tuple[str, ...]
    noise: Noise
    processes: Processes

    def look(self, update: int, *, on_step: Callable[[int, int], None]) -> tuple[Look, Cost]:
        """Measure the model as it is; at update 0 the base model, whatever the adapter holds.

        Raises:
            RewardError: a reward raised, or returned something that is not one number per picture.
        """
        base, counted = update == 0, self.model.evaluations
        policy = Policy(self.model, self.sampler)
        jobs = [(index, seed) for seed in range(self.config.seeds) for index in range(len(self.prompts))]
        size = self.config.batch_size
        batches = self.processes.share([jobs[first : first + size] for first in range(0, len(jobs), size)])
        own: list[_Picture] = []
        with self.model.reference() if base else nullcontext():
            for number, batch in enumerate(batches, start=1):
                own += self._draw(policy, batch, base=base)
                on_step(number, len(batches))
        pictures = [picture for part in self.processes.gather(own) for picture in part]
        evaluations = self.processes.total(policy.evaluations)
        self.model.evaluations = counted  # a look is not training
        cost = Cost(evaluations // self.sampler.evaluations_per_forward, len(pictures))
        return self._summed_up(update, pictures), cost

    @torch.no_grad()
    def _draw(self, policy: Policy, batch: Sequence[tuple[int, int]], *, base: bool) -> list[_Picture]:
        texts = [self.prompts[index] for index, _ in batch]
        keys = [("sentinel", self.prompts[index], seed) for index, seed in batch]
        trajectories = start_trajectories(policy, texts, noise=self.noise, keys=keys)
        first = [] if base else [row for row, (_, seed) in enumerate(batch) if seed == 0]
        kl = walk_with_kl(policy, trajectories, noise=self.noise, rows=first)
        images = self.model.decode(trajectories.latents)
        scores = self.meter.scores(images, texts)
        scores |= {"edges": edge_energy(images), "flat": flat_share(images)}
        features = self.meter.features(images)
        return [
            _Picture(
                prompt=index,
                scores={name: float(values[row]) for name, values in scores.items()},
                features=features[row].clone(),
                kl=[float(step) for step in kl[:, first.index(row)]] if row in first else None,
            )
            for row, (index, _) in enumerate(batch)
        ]

    def _summed_up(self, update: int, pictures: Sequence[_Picture]) -> Look:
        groups = [[each for each in pictures if each.prompt == index] for index in range(len(self.prompts))]
        members = [name for name in pictures[0].scores if name.startswith("reward:")]
        values: dict[str, Values] = {}
        for name in ("reward", *members, "judge", *LOW_LEVEL):
            if name in pictures[0].scores:
                values[name] = [plain(_mean([each.scores[name] for each in group])) for group in groups]
        features = [torch.stack([each.features for each in group]) for group in groups]
        if self.config.seeds > 1:
            values["distance"] = [plain(pairwise_distance(rows)) for rows in features]
            values["vendi"] = [plain(vendi_score(rows)) for rows in features]
        if len(members) > 1 and self.config.seeds > 1:
            weights = dict(zip(members, [weight for _, weight in self.meter.scorer.members], strict=True))
            scores = [[[weights[name] * each.scores[name] for each in group] for name in members] for group in groups]
            values["disagreement"] = [plain(disagreement(each)) for each in scores]
        spread = {
            name: plain(within_spread([[each.scores[name] for each in group] for group in groups]))
            for name in ("reward", "judge", *LOW_LEVEL)
            if name in values
        }
        walks = [each.kl for each in pictures if each.kl is not None]
        steps = [_mean(list(step)) for step in zip(*walks, strict=True)]
        if walks:
            values["kl"] = [plain(math.fsum(walk)) for walk in walks]
        return Look(update, values, spread, _rounded(math.fsum(steps)), [_rounded(step) for step in steps])


def disagreement(scores: Sequence[Sequence[float]]) -> float:
    """Share of (pair of pictures, pair of rewards) in which one reward orders the pictures one way and the other the
    other way; a reward without a preference agrees with all. NaN without two rewards and two pictures with scores.

    Args:
        scores: of each reward the scores of the same pictures, higher is better.
    """
    opposed: list[bool] = []
    for first, second in combinations(range(len(scores[0])), 2):
        gaps = [row[first] - row[second] for row in scores]
        opposed += [a * b < 0 for a, b in combinations(gaps, 2) if math.isfinite(a) and math.isfinite(b)]
    return sum(opposed) / len(opposed) if opposed else math.nan


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else math.nan


def _rounded(value: float) -> float:
    # To the digits that a checkpoint keeps, so that a resumed run compares the very same numbers.
    return plain(value) or 0.0
