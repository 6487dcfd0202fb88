"""D3PO with steps ranked one by one: the labels are those of each step's own prediction, the rest is D3PO's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tailorpo.algorithms.d3po import D3PO
from tailorpo.noise import Noise
from tailorpo.policy import Policy
from tailorpo.rewards.scorer import Scorer
from tailorpo.rollout import start_trajectories


def waves(images: Tensor) -> Tensor:
    """A number that a small change of a picture turns around."""
    return (2000 * images.mean((1, 2, 3))).sin()


class Waves:
    """That as a reward."""

    name = "waves"
    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return waves(images)


def test_every_step_is_labelled_by_the_predictions_of_its_two_ends(tiny_policy: Callable[..., Policy]) -> None:
    policy, noise, prompts = tiny_policy(steps=5), Noise(1), ["a cat", "a dog", "a bee"]
    keys = [("train", number) for number in range(3)]
    trajectory, found = D3PO(), {}
    for method in (trajectory, replace(trajectory, ranking="step")):
        score = Scorer([(Waves(), 1.0)])
        start = start_trajectories(policy, prompts, noise=noise, keys=keys)
        pairs = list(method.collect(policy, start, trained=range(5), score=score, noise=noise))
        assert score.queries == 3 * method.cost(5, range(5)).reward_queries
        found[method.ranking] = pairs

    swapped = 0
    for whole, step in zip(found["trajectory"], found["step"], strict=True):
        # The same two chains, perhaps the other way round.
        same = (whole.next_latents == step.next_latents).flatten(1).all(1)
        assert torch.equal(torch.where(same.view(-1, 1, 1, 1, 1), step.latents, step.latents.flip(1)), whole.latents)
        swapped += int((~same).sum())
        assert bool((step.reward[:, 0] >= step.reward[:, 1]).all())
        for row, prompt in enumerate(prompts):
            x = step.next_latents[row]
            # From scratch: what the policy itself predicts at x_{k+1}; the end is its own picture.
            with torch.no_grad():
                at_end = step.k == 4
                clean = x if at_end else policy.step(x, step.k + 1, policy.model.encode([prompt] * 2)).x0
                expected = waves(policy.model.decode(clean))
            torch.testing.assert_close(step.reward[row], expected, atol=1e-2, rtol=0)
    assert swapped > 0  # or the two rankings could not be told apart
