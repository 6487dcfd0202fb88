"""On the closed-form Gaussian mixture, pairs ranked by a linear reward raise the reward of what the model draws."""

from __future__ import annotations

import torch

from tailorpo.algorithms.diffusion_dpo import DiffusionDPO
from tailorpo.models.toy import GaussianMixture
from tailorpo.noise import Noise
from tailorpo.pair_dataset import PairLatents
from tailorpo.policy import Policy
from tailorpo.rollout import rollout_chains, start_trajectories
from tailorpo.samplers import DDIM

DIRECTION = torch.tensor([1.0, -0.5])
MEANS, WEIGHTS, VARIANCE = torch.tensor([[1.0, 0.0], [-1.0, 0.5]]), torch.tensor([0.4, 0.6]), 0.3


def ranked(count: int, *, flip: bool = False) -> PairLatents:
    """Pairs of the mixture's own samples, the better by the linear reward first (or second, if flipped)."""
    generator = torch.Generator().manual_seed(0)
    component = torch.multinomial(WEIGHTS, 2 * count, replacement=True, generator=generator)
    x = MEANS[component] + VARIANCE**0.5 * torch.randn(2 * count, 2, generator=generator)
    order = (x @ DIRECTION).view(2, count).argsort(dim=0, descending=not flip)
    rows = order * count + torch.arange(count)
    return PairLatents(x.view(-1, 2, 1, 1), rows[0], rows[1], [""] * count, [""] * count)


def trained(pairs: PairLatents, *, beta: float, updates: int = 100, batch: int = 32) -> tuple[float, float, float]:
    """Mean reward of samples before and after, and the implicit accuracy over the last ten updates."""
    model = GaussianMixture(WEIGHTS, MEANS, covariances=VARIANCE * torch.eye(2).repeat(2, 1, 1))
    policy, noise = Policy(model, DDIM(steps=20, guidance_scale=1.0)), Noise(0)
    method = DiffusionDPO(pairs="not read", beta=beta)

    def mean_reward() -> float:
        start = start_trajectories(policy, [""] * 500, noise=Noise(1), keys=[("eval", i) for i in range(500)])
        return float((rollout_chains(policy, start, noise=Noise(1)).flatten(1) @ DIRECTION).mean())

    with torch.no_grad():
        before = mean_reward()
    adam, accuracy = torch.optim.Adam(model.trainable().values(), lr=0.02), list[float]()
    for update in range(updates):
        sample = method.evaluate(policy, pairs, [("train", update * batch + i) for i in range(batch)], noise=noise)
        adam.zero_grad()
        method.loss(policy, sample).mean().backward()
        adam.step()
        accuracy.append(float(sample.figures()["accuracy"].mean()))
    with torch.no_grad():
        return before, mean_reward(), sum(accuracy[-10:]) / 10


def test_the_reward_of_samples_rises_and_winners_are_told_from_losers() -> None:
    before, after, accuracy = trained(ranked(400), beta=5.0)
    assert after > before + 0.5
    assert accuracy > 0.75


def test_labels_the_other_way_round_lower_the_reward() -> None:
    before, after, _ = trained(ranked(400, flip=True), beta=5.0)
    assert after < before - 0.5


def test_a_larger_beta_stays_closer_to_the_reference() -> None:
    shifts = [after - before for before, after, _ in (trained(ranked(400), beta=beta) for beta in (2.0, 50.0))]
    assert shifts[0] > 1.3 * shifts[1] > 0
