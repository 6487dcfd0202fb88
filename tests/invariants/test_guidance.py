"""Symmetric guidance in a rollout of the tiny model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tailorpo.algorithms.pairs import Pair
from tailorpo.algorithms.tailorpo import TailorPO
from tailorpo.guidance import SigmaGuidance
from tailorpo.noise import Noise
from tailorpo.policy import Policy
from tailorpo.rollout import start_trajectories
from tailorpo.step_rewards import Score


def contrast(images: Tensor, prompts: Any) -> Tensor:
    return 10 * images.flatten(1).std(dim=1)


def pair_at_nine(policy: Policy, guidance: SigmaGuidance | None, score: Score = contrast) -> Pair:
    trajectories = start_trajectories(policy, ["a cat", "a dog"], noise=Noise(0), keys=[("train", 0), ("train", 1)])
    algorithm = TailorPO(train_steps=(9,), guidance=guidance)
    (pair,) = algorithm.collect(policy, trajectories, trained=(9,), score=score, noise=Noise(0))
    return pair


def test_both_candidates_move_and_the_walk_goes_on_from_half_as_far(tiny_policy: Callable[..., Policy]) -> None:
    policy, k = tiny_policy(moved=0.05), 1.5
    plain, guided = (pair_at_nine(policy, guidance) for guidance in (None, SigmaGuidance(k=k, symmetric=True)))
    apart = guided.noise_difference - plain.noise_difference
    torch.testing.assert_close(apart.flatten(1).norm(dim=1), torch.full((2,), k), rtol=1e-4, atol=0)
    walked = (guided.next_latents - plain.next_latents) / policy.sampler.std(policy.schedule, 9)
    torch.testing.assert_close(walked, apart / 2, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(guided.push, torch.full((2,), k / 2), rtol=1e-4, atol=0)
    # The two log-ratios are those of the moved candidates, and the logit is their difference.
    torch.testing.assert_close(guided.log_ratio_winner - guided.log_ratio_loser, guided.logit, rtol=1e-3, atol=1e-4)


def test_a_rejected_pair_is_left_as_it_was_drawn_on_both_sides(tiny_policy: Callable[..., Policy]) -> None:
    policy = tiny_policy(moved=0.05)
    plain = pair_at_nine(policy, None)
    kept = pair_at_nine(policy, SigmaGuidance(k=0.5, symmetric=True, accept_reject=True))
    assert kept.extra["guidance_accepted"].all()
    free = pair_at_nine(policy, SigmaGuidance(k=0.5, symmetric=True))
    torch.testing.assert_close(kept.noise_difference, free.noise_difference)
    torch.testing.assert_close(kept.next_latents, free.next_latents)

    def falling(images: Tensor, prompts: Any) -> Tensor:
        """The candidates come in one call of four, the moved winners in one of two."""
        return contrast(images, prompts) - (100 if len(images) == 2 else 0)

    guidance = SigmaGuidance(k=0.5, symmetric=True, shell=True, accept_reject=True)
    rejected = pair_at_nine(policy, guidance, falling)
    assert not rejected.extra["guidance_accepted"].any()
    assert torch.equal(rejected.noise_difference, plain.noise_difference)
    assert torch.equal(rejected.next_latents, plain.next_latents)
