"""The forms of guidance against brute force in float64: what they do to the logit, to the noise and to the drift."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal
from torch.nn.functional import cosine_similarity

from tailorpo.algorithms.guided import Moved, move_pair
from tailorpo.algorithms.tailorpo import TailorPO
from tailorpo.experiments.pair_worth import BASIS, summary
from tailorpo.gaussian_step import GaussianStep
from tailorpo.guidance import Anneal, SigmaGuidance, length, on_shell
from tailorpo.policy import PolicyStep
from tailorpo.rollout import Branch
from tailorpo.samplers import DDIM

STD, SHAPE = 0.3, (2, 4, 4)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reward(x: Tensor) -> Tensor:
    return torch.sin(x).flatten(1).sum(dim=1)


class Fixed:
    """A branch of three trajectories with two candidates each; candidate 0 is the winner."""

    def __init__(self) -> None:
        self.noises, self.mean = randn(2, 3, *SHAPE, seed=1), randn(3, *SHAPE, seed=2)
        self.reference = self.mean + 0.05 * randn(3, *SHAPE, seed=3)
        self.latents = (self.mean + STD * self.noises).flatten(0, 1)
        self.winner, self.loser = torch.arange(3), torch.arange(3) + 3

    def moved(self, guidance: SigmaGuidance) -> Moved:
        scored: Any = SimpleNamespace(
            latents=self.latents, step=None, reward=reward(self.latents), gradient=torch.cos(self.latents)
        )
        step = PolicyStep(GaussianStep(self.mean, STD), self.mean)
        unused: Any = SimpleNamespace(schedule=SimpleNamespace(steps=20))
        branch = Branch(4, self.mean, step, self.noises, scored)
        return move_pair(guidance, unused, branch, unused, self.winner, self.loser, score=unused)

    def after(self, moved: Moved) -> tuple[Tensor, Tensor]:
        return self.latents[self.winner] + moved.push, self.latents[self.loser] + moved.push_loser


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_push_adds_k_g_u_to_the_logit_of_four_log_densities(symmetric: bool) -> None:
    fixed, k = Fixed(), 2.5
    candidates = fixed.after(fixed.moved(SigmaGuidance(k=k, symmetric=symmetric)))
    ratios = [
        (Normal(fixed.mean, STD).log_prob(x) - Normal(fixed.reference, STD).log_prob(x)).flatten(1).sum(dim=1)
        for x in candidates
    ]
    gradient = torch.cos(fixed.latents[:3]) + (torch.cos(fixed.latents[3:]) if symmetric else 0)
    u = ((fixed.mean - fixed.reference) / STD).flatten(1)
    along = (gradient.flatten(1) * u).sum(dim=1) / length(gradient)
    plain = ((fixed.noises[0] - fixed.noises[1]).flatten(1) * u).sum(dim=1)
    torch.testing.assert_close(ratios[0] - ratios[1], plain + k * along)
    middle = (candidates[0] + candidates[1] - fixed.latents[:3] - fixed.latents[3:]) / 2
    assert (float(middle.abs().max()) < 1e-15) == symmetric


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_gain_is_how_much_the_gap_widens(symmetric: bool) -> None:
    fixed = Fixed()
    for k in (0.02, 0.01):
        moved = fixed.moved(SigmaGuidance(k=k, symmetric=symmetric))
        winner, loser = fixed.after(moved)
        widened = reward(winner) - reward(loser) - reward(fixed.latents[:3]) + reward(fixed.latents[3:])
        assert float(widened.min()) > 0
        # what is left out is of second order
        assert float((moved.gain - widened).abs().max()) < (k * STD) ** 2


def test_the_shell_keeps_the_length_of_every_noise_and_the_direction_of_the_push() -> None:
    fixed = Fixed()
    for symmetric in (False, True):
        free, bound = (fixed.moved(SigmaGuidance(k=4.0, symmetric=symmetric, shell=shell)) for shell in (False, True))
        for side, push, shelled in ((0, free.push, bound.push), (1, free.push_loser, bound.push_loser)):
            drawn = fixed.noises[side].flatten(1)
            moved, kept = ((fixed.noises[side] + each / STD).flatten(1) for each in (push, shelled))
            torch.testing.assert_close(kept.norm(dim=1), drawn.norm(dim=1), rtol=1e-14, atol=0)
            torch.testing.assert_close(cosine_similarity(kept, moved), torch.ones(3, dtype=torch.float64))
            turned = torch.acos(cosine_similarity(drawn, moved).clamp(max=1))
            assert bool((length(shelled) * torch.cos(turned / 2) <= length(push) + 1e-12).all())
    noise = fixed.noises[0].float()
    kept = noise + on_shell(torch.cos(noise), noise, std=STD) / STD
    torch.testing.assert_close(kept.flatten(1).norm(dim=1), noise.flatten(1).norm(dim=1), rtol=1e-6, atol=0)


GAPS = np.linspace(0, 12, 2001)
"""|N(0, 2)|, far enough out and finely enough for sums over them to be integrals to five digits."""
WEIGHTS = (
    2 * np.exp(-(GAPS**2) / 4) / math.sqrt(4 * math.pi) * np.where((GAPS == 0) | (GAPS == 12), 0.5, 1.0) * 12 / 2000
)


def drift(beta: float, size: float, k: float) -> float:
    """E[beta X sigmoid(-beta size X)] for X = |N(0, 2)| + k: the pull of hard-label DPO at |u| = size."""
    values = beta * (GAPS + k)
    return float((WEIGHTS * values / (1 + np.exp(values * size))).sum())


def time_to(beta: float, size: float, k: float) -> float:
    """How long a gradient flow takes to |u| = size."""
    middles = (np.arange(400) + 0.5) * size / 400
    return float(np.mean([size / drift(beta, float(at), k) for at in middles]))


@pytest.mark.parametrize("k", [0.5, 2.0, 8.0])
def test_corrected_beta_keeps_the_pull_and_where_it_fades(k: float) -> None:
    beta = 0.2
    corrected = TailorPO(beta=beta, guidance=SigmaGuidance(k=k, corrected_beta=True)).at(0).beta
    assert drift(corrected, 0.0, k) == pytest.approx(drift(beta, 0.0, 0.0), rel=1e-5)
    for reached in (0.3, 1.0, 3.0):
        plain, guided = time_to(beta, reached / beta, 0.0), time_to(corrected, reached / beta, k)
        assert guided == pytest.approx(plain, rel=0.25)
        assert abs(math.log(time_to(beta, reached / beta, k) / plain)) > abs(math.log(guided / plain))
    # Far out the plain loss pulls on and the guided one has stopped.
    assert drift(corrected, 10 / beta, k) < 0.25 * drift(beta, 10 / beta, 0.0)


@pytest.mark.parametrize("k", [1.0, 3.0])
def test_a_guided_pair_is_worth_its_gain_squared_in_plain_pairs(k: float) -> None:
    """Signal to noise of the gradient with respect to u, by Monte Carlo on a linear reward."""
    count, size = 20_000, 32
    noises, along = randn(2, count, size, seed=5), torch.nn.functional.normalize(randn(size, seed=6), dim=0)
    difference = noises[0] - noises[1]
    difference = difference * torch.sign(difference @ along)[:, None]
    guidance = SigmaGuidance(k=k)
    push = guidance.push(along.view(1, -1, 1, 1), torch.zeros(1), std=1.0, progress=0.0).flatten()

    def signal_to_noise(gradients: Tensor) -> float:
        mean = gradients.mean(dim=0)
        noise = (gradients - mean).square().sum(dim=1).mean()
        return float((mean.square().sum() - noise / count) / noise)

    worth = signal_to_noise(difference + push) / signal_to_noise(difference)
    assert worth == pytest.approx(guidance.gain**2, rel=0.04)


def test_annealing_runs_from_k_to_its_end_and_takes_beta_with_it() -> None:
    guidance = SigmaGuidance(k=8.0, anneal=Anneal(to=1.0, over=7), corrected_beta=True)
    ks = [guidance.at(update).k for update in (0, 1, 6, 7, 100)]
    assert ks == [8.0, 7.0, 2.0, 1.0, 1.0]
    algorithm = TailorPO(beta=0.2, guidance=guidance)
    for update in (0, 7):
        at = algorithm.at(update)
        assert at.guidance == SigmaGuidance(k=guidance.at(update).k, corrected_beta=True)
        assert at.beta == pytest.approx(0.2 / guidance.at(update).gain)
    plain = TailorPO(guidance=SigmaGuidance(k=3.0))
    assert plain.at(5) == plain
    assert TailorPO().at(5) == TailorPO()


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ValueError, match=r"anneal.to must be a positive number, got 0.*use null"):
        Anneal(to=0, over=3)
    with pytest.raises(ValueError, match=r"anneal.over .* at least 1, got 0"):
        Anneal(to=1, over=0)
    soft = TailorPO(labels="soft", tau=1.0, guidance=SigmaGuidance(corrected_beta=True))
    (problem,) = soft.problems(sampler=DDIM(), differentiable=True, trainable=True)
    assert "corrected_beta is for hard labels" in problem


def test_the_worth_that_the_experiment_finds_in_a_linear_world_is_that_of_theory() -> None:
    """Gradients are the directions themselves. The winner's gradient is half wrong, the judge's ranking agrees."""
    rng, size, blocks, each = np.random.default_rng(0), 24, 20, 400
    right, wrong = np.eye(size)[0], np.eye(size)[1]
    sums, gram = np.zeros((blocks, len(BASIS), size)), np.zeros((blocks, len(BASIS), len(BASIS)))
    for block in range(blocks):
        z = rng.standard_normal((each, 4, size))
        ranked = np.take_along_axis(z, np.argsort(-z[:, :, :1], axis=1), axis=1)
        pair = z[:, 0] - z[:, 1]
        six = np.mean([ranked[:, i] - ranked[:, j] for i in range(4) for j in range(i + 1, 4)], axis=0)
        ones = np.ones((each, 1))
        parts = [np.sign(pair[:, :1]) * pair, ranked[:, 0] - ranked[:, 3], six, six]
        found = np.stack([*parts, ones * (right + wrong) / math.sqrt(2), ones * right], axis=1)
        sums[block], gram[block] = found.sum(0), np.einsum("nap,nbp->ab", found, found)
    content = summary(np.einsum("iap,jbp->iajb", sums, sums), gram, np.full(blocks, float(each)))
    kinds = {kind["name"]: kind for kind in content["kinds"]}
    assert content["trajectories"] == blocks * each
    for name in ("best and worst of four", "all six pairs of four", "symmetric, k 2", "symmetric, k 8"):
        value, low, high = kinds[name]["worth"]
        assert value == pytest.approx(kinds[name]["predicted"], rel=0.06)
        assert low < value < high
        assert kinds[name]["cosine"][0] == pytest.approx(1, abs=0.01)
    half = kinds["guided, k 8"]
    assert half["progress"][0] == pytest.approx(1 + 8 / math.sqrt(2) * math.sqrt(math.pi) / 2, rel=0.03)
    assert half["cosine"][0] < 0.8
    assert half["judge"][0] == pytest.approx(1, abs=0.02)
