"""The step-aware preference model, and how a reward is told the time of a prediction."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tailorpo.errors import RewardError
from tailorpo.noise import Noise
from tailorpo.policy import Policy
from tailorpo.rewards import EmojiPreference, EmojiStepPreference, Scorer
from tailorpo.rewards.step_preference import StepClipScorer, TimeCondition, load_condition
from tailorpo.step_rewards import score_latents

PROMPTS = ("a cat", "a red apple on a blue background")
MakePolicy = Callable[..., Policy]


def pictures(count: int = 2, *, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def reward() -> StepClipScorer:
    return EmojiStepPreference().load("cpu")


def test_without_a_trained_condition_it_is_the_model_it_was_made_from() -> None:
    clip = EmojiPreference().load("cpu")
    untrained = StepClipScorer(clip, TimeCondition(clip.model.config.vision_config.hidden_size))
    for time in (0, 500, 951):
        got = untrained.at(time)(pictures(), PROMPTS)
        torch.testing.assert_close(got, clip(pictures(), PROMPTS), rtol=1e-5, atol=1e-5)


def test_the_bundled_model_depends_on_the_time_and_on_nothing_else_in_the_batch(reward: StepClipScorer) -> None:
    images = pictures()
    by_time = [reward.at(time)(images, PROMPTS) for time in (1, 251, 501, 951)]
    for first, second in pairwise(by_time):
        assert float((first - second).abs().max()) > 0.01
    assert torch.equal(reward(images, PROMPTS), reward.at(0)(images, PROMPTS))
    alone = torch.cat([reward.at(501)(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(alone, by_time[2], rtol=1e-4, atol=1e-5)
    # A time between two of those it was trained at lies between them or close by.
    between, near = reward.at(476)(images, PROMPTS), reward.at(501)(images, PROMPTS)
    assert float((between - near).abs().max()) < 0.5


def test_the_gradient_reaches_the_pictures_and_not_the_weights(reward: StepClipScorer) -> None:
    images = pictures().requires_grad_()
    score = Scorer([(reward, 1.0)]).at(701)
    score(images, PROMPTS).sum().backward()
    assert images.grad is not None
    direction, step = images.grad / images.grad.norm(), 2e-2
    with torch.no_grad():
        ahead, behind = (score(images + sign * step * direction, PROMPTS).sum() for sign in (1, -1))
    assert float(ahead - behind) / (2 * step) == pytest.approx(float(images.grad.norm()), rel=3e-2)
    weights = [*reward.clip.model.parameters(), *reward.condition.parameters()]
    assert all(not p.requires_grad and p.grad is None for p in weights)


def test_a_condition_that_cannot_be_used(reward: StepClipScorer, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"'x'.*cannot be read as its time condition"):
        load_condition(tmp_path / "nothing.safetensors", reward.clip, name="x")
    source = Path(shutil.copyfile(Path(__file__), tmp_path / "no.safetensors"))
    with pytest.raises(RewardError, match="cannot be read as its time condition"):
        load_condition(source, reward.clip, name="x")


class Clock:
    """A reward that is what it was told."""

    name, differentiable = "clock", False

    def __init__(self, time: int = -1) -> None:
        self.time = time

    def at(self, time: int, /) -> Clock:
        return Clock(time)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.full((len(images),), float(self.time))


class Five:
    """A reward that does not care."""

    name, differentiable = "five", False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.full((len(images),), 5.0)


def test_a_scorer_tells_the_time_to_those_who_ask_and_counts_all_the_same() -> None:
    scorer = Scorer([(Clock(), 2.0), (Five(), 1.0)])
    assert scorer.at(300)(pictures(), PROMPTS).tolist() == [605.0, 605.0]
    assert scorer(pictures(), PROMPTS).tolist() == [3.0, 3.0]
    assert {name: values.tolist() for name, values in scorer.each(pictures(), PROMPTS).items()} == {
        "clock": [-1.0, -1.0],
        "five": [5.0, 5.0],
    }
    assert scorer.queries == 6
    skipping = Scorer([(Clock(), 1.0)], on_invalid="skip")
    broken = pictures()
    broken[0, 0, 0, 0] = torch.nan
    assert skipping.at(7)(broken, PROMPTS).isnan().tolist() == [True, False]
    assert (skipping.queries, skipping.invalid) == (2, 1)


def test_latents_are_scored_with_the_time_that_their_network_evaluation_was_told(tiny_policy: MakePolicy) -> None:
    policy, told = tiny_policy(steps=4), list[int]()
    unet: Any = policy.model.unet
    handle = unet.register_forward_pre_hook(lambda module, args: told.append(int(args[1])))
    x = Noise(1).normals(policy.model.latent_shape, [("a",), ("b",)])
    cond, scorer = policy.model.encode(PROMPTS), Scorer([(Clock(), 1.0)])
    for k in (1, 2, 3):
        scored = score_latents(policy, x, k=k, cond=cond, prompts=PROMPTS, score=scorer)
        assert scored.reward.tolist() == [told[-1], told[-1]]
    assert len(set(told)) == 3
    finished = score_latents(policy, x, k=4, cond=cond, prompts=PROMPTS, score=scorer)
    assert finished.reward.tolist() == [-1.0, -1.0]
    plain = score_latents(policy, x, k=2, cond=cond, prompts=PROMPTS, score=lambda images, _: images.mean((1, 2, 3)))
    assert plain.reward.isfinite().all()
    handle.remove()
