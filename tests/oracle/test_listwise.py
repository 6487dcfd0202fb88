"""Losses of rankings against brute force, and where they come to rest in the locally linear model.

There the mean of a step is free: candidates are mean + sigma z with z ~ N(0, I), rewards are sigma g . z, and
u = (mean - mean_ref) / sigma is what is learnt.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp
from torch import Tensor

from tailorpo.algorithms.labels import pair_probability, stage_targets
from tailorpo.algorithms.safeguard import guarded, loser_scale
from tailorpo.gaussian_step import GaussianStep
from tailorpo.objectives import dpo, ipo, plackett_luce, soft_dpo

SLOPE = torch.tensor([1.2, -0.5, 0.8], dtype=torch.float64)
STD = 0.7


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn_orders(worth: Tensor) -> dict[tuple[int, ...], float]:
    """The probability of every order in which candidates are drawn without replacement by worth."""
    found: dict[tuple[int, ...], float] = {}
    for order in permutations(range(len(worth))):
        left, probability = float(worth.sum()), 1.0
        for i in order:
            probability *= float(worth[i]) / left
            left -= float(worth[i])
        found[order] = probability
    return found


def test_hard_lists_are_the_likelihood_of_the_order_among_all_permutations() -> None:
    scores, beta = normals(3, 4), 0.7
    reward = torch.tensor([[3.0, 1.0, 0.5, -2.0]], dtype=torch.float64).expand(3, -1)
    losses = plackett_luce(scores, beta=beta, targets=stage_targets(reward, tau=None, smoothing=0.0))
    for row, loss in zip(scores, losses, strict=True):
        orders = drawn_orders((beta * row).exp())
        assert sum(orders.values()) == pytest.approx(1.0)
        assert float(loss) == pytest.approx(-math.log(orders[0, 1, 2, 3]), rel=1e-12)


def test_a_list_of_two_is_a_pair_hard_soft_and_smoothed() -> None:
    scores, reward = normals(5, 2), normals(5, 2, seed=1).sort(dim=1, descending=True).values
    logit, gap = scores[:, 0] - scores[:, 1], reward[:, 0] - reward[:, 1]
    for tau, smoothing in ((None, 0.0), (0.4, 0.0), (None, 0.2), (0.4, 0.2)):
        tensor = None if tau is None else torch.full((5,), tau, dtype=torch.float64)
        listwise = plackett_luce(scores, beta=0.3, targets=stage_targets(reward, tau=tensor, smoothing=smoothing))
        # By hand: right with probability p, and then told the other way round with probability `smoothing`.
        right = torch.ones(5, dtype=torch.float64) if tau is None else 1 / (1 + (-gap / tau).exp())
        label = right * (1 - smoothing) + (1 - right) * smoothing
        torch.testing.assert_close(pair_probability(gap, tau=tensor, smoothing=smoothing), label)
        torch.testing.assert_close(listwise, soft_dpo(logit, beta=0.3, probability=label))
        if tau is None and not smoothing:
            torch.testing.assert_close(listwise, dpo(logit, beta=0.3))


def test_soft_targets_become_hard_ones_and_ties_are_shared() -> None:
    reward = torch.tensor([[2.0, 2.0, 1.0, 0.5], [4.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    hard = stage_targets(reward, tau=None, smoothing=0.0)
    torch.testing.assert_close(
        hard, stage_targets(reward, tau=torch.full((2,), 1e-3, dtype=torch.float64), smoothing=0.0)
    )
    assert hard[0, 0].tolist() == [0.5, 0.5, 0.0, 0.0]
    assert hard[1, 2].tolist() == [0.0, 0.0, 0.5, 0.5]
    torch.testing.assert_close(hard.sum(dim=2), torch.ones(2, 3, dtype=torch.float64))
    assert stage_targets(torch.full((1, 3), torch.nan), tau=None, smoothing=0.1).isfinite().all()


@pytest.mark.parametrize("count", [2, 4])
def test_soft_labels_rest_exactly_at_the_tilt_for_every_list(count: int) -> None:
    """beta tau delta = sigma^2 grad Q: the gradient of every single list is zero there, and a small step away it is
    not; gradient descent from the reference arrives there from random lists."""
    beta, tau = 0.4, 1.7
    noises = normals(4000, count, 3)
    reward = STD * noises @ SLOPE
    reward, order = reward.sort(dim=1, descending=True)
    noises = noises.gather(1, order.unsqueeze(2).expand(-1, -1, 3))
    targets = stage_targets(reward, tau=torch.full((4000,), tau, dtype=torch.float64), smoothing=0.0)
    rest = STD**2 * SLOPE / (beta * tau) / STD

    def gradient(u: Tensor, rows: slice = slice(None)) -> Tensor:
        free = u.expand(len(noises[rows]), 3).clone().requires_grad_()
        scores = (noises[rows] * free.unsqueeze(1)).sum(dim=2)
        plackett_luce(scores, beta=beta, targets=targets[rows]).sum().backward()
        assert free.grad is not None
        return free.grad

    assert float(gradient(rest).abs().max()) < 1e-12
    assert float(gradient(1.01 * rest).abs().max()) > 1e-3
    u = torch.zeros(3, dtype=torch.float64)
    for _ in range(400):
        u = u - 4.0 * gradient(u).mean(dim=0)
    torch.testing.assert_close(u, rest, rtol=1e-4, atol=1e-4)


def rests(loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Where one Newton step from the reference leads: the minimum of a quadratic loss of u."""
    zero = torch.zeros(3, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(loss, zero)
    curvature = torch.autograd.functional.hessian(loss, zero)
    return -torch.linalg.solve(curvature, slope)  # pyright: ignore


def test_ipo_rests_at_its_own_kl_whatever_the_unit_of_the_reward() -> None:
    """|u| = 1 / (2 beta sqrt(pi)) and KL = 1 / (8 pi beta^2), from 400,000 pairs (standard error 0.2 %)."""
    first, second = normals(400_000, 3), normals(400_000, 3, seed=1)
    for beta, unit in ((0.3, 1.0), (1.5, 1e-3)):
        sign = (unit * (first - second) @ SLOPE).sign()
        difference = sign.unsqueeze(1) * (first - second)
        certain = torch.ones(len(difference), dtype=torch.float64)

        def loss(u: Tensor, difference: Tensor = difference, beta: float = beta, certain: Tensor = certain) -> Tensor:
            return ipo(difference @ u, beta=beta, probability=certain).mean()

        u = rests(loss)
        assert float(u.norm()) == pytest.approx(1 / (2 * beta * math.sqrt(math.pi)), rel=0.01)
        assert float(u.norm() ** 2 / 2) == pytest.approx(1 / (8 * math.pi * beta**2), rel=0.02)
        torch.testing.assert_close(u / u.norm(), SLOPE / SLOPE.norm(), rtol=0.02, atol=0.01)


def test_ipos_labels_move_its_target_between_the_two_margins() -> None:
    probability = torch.tensor([1.0, 0.75, 0.5], dtype=torch.float64)
    logit = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64).requires_grad_()  # (2 p - 1) / (2 beta) by hand
    ipo(logit, beta=0.25, probability=probability).sum().backward()
    assert logit.grad is not None
    assert logit.grad.abs().max() < 1e-12


