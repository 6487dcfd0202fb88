"""The controller of a KL target on plants whose answer is known, and beta from gaps by hand."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from tiny_run import settings

from tailorpo.algorithms.spo import SPO
from tailorpo.algorithms.tailorpo import TailorPO
from tailorpo.control import DEADBAND, PROPORTIONAL, adapted, gap_squares, observe
from tailorpo.errors import UserError
from tailorpo.models.toy import GaussianMixture
from tailorpo.policy import Policy
from tailorpo.run import Run
from tailorpo.samplers import DDIM

SOFT = TailorPO(beta=1.0, labels="soft", tau=1.0, kl_target=50.0)
HARD = TailorPO(beta=1.0, kl_target=50.0)


@pytest.fixture(scope="module")
def policy() -> Policy:
    model = GaussianMixture(torch.ones(1), torch.zeros(1, 2), covariances=torch.eye(2)[None], train_weights=False)
    return Policy(model, DDIM(steps=20, guidance_scale=1.0))


def figures(kl: float) -> dict[str, Any]:
    return {"kl_trajectory": kl, "by_step": []}


def used(method: TailorPO, memory: dict[str, list[float]]) -> TailorPO:
    found = adapted(method, memory)
    assert isinstance(found, TailorPO)
    return found


@pytest.mark.parametrize("start", [4.0, 1.0, 0.25])
def test_beta_brings_a_plant_of_exponent_minus_two_to_the_target_and_keeps_it_there(
    start: float, policy: Policy
) -> None:
    memory, noise, history = dict[str, list[float]](), random.Random(0), list[float]()
    at_target = 0.3  # the beta at which this plant has 50 nats
    for _ in range(150):
        beta = used(SOFT, memory).beta * start * at_target
        assert isinstance(beta, float)
        kl = 50 * (at_target / beta) ** 2
        history.append(kl)
        observe(SOFT, memory, figures(kl * math.exp(noise.gauss(0, 0.1))), policy)
    assert all(abs(math.log(kl / 50)) < math.log(1.2) for kl in history[-75:])
    if start != 1:
        assert abs(math.log(history[0] / 50)) > 1  # it had some way to go


@pytest.mark.parametrize("rate", [3e-3, 1e-3])
@pytest.mark.parametrize("start", [0.1, 1.0, 10.0])
def test_lambda_holds_parameters_that_adam_drives_away(start: float, rate: float, policy: Policy) -> None:
    """300 parameters under a constant force in noise three times as large, as hard labels that never are satisfied; the
    KL is the square of the way from the base, and the penalty's gradient is lambda times that way. `start` is how far
    off the first lambda is."""
    generator = torch.Generator().manual_seed(0)
    shift = torch.zeros(300, requires_grad=True)
    force, adam = torch.randn(300, generator=generator), torch.optim.Adam([shift], lr=rate)
    per_square, memory, history = 600 / (300 * 0.06**2 * 0.3), dict[str, list[float]](), list[float]()
    free, first = torch.zeros(300), used(HARD, {}).kl_penalty
    for _ in range(200):
        kl = per_square * float((shift.detach() ** 2).sum())
        history.append(kl)
        penalty = start * 0.173 * used(HARD, memory).kl_penalty / first  # at 0.173 it would rest near 50 nats
        noise = torch.randn(300, generator=generator)
        shift.grad = -force + 3 * noise + penalty * shift.detach() / 3e-3
        adam.step()
        free += rate * torch.sign(force)
        observe(HARD, memory, figures(kl * math.exp(0.15 * float(torch.randn((), generator=generator)))), policy)
    assert per_square * float((free**2).sum()) > 100 * 50  # where the force alone leads
    late = torch.tensor(history[100:])
    assert float(late.mean()) == pytest.approx(50, rel=0.2)
    assert float(((late / 50).log().abs() < math.log(1.2)).float().mean()) > 0.6
    assert float(late.max()) < 2 * 50


@pytest.mark.parametrize("method", [SOFT, HARD])
def test_within_the_deadband_the_integral_stands_still_and_beyond_it_moves_against_the_error(
    method: TailorPO, policy: Policy
) -> None:
    moves: list[float] = []
    for kl in (50 * math.exp(0.9 * DEADBAND), 50 * math.exp(-0.9 * DEADBAND), 100.0, 25.0, 50e6):
        memory = {"kl_mean": [kl]}
        observe(method, memory, figures(kl), policy)
        moves.append(memory.get("kl_integral", [0.0])[0])
    assert moves[:2] == [0, 0]
    assert moves[2] == pytest.approx(0.1 * 0.5 if method is SOFT else 0.1 * math.log(2))  # clipped at 1/2, or at 1
    assert moves[3] == -moves[2]
    assert moves[4] == pytest.approx(0.1 * 0.5 if method is SOFT else 0.1)


def test_on_the_way_up_the_integral_waits(policy: Policy) -> None:
    memory = dict[str, list[float]]()
    for kl in (0.0, 1.0, 3.0, 8.0, 20.0):
        observe(SOFT, memory, figures(kl), policy)
        assert memory.get("kl_integral", [0.0])[0] >= -0.05  # 0 nats of the first update may have moved it once
    for _ in range(20):
        observe(SOFT, memory, figures(20.0), policy)
    assert memory["kl_integral"][0] < -0.5


def test_without_a_target_nothing_changes_and_nothing_is_kept(policy: Policy) -> None:
    memory = dict[str, list[float]]()
    for method in (TailorPO(), TailorPO(labels="soft", tau=1.0, kl_penalty=0.1), SPO()):
        assert observe(method, memory, figures(50.0), policy) == {}
        assert adapted(method, memory) == method
    assert memory == {}


def test_the_factor_of_an_alarm_acts_on_beta_and_on_the_target() -> None:
    memory = {"beta_factor": [2.0]}
    assert used(TailorPO(beta=0.1), memory).beta == pytest.approx(0.2)
    assert used(SOFT, memory).beta == pytest.approx(2.0)
    # At twice the beta KL is a quarter, so a quarter is what the controller holds then.
    on_target = used(HARD, {"beta_factor": [2.0], "kl_mean": [12.5]}).kl_penalty
    above = used(HARD, {"beta_factor": [2.0], "kl_mean": [25.0]}).kl_penalty
    assert above == pytest.approx(2**PROPORTIONAL * on_target)


def test_beta_by_gaps_by_hand(policy: Policy) -> None:
    """Four steps: gaps of 3 seen at step 0 and of 1 at step 3; steps 1 and 2 take that of the nearer."""
    method = TailorPO(beta="auto", labels="soft", tau=0.5, kl_target=2.0)
    four = Policy(policy.model, DDIM(steps=4, guidance_scale=1.0))
    rows = {"by_step": [{"k": 0, "gap_rms": 3.0}, {"k": 3, "gap_rms": 1.0}, {"k": 2, "gap_rms": None}]}
    assert gap_squares(rows, four, normalised=False) == pytest.approx(9 + 9 + 1 + 1)
    assert used(method, {}).beta == pytest.approx(1 / math.sqrt(8))  # before any gap: sum s^2 = tau^2
    memory = dict[str, list[float]]()
    logged = observe(method, memory, rows, four)
    assert logged == {"beta": pytest.approx(1 / math.sqrt(8))}
    assert used(method, memory).beta == pytest.approx(math.sqrt(20 / 8) / 0.5)
    observe(method, memory, {"by_step": [{"k": 1, "gap_rms": 0.0}]}, four)
    assert memory["gap_squares"] == [pytest.approx(16.0)]
    # Normalised weights: by |d mean / d output| / std, here by finite differences of the sampler's step.
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    weights: list[float] = []
    for k in range(4):
        alpha, sigma = float(four.schedule.alpha[k]), float(four.schedule.sigma[k])
        steps = [
            four.sampler.step(x + x0, -(x + x0) * alpha / sigma, four.schedule, k=k) for x0 in (0.0, 1.0)
        ]  # at a fixed latent of 0
        weights.append(float((steps[1].mean - steps[0].mean).abs()) / steps[0].std)
    expected = sum(w**2 * s**2 for w, s in zip(weights, (3, 3, 1, 1), strict=True))
    assert gap_squares(rows, four, normalised=True) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": "auto", "kl_target": 50.0}, "beta: auto needs labels: soft"),
        ({"beta": "auto", "labels": "soft", "tau": 1.0}, "beta: auto needs algorithm.kl_target"),
        ({"beta": "car"}, "beta"),
        ({"kl_target": 50.0, "kl_measured": 0}, "kl_target needs the KL of all steps"),
        ({"kl_target": 50.0, "reference": {"ema": 0.9}}, "a moving reference lets go of"),
        ({"kl_target": -1.0}, "kl_target must be positive"),
        ({"kl_mask": 0.0}, "kl_mask must be positive"),
        ({"kl_penalty": -0.1}, "kl_penalty must be at least 0, got -0.1"),
        ({"kl_steps": [3]}, "kl_steps has no effect"),
        ({"kl_steps": [4], "kl_penalty": 0.1}, "kl_steps must be in 0..3"),
        ({"reference": {"ema": 0.9, "every": 3}}, "and not both"),
        ({"reference": {}}, "needs ema"),
        ({"reference": {"ema": 1.0}}, "ema must be between 0 and 1"),
        ({"reference": {"every": 0}}, "every must be at least 1"),
        ({"reference": "ema"}, "reference"),
    ],
)
def test_what_cannot_work_is_said(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Run.from_dict(settings("emoji", algorithm={"name": "tailorpo", "train_steps": 2, **changes}))
