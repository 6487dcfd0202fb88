"""`tailorpo jensen` on the closed-form mixture, where posteriors and expected rewards are known exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from exact_mixture import ExactPosterior, ExactReward, probit, quadratic, sine
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tailorpo.jensen.bounds import lipschitz_bound, smooth_bound
from tailorpo.jensen.posterior import Posterior, posterior
from tailorpo.jensen.ranking import Pairs, correlation, disagreement, gap, misranking, raw_misranking, share_of, signal
from tailorpo.jensen.siblings import SiblingValues, Walk, sibling_values, walk
from tailorpo.models.toy import GaussianMixture
from tailorpo.noise import Noise
from tailorpo.policy import Policy
from tailorpo.samplers import DDIM

STEPS, STATES, CONTINUATIONS = 100, 200, 10
NOISE = Noise(11)
LEVELS = (12, 48, 84)
"""Steps whose siblings are measured, from noise to clean."""


def mixture(seed: int = 0, dimensions: int = 4) -> GaussianMixture:
    generator = torch.Generator().manual_seed(seed)
    means = 1.2 * torch.randn(3, dimensions, generator=generator)
    roots = 0.5 * torch.randn(3, dimensions, dimensions, generator=generator)
    covariances = roots @ roots.transpose(1, 2) + 0.05 * torch.eye(dimensions)
    return GaussianMixture(torch.tensor([0.5, 0.3, 0.2]), means, covariances=covariances)


def rewards(dimensions: int = 4, seed: int = 1) -> dict[str, ExactReward]:
    generator = torch.Generator().manual_seed(seed)
    root, direction, centre = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((dimensions, dimensions), (dimensions,), (dimensions,))
    )
    return {
        "quadratic": quadratic(root @ root.T / 4, centre),
        "sine": sine(1.3 * direction / direction.norm(), 0.4),
        "probit": probit(1.5 * direction / direction.norm(), -0.3),
    }


REWARDS = rewards()


@dataclass(frozen=True)
class Measured:
    policy: Policy
    walked: Walk
    pairs: dict[int, dict[str, SiblingValues]]
    siblings: dict[int, Tensor]
    posteriors: dict[int, Posterior]

    def exact(self, k: int, latents: Tensor) -> ExactPosterior:
        """Of x_k."""
        schedule = self.policy.schedule
        model = self.policy.model
        assert isinstance(model, GaussianMixture)
        return ExactPosterior.of(model, latents, alpha=float(schedule.alpha[k]), sigma=float(schedule.sigma[k]))

    def truth(self, k: int, reward: ExactReward) -> np.ndarray:
        """Q of the siblings of step k, (N, 2)."""
        flat = self.siblings[k].flatten(0, 1)
        return self.exact(k + 1, flat).expect(reward).view(2, -1).T.numpy()


@pytest.fixture(scope="module")
def measured() -> Measured:
    policy = Policy(mixture(), DDIM(steps=STEPS, guidance_scale=1.0))
    keys = [("test", i) for i in range(STATES)]
    walked = walk(policy, [""] * STATES, noise=NOISE, keys=keys)
    pairs, siblings = {}, {}
    for k in LEVELS:
        pairs[k] = sibling_values(
            policy,
            walked,
            k=k,
            rewards=REWARDS,
            noise=NOISE,
            continuations=CONTINUATIONS,
            ahead=2,
            batch=10_000,
        )
        drawn = torch.stack([NOISE.normals((4, 1, 1), keys, "step", k, "candidate", j) for j in (0, 1)])
        siblings[k] = walked.steps[k].gaussian.sample(drawn)
    posteriors = {
        k: posterior(policy, walked, k=k + 1, rewards=REWARDS, differentiable=list(REWARDS), noise=NOISE, probes=12)
        for k in LEVELS
    }
    return Measured(policy, walked, pairs, siblings, posteriors)


def as_pairs(values: SiblingValues) -> Pairs:
    return Pairs(values.guess.numpy(), values.ahead.numpy(), values.ends.numpy())


@pytest.mark.parametrize("share", [0.1, 0.4, 0.7])
def test_the_three_estimators_of_the_posterior_variance(share: float) -> None:
    """At 400 steps each is within four of its own standard errors of the exact mean at the same states; at 20 the
    increments fall short, since DDIM puts x0hat in the place of x_0."""

    def measured(steps: int, states: int) -> tuple[Posterior, Tensor]:
        policy = Policy(mixture(), DDIM(steps=steps, guidance_scale=1.0))
        k = round(share * steps)
        walked = walk(policy, [""] * states, noise=NOISE, keys=[("trace", i) for i in range(states)])
        found = posterior(policy, walked, k=k, rewards=REWARDS, differentiable=(), noise=NOISE, probes=8)
        schedule, model = policy.schedule, policy.model
        assert isinstance(model, GaussianMixture)
        level = {"alpha": float(schedule.alpha[k]), "sigma": float(schedule.sigma[k])}
        known = ExactPosterior.of(model, walked.latents[k], **level)
        return found, known.covariance.diagonal(dim1=1, dim2=2).sum(1)

    def error(values: Tensor) -> float:
        return 4 * float(values.std()) / math.sqrt(len(values))

    found, exact = measured(400, 120)
    mean, probes = float(exact.mean()), found.trace.double().mean(0)
    assert abs(float((probes - exact).mean())) < error(probes - exact) + 1e-3 * mean
    assert abs(float(found.denoising.mean()) - mean) < error(found.denoising)
    assert abs(float(found.increments.mean()) - mean) < error(found.increments)
    coarse, exact = measured(20, 200)
    assert float(coarse.increments.mean()) + error(coarse.increments) < float(exact.mean())


@pytest.mark.parametrize("k", LEVELS)
def test_the_reward_near_the_posterior_mean(measured: Measured, k: int) -> None:
    """Slope, directional variance, curvature and second-order gap of the quadratic, which is its own Taylor series."""
    exact = measured.exact(k + 1, measured.walked.latents[k + 1])
    found = measured.posteriors[k].local["quadratic"]
    leaf = exact.mean.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(REWARDS["quadratic"].value(leaf).sum(), leaf)
    torch.testing.assert_close(found.slope.double(), gradient.norm(dim=1), rtol=1e-3, atol=1e-3)
    variance = torch.einsum("na,nab,nb->n", gradient, exact.covariance, gradient)
    torch.testing.assert_close(found.directional.double(), variance, rtol=5e-3, atol=1e-3)
    largest = REWARDS["quadratic"].curvature
    assert float(found.curvature.max()) < 1.01 * largest
    assert float(found.curvature.mean()) > 0.8 * largest
    true_gap = exact.expect(REWARDS["quadratic"]) - REWARDS["quadratic"].value(exact.mean)
    error = found.second.double() - true_gap
    assert abs(float(error.mean())) < 4 * float(error.std()) / math.sqrt(STATES) + 5e-3 * float(true_gap.abs().mean())


@pytest.mark.parametrize("k", LEVELS)
@pytest.mark.parametrize("name", REWARDS)
def test_continuations_tell_the_expected_reward(measured: Measured, name: str, k: int) -> None:
    """Means of continuations, and of their differences, scatter around the exact values as much as they say."""
    pairs, truth = as_pairs(measured.pairs[k][name]), measured.truth(k, REWARDS[name])
    difference = truth[:, 0] - truth[:, 1]
    # Siblings share their noises, so the state is the unit.
    for error, variance in (
        ((pairs.truth - truth).mean(1, keepdims=True), None),
        (pairs.truth - truth, pairs.noise_of_each),
        ((pairs.true_difference - difference)[:, None], pairs.noise[:, None]),
    ):
        off = (error if variance is None else error**2 - variance).mean(1)
        assert abs(off.mean()) < 4 * off.std() / math.sqrt(STATES)
        if variance is not None:
            assert 0.6 < np.mean(error**2) / np.mean(variance) < 1.6


@pytest.mark.parametrize("k", LEVELS)
@pytest.mark.parametrize("name", REWARDS)
def test_gaps_misranking_and_correlation_against_the_exact_ones(measured: Measured, name: str, k: int) -> None:
    pairs, truth = as_pairs(measured.pairs[k][name]), measured.truth(k, REWARDS[name])
    difference, guessed = truth[:, 0] - truth[:, 1], pairs.guess[:, 0] - pairs.guess[:, 1]
    wrong = float(np.mean(disagreement(difference, guessed)))
    found = misranking(pairs, pairs.guess)
    assert found.low is not None
    assert found.high is not None
    assert found.low <= wrong <= found.high
    assert abs(found.value - wrong) < 0.1
    rho = float(np.mean(difference * guessed) / np.sqrt(np.mean(difference**2) * np.mean(guessed**2)))
    assert abs(share_of(rho) - wrong) < 0.15, "the rule for normal differences, roughly"
    linked = correlation(pairs, pairs.guess)
    assert linked is not None
    assert linked.low is not None
    assert linked.high is not None
    assert linked.low - 0.05 <= rho <= linked.high + 0.05
    v = signal(pairs)
    assert v.low is not None
    assert v.high is not None
    assert 0.9 * v.low <= np.mean(difference**2) / 2 <= 1.1 * v.high
    gaps, true_gaps, seen = gap(pairs), truth - pairs.guess, pairs.truth - pairs.guess
    apart, seen_apart = true_gaps[:, 0] - true_gaps[:, 1], seen[:, 0] - seen[:, 1]
    for value, exact, scatter in (
        (gaps.rms, (true_gaps**2).mean(1), (seen**2 - pairs.noise_of_each).mean(1)),
        (gaps.difference, apart**2, seen_apart**2 - pairs.noise),
    ):
        assert abs(value**2 - exact.mean()) < 4 * (scatter - exact).std() / math.sqrt(STATES)


def test_the_variance_of_the_reward_is_the_sum_of_what_the_steps_decide() -> None:
    """Var r = Var Q(x_0) + sum_k V_k, as for any Markov chain; here with the exact Q of 100 steps, over all of them."""
    policy = Policy(mixture(), DDIM(steps=100, guidance_scale=1.0))
    keys = [("identity", i) for i in range(600)]
    walked = walk(policy, [""] * len(keys), noise=NOISE, keys=keys)
    model, schedule, reward = policy.model, policy.schedule, REWARDS["sine"]
    assert isinstance(model, GaussianMixture)

    def q(k: int, latents: Tensor) -> Tensor:
        known = ExactPosterior.of(model, latents, alpha=float(schedule.alpha[k]), sigma=float(schedule.sigma[k]))
        return known.expect(reward)

    generator = torch.Generator().manual_seed(0)
    decided = 0.0
    for k in range(100):
        drawn = torch.randn(2, len(keys), 4, 1, 1, generator=generator)
        one, two = walked.steps[k].gaussian.sample(drawn)
        values = torch.stack([q(k + 1, one), q(k + 1, two)], dim=1).numpy()
        decided += signal(Pairs(values, values, values[..., None])).value
    first = float(q(0, walked.latents[0]).var())
    final = reward.value(walked.latents[-1].flatten(1).double())
    variance = float(final.var())
    scatter = float(((final - final.mean()) ** 2).std()) / math.sqrt(len(keys))
    assert abs(first + decided - variance) < 4 * scatter


@given(
    seed=st.integers(0, 10**6),
    dimensions=st.integers(1, 5),
    abar=st.floats(0.003, 0.997),
    spread=st.floats(0.1, 4.0),
)
@settings(max_examples=150)
def test_bounds_are_never_violated(seed: int, dimensions: int, abar: float, spread: float) -> None:
    """With constants that hold everywhere, for every reward, mixture, noise level and state."""
    generator = torch.Generator().manual_seed(seed)
    model = mixture(seed, dimensions)
    alpha, sigma = math.sqrt(abar), math.sqrt(1 - abar)
    states = spread * torch.randn(20, dimensions, 1, 1, generator=generator)
    known = ExactPosterior.of(model, states, alpha=alpha, sigma=sigma)
    covariance = known.covariance
    trace = covariance.diagonal(dim1=1, dim2=2).sum(1)
    for reward in rewards(dimensions, seed + 1).values():
        size = (known.expect(reward) - reward.value(known.mean)).abs()
        slack = 1e-9 * (1 + size)
        assert bool((size <= smooth_bound(reward.curvature, trace) + slack).all())
        assert bool((size <= lipschitz_bound(reward.slope, trace) + slack).all())
        if reward.direction is not None and reward.ridge is not None:
            q = torch.einsum("a,nab,b->n", reward.direction, covariance, reward.direction)
            bend, rise = reward.ridge
            directional = torch.minimum(smooth_bound(bend, q), lipschitz_bound(rise, q))
            assert bool((size <= directional + slack).all())
            assert bool((directional <= smooth_bound(reward.curvature, trace) + slack).all())


def normal_pairs(generator: np.random.Generator, *, rho: float, noise: float, count: int, futures: int) -> Pairs:
    """Pairs whose guessed and true differences are normal with correlation rho; both siblings share a large gap."""
    true = generator.normal(size=count)
    guess = rho * true + math.sqrt(1 - rho**2) * generator.normal(size=count)
    ends = true[:, None] / 2 + noise * generator.normal(size=(count, futures)) / 2
    shared = 5 + generator.normal(size=(count, futures))  # common random numbers
    ends = np.stack([shared + ends, shared - ends], axis=1)
    guessed = np.stack([guess / 2, -guess / 2], axis=1)
    return Pairs(guessed, guessed, ends)


@pytest.mark.parametrize("rho", [0.95, 0.7, 0.2, -0.5])
def test_the_noise_of_the_truth_is_taken_out(rho: float) -> None:
    """Large samples: what is estimated under noise as large as the signal is what there is without."""
    pairs = normal_pairs(np.random.default_rng(3), rho=rho, noise=2.0, count=4_000, futures=4)
    linked = correlation(pairs, pairs.guess)
    assert linked is not None
    assert linked.value == pytest.approx(rho, abs=0.05)
    assert signal(pairs).value == pytest.approx(0.5, rel=0.12)
    true_share = math.acos(rho) / math.pi
    assert misranking(pairs, pairs.guess).value == pytest.approx(true_share, abs=0.04)
    assert share_of(linked.value) == pytest.approx(true_share, abs=0.04)
    # Without the correction it would be pushed towards one half.
    assert abs(raw_misranking(pairs, pairs.guess).value - 0.5) < abs(true_share - 0.5)


@pytest.mark.parametrize(("rho", "noise"), [(0.9, 0.3), (0.9, 2.0), (0.5, 1.0), (0.0, 1.0), (-0.6, 1.0)])
def test_the_interval_of_the_misranking_covers(rho: float, noise: float) -> None:
    """A nominal 95 % interval, over 300 measurements of 60 pairs."""
    generator, covered = np.random.default_rng(5), 0
    for _ in range(300):
        pairs = normal_pairs(generator, rho=rho, noise=noise, count=60, futures=4)
        found = misranking(pairs, pairs.guess)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= math.acos(rho) / math.pi <= found.high
    assert covered / 300 > 0.93