def test_hard_labels_never_come_to_rest() -> None:
    """The expected gradient flow of u along the reward's gradient, a = |u|, integrated: it does not stop, and grows as
    the cube root of time, (1.39 s / beta)^(1/3)."""
    for beta in (0.5,):

        def speed(_: float, a: np.ndarray, beta: float = beta) -> list[float]:
            def pull(x: float) -> float:
                logit = torch.tensor(float(a[0]) * x, dtype=torch.float64, requires_grad=True)
                (slope,) = torch.autograd.grad(dpo(logit, beta=beta), logit)
                # |N(0, 2)| is how far apart two candidates lie along the gradient.
                return -float(slope) * x * math.exp(-(x**2) / 4) / math.sqrt(math.pi)

            return [quad(pull, 0, 12, epsrel=1e-5, limit=50)[0]]

        times = [20.0, 200.0, 1600.0]
        way = solve_ivp(speed, (0, times[-1]), [0.0], t_eval=times, method="LSODA", rtol=1e-5).y[0]
        cube_root = [(1.39 * s / beta) ** (1 / 3) for s in times]
        errors = [abs(a / expected - 1) for a, expected in zip(way, cube_root, strict=True)]
        assert errors[0] > errors[1] > errors[2]
        assert errors[2] < 0.03
        assert 2.0 < way[2] / way[1] < 2.2  # eight times as long


def test_the_safeguard_keeps_the_winner_from_falling_and_does_no_more_than_that() -> None:
    """Finite differences of torch.distributions' log-density along the mean's own descent direction, in two
    dimensions, where the guard is needed for 15 % of pairs; in 768 it never is."""
    count, std = 400, 0.3
    mean = normals(count, 2, seed=2).view(-1, 2, 1, 1)
    winner = mean + std * normals(count, 2, seed=3).view(-1, 2, 1, 1)
    loser = mean + std * normals(count, 2, seed=4).view(-1, 2, 1, 1)
    reference = GaussianStep(mean + 0.05, std)

    def log_density(at: Tensor) -> Tensor:
        return torch.distributions.Normal(at, std).log_prob(winner).flatten(1).sum(dim=1)

    def change(scale: Tensor) -> Tensor:
        free = mean.clone().requires_grad_()
        step = GaussianStep(free, std)
        logit = guarded(step.log_ratio(winner, reference), step.log_ratio(loser, reference), scale)
        dpo(logit, beta=0.5).sum().backward()
        assert free.grad is not None
        down = -1e-6 * free.grad / free.grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return (log_density(mean + down) - log_density(mean - down)) / 2e-6

    scale = loser_scale(GaussianStep(mean, std), winner, loser)
    unguarded = change(torch.ones(count, dtype=torch.float64))
    needed = unguarded < 0
    assert 0.10 < float(needed.double().mean()) < 0.20
    assert torch.equal(scale < 1, needed)
    assert float(change(scale).min()) > -1e-6
    # The largest such scale: a little more, and those that needed it fall.
    assert float(change(torch.where(needed, scale + 1e-3, scale))[needed].max()) < 0
    large = [normals(200, 3, 16, 16, seed=seed) for seed in (5, 6)]
    assert loser_scale(GaussianStep(torch.zeros_like(large[0]), 1.0), large[0], large[1]).tolist() == [1.0] * 200


def test_the_safeguard_leaves_the_loss_itself_alone() -> None:
    winner, loser, scale = normals(5), normals(5, seed=1), torch.full((5,), 0.3, dtype=torch.float64)
    torch.testing.assert_close(guarded(winner, loser, scale), winner - loser)
