"""On Gaussian mixtures: the baselines follow the gradient that algebra says they should, and raise the reward."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tailorpo.algorithms.base import Algorithm
from tailorpo.algorithms.d3po import D3PO
from tailorpo.algorithms.ddpo import DDPO
from tailorpo.algorithms.reward_backprop import RewardBackprop
from tailorpo.models.toy import GaussianMixture
from tailorpo.noise import Noise
from tailorpo.policy import Policy
from tailorpo.rollout import Trajectories, rollout_chains, start_trajectories
from tailorpo.samplers import DDIM

DIRECTION = torch.tensor([1.0, -0.5])
BATCHES, SIZE = 10, 600


def linear(latents: Tensor, prompts: Any) -> Tensor:
    return latents.flatten(1) @ DIRECTION


def gaussian_policy(*, steps: int) -> Policy:
    """N(m, S) with a trainable mean: the sampler is linear in the mean and in every noise."""
    model = GaussianMixture(
        torch.ones(1),
        torch.tensor([[0.5, -0.2]]),
        covariances=torch.tensor([[[1.0, 0.3], [0.3, 0.5]]]),
        train_weights=False,
    )
    return Policy(model, DDIM(steps=steps, guidance_scale=1.0))


def mixture_policy() -> Policy:
    model = GaussianMixture(
        torch.tensor([0.4, 0.6]),
        torch.tensor([[1.0, 0.0], [-1.0, 0.5]]),
        covariances=0.3 * torch.eye(2).repeat(2, 1, 1),
    )
    return Policy(model, DDIM(steps=20, guidance_scale=1.0))


def start(policy: Policy, first: int, count: int, *, name: str = "train") -> Trajectories:
    keys = [(name, first + i) for i in range(count)]
    return start_trajectories(policy, [""] * count, noise=Noise(0), keys=keys)


def gradients(policy: Policy, algorithm: D3PO | DDPO) -> Tensor:
    """Of the loss summed over all steps, means of independent batches: (BATCHES, 2)."""
    steps = policy.schedule.steps
    found: list[Tensor] = []
    for first in range(0, BATCHES * SIZE, SIZE):
        trajectories = start(policy, first, SIZE)
        samples: list[Any] = [
            sample.stored(policy)
            for sample in algorithm.collect(
                policy, trajectories, trained=tuple(range(steps)), score=linear, noise=Noise(0)
            )
        ]
        losses = [algorithm.loss(policy, sample).mean() for sample in algorithm.prepare(samples, {})]
        found.append(torch.autograd.grad(torch.stack(losses).sum(), policy.model.trainable()["means"])[0][0])
    return torch.stack(found)


def true_gradient(policy: Policy) -> Tensor:
    """d E[reward] / d mean, exactly: with everything linear one backpropagated trajectory has no variance."""
    steps = policy.schedule.steps
    slopes: list[Tensor] = []
    for first in (0, 1):
        (finished,) = RewardBackprop(last_steps=steps).collect(
            policy, start(policy, first, 1), trained=(steps - 1,), score=linear, noise=Noise(0)
        )
        slopes.append(torch.autograd.grad(finished.reward.sum(), policy.model.trainable()["means"])[0][0])
    torch.testing.assert_close(slopes[0], slopes[1])
    return slopes[0]


def compare_with(rows: Tensor, expected: Tensor) -> None:
    """The rows' mean is what is expected, within four standard errors, and these are small beside it."""
    error = rows.std(dim=0) / math.sqrt(len(rows))
    assert float(error.norm()) < 0.12 * float(expected.norm()), "too noisy to tell"
    assert ((rows.mean(dim=0) - expected).abs() < 4 * error).all(), (rows.mean(dim=0), expected, error)


def test_ddpo_and_backpropagation_estimate_the_same_gradient() -> None:
    """E[A grad log pi] = grad E[r] / std(r): the likelihood ratio and the reparametrisation, two roads to one place."""
    policy = gaussian_policy(steps=3)
    whole_batch = {"history": SIZE + 1, "history_min": SIZE + 1}
    rows = gradients(policy, DDPO(reduction="sum", clip=0.5, advantage_clip=100.0, **whole_batch))
    with torch.no_grad():
        rewards = linear(rollout_chains(policy, start(policy, 0, 2000), noise=Noise(0)), None)
    compare_with(rows, -true_gradient(policy) / rewards.std())


def test_d3pos_first_gradient_is_the_policy_gradient_in_closed_form() -> None:
    """At the reference, with everything Gaussian: E[grad L] = -beta grad E[r] / (sqrt(pi) std(r | x_0)).

    L' = -beta/2 (S_w - S_l) with scores S = grad log pi of a chain; label and scores are jointly Gaussian, so
    E[sign(R) S] = sqrt(2/pi) Cov(R, S) / std(R) for the differences R and S of two chains that share x_0.
    """
    policy, beta = gaussian_policy(steps=3), 0.3
    rows = gradients(policy, D3PO(reduction="sum", clip=None, beta=beta))
    trajectories = start(policy, 0, 2000)
    trajectories.latents = trajectories.latents[:1].repeat(2000, 1, 1, 1)  # one x_0, many ways to go on
    with torch.no_grad():
        spread = linear(rollout_chains(policy, trajectories, noise=Noise(0)), None).std()
    compare_with(rows, -beta * true_gradient(policy) / (math.sqrt(math.pi) * spread))


@pytest.mark.parametrize(
    ("algorithm", "lr"),
    [
        (D3PO(), 0.02),
        (DDPO(history_min=8), 0.02),
        (DDPO(inner_epochs=2, history_min=8), 0.02),
        (RewardBackprop(last_steps=2), 0.05),
        (RewardBackprop(last_steps=4, truncation="random"), 0.05),
    ],
)
def test_the_mean_reward_rises(algorithm: Algorithm, lr: float) -> None:
    policy = mixture_policy()

    def rewards() -> Tensor:
        return linear(rollout_chains(policy, start(policy, 0, 400, name="eval"), noise=Noise(0)), None)

    def update(number: int, memory: dict[str, list[float]]) -> None:
        """One optimizer step per epoch over everything that was collected."""
        trained = algorithm.trained_steps(20, noise=Noise(0), update=number)
        trajectories = start(policy, 16 * number, 16)
        samples = list(algorithm.collect(policy, trajectories, trained=trained, score=linear, noise=Noise(0)))
        data = samples
        if algorithm.update == "buffered":
            data = algorithm.prepare([sample.stored(policy) for sample in samples], memory)
        for _ in range(algorithm.inner_epochs):
            adam.zero_grad()
            for each in data:
                (algorithm.loss(policy, each).mean() / len(trained)).backward()
            adam.step()

    with torch.no_grad():
        before = rewards()
    adam, memory = torch.optim.Adam(policy.model.trainable().values(), lr=lr), dict[str, list[float]]()
    for number in range(15):
        update(number, memory)
    with torch.no_grad():
        gain = rewards() - before
    error = float(gain.std()) / math.sqrt(len(gain))
    assert float(gain.mean()) > 0.1
    assert float(gain.mean()) > 5 * error
