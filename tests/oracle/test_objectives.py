"""Losses by hand arithmetic, and guidance by the formulas of the paper."""

from __future__ import annotations

import math

import pytest
import torch

from tailorpo.guidance import SigmaGuidance, TargetGuidance
from tailorpo.objectives import dpo, soft_dpo


def test_dpo_by_hand() -> None:
    logits = torch.tensor([0.0, 2.0, -2.0], dtype=torch.float64)
    expected = [math.log(2), math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))]
    assert dpo(logits, beta=0.5).tolist() == pytest.approx(expected, rel=1e-12)


def test_soft_labels_are_a_cross_entropy_with_its_minimum_at_the_label() -> None:
    probability = torch.tensor([0.7, 0.2], dtype=torch.float64)
    logits = torch.tensor([0.3, -1.1], dtype=torch.float64)
    model = torch.distributions.Bernoulli(logits=0.25 * logits)
    expected = -(probability * model.log_prob(torch.ones(2)) + (1 - probability) * model.log_prob(torch.zeros(2)))
    torch.testing.assert_close(soft_dpo(logits, beta=0.25, probability=probability), expected)
    best = (torch.logit(probability) / 0.25).requires_grad_()
    soft_dpo(best, beta=0.25, probability=probability).sum().backward()
    assert best.grad is not None
    assert best.grad.abs().max() < 1e-12


def test_swapping_winner_and_loser_negates_the_gradient_at_the_reference() -> None:
    for logit_of in (lambda shift: 3.0 * shift, lambda shift: -3.0 * shift):
        shift = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        dpo(logit_of(shift), beta=0.1).sum().backward()
        assert shift.grad is not None
        assert float(shift.grad) == pytest.approx(-0.1 * float(logit_of(1.0)) / 2)


def test_target_guidance_is_eq_14_by_finite_differences() -> None:
    x = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def reward(at: torch.Tensor) -> torch.Tensor:
        return torch.sin(at).flatten(1).sum(dim=1)

    eta, high = 0.15, 9.0
    numerical = torch.zeros_like(x)
    for index in range(x[0].numel()):
        bump = torch.zeros_like(x).flatten(1)
        bump[:, index] = 1e-5
        plus, minus = ((high - reward(x + sign * bump.view_as(x))) ** 2 for sign in (1, -1))
        numerical.flatten(1)[:, index] = (plus - minus) / 2e-5
    push = TargetGuidance(eta=eta, target=high).push(torch.cos(x), reward(x), std=0.3, progress=0.0)
    torch.testing.assert_close(push, -eta * numerical, rtol=1e-6, atol=1e-8)


def test_target_guidance_never_pushes_down_and_respects_its_trust_region() -> None:
    gradient = torch.full((2, 1, 2, 2), 0.5)
    rewards = torch.tensor([5.0, 0.0])
    push = TargetGuidance(eta=0.2, target=2.0).push(gradient, rewards, std=0.1, progress=0.5)
    assert push[0].abs().max() == 0
    assert float(push[1].norm()) == pytest.approx(2 * 0.2 * 2.0 * 1.0)
    clipped = TargetGuidance(eta=0.2, target=2.0, trust_region=1.5).push(gradient, rewards, std=0.1, progress=0.5)
    assert float(clipped[1].norm()) == pytest.approx(0.15)


def test_cosine_schedule_runs_from_one_tenth_to_two_tenths() -> None:
    guidance = TargetGuidance(delta=0.5)
    values = [guidance.eta_at(progress) for progress in (0.0, 0.5, 1.0)]
    assert values == pytest.approx([0.1, 0.15, 0.2])


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e6])
def test_sigma_guidance_moves_k_sigma_whatever_the_units_of_the_reward(scale: float) -> None:
    gradient = scale * torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    push = SigmaGuidance(k=1.5).push(gradient, torch.zeros(3), std=0.2, progress=0.0)
    torch.testing.assert_close(push.flatten(1).norm(dim=1), torch.full((3,), 0.3, dtype=torch.float64))
    torch.testing.assert_close(push / 0.3, gradient / gradient.flatten(1).norm(dim=1).view(3, 1, 1, 1))


def test_a_missing_gradient_moves_nothing() -> None:
    gradient = torch.ones(3, 1, 2, 2)
    gradient[0], gradient[1, 0, 0, 0] = 0.0, torch.nan
    for guidance in (SigmaGuidance(), TargetGuidance(delta=0.5)):
        push = guidance.push(gradient, torch.tensor([1.0, torch.nan, 1.0]), std=0.5, progress=0.0)
        assert push[:2].abs().max() == 0
        assert push[2].abs().min() > 0


def test_impossible_guidance_is_refused() -> None:
    with pytest.raises(ValueError, match="either delta or target"):
        TargetGuidance(delta=0.5, target=1.0)
    with pytest.raises(ValueError, match="k must be positive"):
        SigmaGuidance(k=0)
