"""On the closed-form Gaussian mixture TailorPO reaches the optimum that algebra says it should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tailorpo.algorithms.tailorpo import Steps, TailorPO
from tailorpo.guidance import SigmaGuidance
from tailorpo.models.toy import GaussianMixture
from tailorpo.noise import Noise
from tailorpo.policy import Policy
from tailorpo.rollout import rollout_chains, start_trajectories
from tailorpo.samplers import DDIM

DIRECTION = torch.tensor([1.0, -0.5])
EARLY = Steps(first=0, last=9, count=5)


def reward(latents: Tensor, prompts: Any) -> Tensor:
    return latents.flatten(1) @ DIRECTION


def align(model: GaussianMixture, algorithm: TailorPO, *, updates: int, lr: float, batch: int = 2) -> Policy:
    policy, noise = Policy(model, DDIM(steps=20, guidance_scale=1.0)), Noise(0)
    adam = torch.optim.Adam(model.trainable().values(), lr=lr)
    for update in range(updates):
        for group in adam.param_groups:
            group["lr"] = lr * (1 - update / updates)
        trained = algorithm.trained_steps(20, noise=noise, update=update)
        keys = [("train", update * batch + i) for i in range(batch)]
        trajectories = start_trajectories(policy, [""] * batch, noise=noise, keys=keys)
        adam.zero_grad()
        for pair in algorithm.collect(policy, trajectories, trained=trained, score=reward, noise=noise):
            (algorithm.loss(policy, pair).sum() / (batch * len(trained))).backward()
        adam.step()
    return policy


@pytest.mark.parametrize(
    "options", [{}, {"continue_from": "random"}, {"guidance": SigmaGuidance(k=0.5, symmetric=True)}]
)
def test_soft_labels_reach_the_tilted_gaussian(options: Any) -> None:
    """p(x) exp(r(x) / (beta tau)) of N(m, S) with r = a . x is N(m + S a / (beta tau), S).

    The early steps are trained: there 20 DDIM steps are close to the continuous process that this holds for. The ratio
    of their own optimum to the tilt is 0.99 at the first and 0.91 at the tenth. With a linear reward the label of every
    single pair is the optimal one, so there is no noise to average over and two trajectories are enough.
    """
    covariance, mean = torch.tensor([[[1.0, 0.3], [0.3, 0.5]]]), torch.tensor([[0.5, -0.2]])
    model = GaussianMixture(torch.ones(1), mean, covariances=covariance, train_weights=False)
    algorithm = TailorPO(beta=0.5, labels="soft", tau=2.0, train_steps=EARLY, **options)
    align(model, algorithm, updates=80, lr=0.1)
    shift, tilt = model.trainable()["means"].detach() - mean, covariance[0] @ DIRECTION
    assert float((shift - tilt).norm()) < 0.1 * float(tilt.norm())


def test_the_shift_halves_when_beta_doubles() -> None:
    shifts: list[Tensor] = []
    for beta in (0.5, 1.0):
        model = GaussianMixture(torch.ones(1), torch.zeros(1, 2), covariances=torch.eye(2)[None], train_weights=False)
        align(model, TailorPO(beta=beta, labels="soft", tau=2.0, train_steps=EARLY), updates=60, lr=0.1)
        shifts.append(model.trainable()["means"].detach()[0])
    torch.testing.assert_close(shifts[0], 2 * shifts[1], rtol=0.05, atol=0.02)


def test_a_mixture_moves_its_weight_to_the_better_component() -> None:
    """The tilt turns weights (0.4, 0.6) into (0.92, 0.08); a step reward of the mean alone leaves it short of that."""
    means, covariances = torch.tensor([[1.0, 0.0], [-1.0, 0.5]]), 0.3 * torch.eye(2).repeat(2, 1, 1)
    weights = torch.tensor([0.4, 0.6])
    model = GaussianMixture(weights, means, covariances=covariances)
    policy = Policy(model, DDIM(steps=20, guidance_scale=1.0))

    def mean_reward() -> float:
        start = start_trajectories(policy, [""] * 500, noise=Noise(1), keys=[("eval", i) for i in range(500)])
        return float(reward(rollout_chains(policy, start, noise=Noise(1)), None).mean())

    before = mean_reward()
    algorithm = TailorPO(beta=0.5, labels="soft", tau=2.0, train_steps=EARLY, continue_from="random")
    align(model, algorithm, updates=80, lr=0.1, batch=16)
    tilt = torch.softmax(weights.log() + means @ DIRECTION + DIRECTION @ DIRECTION * 0.3 / 2, dim=0)
    optimum = float((tilt @ means + 0.3 * DIRECTION) @ DIRECTION)
    learnt = torch.softmax(model.trainable()["logits"].detach(), dim=0)
    assert learnt[0] > 0.7
    assert mean_reward() - before > 0.75 * (optimum - before)


def test_hard_labels_have_no_fixed_point_but_soft_ones_do() -> None:
    sizes: dict[str, list[float]] = {}
    for labels, tau in (("hard", None), ("soft", 2.0)):
        for updates in (30, 120):
            model = GaussianMixture(
                torch.ones(1), torch.zeros(1, 2), covariances=torch.eye(2)[None], train_weights=False
            )
            algorithm = TailorPO(beta=0.5, labels=labels, tau=tau, train_steps=EARLY)
            align(model, algorithm, updates=updates, lr=0.2)
            sizes.setdefault(labels, []).append(float(model.trainable()["means"].detach().norm()))
    assert sizes["hard"][1] > 1.5 * sizes["hard"][0]
    assert sizes["soft"][1] < 1.1 * sizes["soft"][0]
