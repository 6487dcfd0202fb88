"""The closed forms against torch.distributions and four log-densities in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailorpo.gaussian_step import GaussianStep

SHAPE = (3, 4, 5, 2)


def draw(seed: int, *, scale: float, std: float) -> tuple[GaussianStep, GaussianStep, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(SHAPE, generator=g, dtype=torch.float64)
    shift = scale * torch.randn(SHAPE, generator=g, dtype=torch.float64)
    first, second = (torch.randn(SHAPE, generator=g, dtype=torch.float64) for _ in range(2))
    return GaussianStep(mean + shift, std), GaussianStep(mean, std), first, second


def density(step: GaussianStep, x: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Normal(step.mean, step.std).log_prob(x).flatten(1).sum(dim=1)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-6, 2.0), st.floats(0.02, 1.0))
def test_pair_logit_is_the_difference_of_four_log_densities(seed: int, scale: float, std: float) -> None:
    policy, reference, z_winner, z_loser = draw(seed, scale=scale, std=std)
    # The candidates may come from a third, older policy: the logit must not care.
    behaviour = GaussianStep(reference.mean + 0.3, std)
    winner, loser = behaviour.sample(z_winner), behaviour.sample(z_loser)
    four = density(policy, winner) - density(reference, winner) - density(policy, loser) + density(reference, loser)
    torch.testing.assert_close(policy.pair_logit(z_winner - z_loser, reference), four, rtol=1e-6, atol=1e-8)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-4, 2.0), st.floats(0.02, 1.0))
def test_log_prob_log_ratio_and_kl_match_torch_distributions(seed: int, scale: float, std: float) -> None:
    policy, reference, z, _ = draw(seed, scale=scale, std=std)
    x = reference.sample(z)
    torch.testing.assert_close(policy.log_prob(x), density(policy, x))
    torch.testing.assert_close(
        policy.log_ratio(x, reference), density(policy, x) - density(reference, x), rtol=1e-6, atol=1e-7
    )
    normals = [torch.distributions.Normal(step.mean, step.std) for step in (policy, reference)]
    expected = torch.distributions.kl_divergence(normals[0], normals[1]).flatten(1).sum(dim=1)
    torch.testing.assert_close(policy.kl(reference), expected, rtol=1e-6, atol=1e-12)


def test_cached_projection_of_the_reference_gives_the_same_logit() -> None:
    policy, reference, z_winner, z_loser = draw(5, scale=0.01, std=0.2)
    origin = 0.9 * reference.mean
    difference = z_winner - z_loser
    cached = reference.projection(difference, origin)
    torch.testing.assert_close(
        policy.projection(difference, origin) - cached, policy.pair_logit(difference, reference), rtol=1e-8, atol=1e-9
    )


def test_float32_closed_form_survives_where_four_log_densities_do_not() -> None:
    g = torch.Generator().manual_seed(0)
    shape, std = (1, 4, 64, 64), 0.4279
    mean, direction, z_winner, z_loser = (torch.randn(shape, generator=g) for _ in range(4))
    kl = 1e-4
    shifted = mean + direction / direction.norm() * std * (2 * kl) ** 0.5
    policy, reference = GaussianStep(shifted, std), GaussianStep(mean, std)
    exact_steps = [GaussianStep(step.mean.double(), std) for step in (policy, reference)]
    exact = exact_steps[0].pair_logit((z_winner - z_loser).double(), exact_steps[1])
    closed = policy.pair_logit(z_winner - z_loser, reference)
    winner, loser = reference.sample(z_winner), reference.sample(z_loser)
    four = (policy.log_prob(winner) - reference.log_prob(winner)) - (policy.log_prob(loser) - reference.log_prob(loser))
    assert abs(float(closed - exact)) < 1e-3 * abs(float(exact))
    assert abs(float(four - exact)) > 20 * abs(float(closed - exact))


def test_spread_of_the_logit_is_twice_the_root_of_kl_in_any_dimension() -> None:
    g = torch.Generator().manual_seed(1)
    for dimension in (8, 2048):
        z = torch.randn(4000, 2, dimension, generator=g)
        direction = torch.randn(dimension, generator=g)
        policy = GaussianStep(0.3 * (direction / direction.norm()).expand(4000, -1), 1.0)
        reference = GaussianStep(torch.zeros(4000, dimension), 1.0)
        logits = policy.pair_logit(z[:, 0] - z[:, 1], reference)
        assert float(logits.std()) == pytest.approx(2 * float(policy.kl(reference)[0]) ** 0.5, rel=0.04)


def test_deterministic_steps_have_no_density() -> None:
    step = GaussianStep(torch.zeros(1, 2), 0.0)
    with pytest.raises(ValueError, match="eta > 0"):
        step.log_prob(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="one std"):
        GaussianStep(torch.zeros(1, 2), 0.1).kl(step)
