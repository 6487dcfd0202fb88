"""D3PO, DDPO and reward backpropagation against float64 oracles that are derived another way.

The oracles know latents, predicted means and standard deviations alone: log-probabilities come from
torch.distributions, one branch at a time, gradients from autograd through them or from finite differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tailorpo.algorithms.d3po import D3PO, ChainPair
from tailorpo.algorithms.ddpo import DDPO, Transition
from tailorpo.algorithms.reward_backprop import RewardBackprop
from tailorpo.models import Conditioning
from tailorpo.models.toy import GaussianMixture
from tailorpo.noise import Noise
from tailorpo.objectives import ppo_clip
from tailorpo.policy import Policy
from tailorpo.rollout import Trajectories, start_trajectories
from tailorpo.samplers import DDIM

MakePolicy = Callable[..., Policy]
PROMPTS = ["a cat", "a dog", "a red horse"]


def contrast(images: Tensor, prompts: Any) -> Tensor:
    return 10 * images.flatten(1).std(dim=1)


def start(policy: Policy, count: int) -> Trajectories:
    return start_trajectories(policy, PROMPTS[:count], noise=Noise(0), keys=[("train", i) for i in range(count)])


def collect(policy: Policy, algorithm: D3PO | DDPO, count: int = 3) -> list[Any]:
    steps = policy.schedule.steps
    samples = algorithm.collect(
        policy, start(policy, count), trained=tuple(range(steps)), score=contrast, noise=Noise(0)
    )
    return [sample.stored(policy) for sample in samples]


def gradient(policy: Policy, losses: Tensor) -> Tensor:
    """Of the sum, all parameters in one vector, float64."""
    parameters = list(policy.model.trainable().values())
    return torch.cat(
        [value.flatten() for value in torch.autograd.grad(losses.sum(), parameters, retain_graph=True)]
    ).double()


def move(policy: Policy, size: float) -> None:
    """One random step of the LoRA, as if updates had been made since the samples were drawn."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in policy.model.trainable().values():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def log_prob(mean: Tensor, x: Tensor, *, std: float, reduction: str) -> Tensor:
    each = torch.distributions.Normal(mean.double(), std).log_prob(x.double()).flatten(1)
    return each.mean(dim=1) if reduction == "mean" else each.sum(dim=1)


def published_d3po(policy: Policy, pair: ChainPair, algorithm: D3PO) -> tuple[Tensor, Tensor]:
    """The loss as the official code writes it, four log-probabilities from four evaluations, and the two ratios."""
    std = policy.sampler.std(policy.schedule, pair.k)
    ratios: list[Tensor] = []
    for side in (0, 1):
        x, after = pair.latents[:, side], pair.next_latents[:, side]
        ours = log_prob(policy.step(x, pair.k, pair.cond).gaussian.mean, after, std=std, reduction=algorithm.reduction)
        reference = policy.reference_step(x, pair.k, pair.cond).mean
        ratios.append(torch.exp(ours - log_prob(reference, after, std=std, reduction=algorithm.reduction)))
    inside = ratios if algorithm.clip is None else [r.clamp(1 - algorithm.clip, 1 + algorithm.clip) for r in ratios]
    logit = algorithm.beta * (inside[0].log() - inside[1].log())
    return torch.log1p(torch.exp(-logit)), torch.stack(ratios, dim=1).detach()


@pytest.mark.parametrize(
    "algorithm",
    [
        D3PO(),  # the official settings
        D3PO(beta=50.0, clip=3e-4),  # a logit of order 1, and branches on both sides of the clamp
        D3PO(beta=0.5, reduction="sum", clip=None),  # the textbook
        D3PO(beta=0.5, reduction="sum", clip=0.15),
    ],
)
def test_d3po_is_the_published_formula(tiny_policy: MakePolicy, algorithm: D3PO) -> None:
    policy = tiny_policy(steps=3, moved=0.02)
    outside: set[tuple[bool, ...]] = set()
    for pair in collect(policy, algorithm):
        expected, ratios = published_d3po(policy, pair, algorithm)
        loss = algorithm.loss(policy, pair)
        # Of the loss's distance to log 2, in which all the information is.
        torch.testing.assert_close(loss.double() - math.log(2), expected - math.log(2), rtol=5e-3, atol=2e-7)
        slope = gradient(policy, expected)
        torch.testing.assert_close(gradient(policy, loss), slope, rtol=0, atol=2e-3 * float(slope.abs().max()) + 1e-12)
        if algorithm.clip is not None:
            outside |= {tuple(row) for row in ((ratios - 1).abs() > algorithm.clip).tolist()}
    if algorithm.clip not in (None, 0.1):
        assert len(outside) >= 3, f"none, one or both branches outside the clamp should occur, got {outside}"


def test_what_d3po_logs_are_those_log_ratios_in_nats(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy(steps=3, moved=0.02)
    for pair in collect(policy, D3PO()):
        std = policy.sampler.std(policy.schedule, pair.k)
        figures = pair.figures()
        for side, name in enumerate(("log_ratio_winner", "log_ratio_loser")):
            x, after = pair.latents[:, side], pair.next_latents[:, side]
            with torch.no_grad():
                mean = policy.step(x, pair.k, pair.cond).gaussian.mean
            reference = policy.reference_step(x, pair.k, pair.cond).mean
            nats = log_prob(mean, after, std=std, reduction="sum") - log_prob(
                reference, after, std=std, reduction="sum"
            )
            torch.testing.assert_close(figures[name].double(), nats, rtol=1e-3, atol=1e-4)
            kl = torch.distributions.kl_divergence(
                torch.distributions.Normal(mean.double(), std), torch.distributions.Normal(reference.double(), std)
            )
            torch.testing.assert_close(pair.kl[:, side].double(), kl.flatten(1).sum(dim=1), rtol=1e-3, atol=1e-5)


def test_ddpo_is_ppos_clipped_surrogate_of_mean_log_probabilities(tiny_policy: MakePolicy) -> None:
    """Samples drawn before, losses after the policy has moved, every combination of side and sign of the advantage."""
    policy, clip = tiny_policy(steps=3), 1e-4
    algorithm = DDPO(clip=clip)
    samples = collect(policy, algorithm)
    old = [sample.old_mean.clone() for sample in samples]
    move(policy, 2e-3)
    seen: set[tuple[int, int]] = set()
    for sample, old_mean in zip(samples, old, strict=True):
        std = policy.sampler.std(policy.schedule, sample.k)
        for sign in (1.0, -1.0):
            signed = replace(sample, advantage=sign * torch.tensor([0.5, 1.0, 3.0]))
            mean = policy.step(sample.latents, sample.k, sample.cond).gaussian.mean
            ratio = torch.exp(
                log_prob(mean, sample.next_latents, std=std, reduction="mean")
                - log_prob(old_mean, sample.next_latents, std=std, reduction="mean")
            )
            advantage = signed.advantage.double()
            # PPO's min of two objectives, case by case.
            wins = (advantage > 0) & (ratio > 1 + clip) | (advantage < 0) & (ratio < 1 - clip)
            bound = torch.where(advantage > 0, 1 + clip, 1 - clip).double()
            expected = torch.where(wins, -advantage * bound, -advantage * ratio)
            losses = algorithm.loss(policy, signed)
            torch.testing.assert_close(losses.double(), expected, rtol=2e-6, atol=1e-7)
            for row in range(3):
                slope = gradient(policy, losses[row])
                if wins[row]:
                    assert slope.abs().max() == 0
                else:
                    theirs = gradient(policy, (-advantage * ratio)[row])
                    assert theirs.abs().max() > 0
                    torch.testing.assert_close(slope, theirs, rtol=0, atol=2e-3 * float(theirs.abs().max()))
                side = int(ratio[row] > 1 + clip) - int(ratio[row] < 1 - clip)
                seen.add((side, int(sign)))
    assert {(1, 1), (1, -1), (-1, 1), (-1, -1)} <= seen


def test_ppo_clip_by_hand() -> None:
    ratio = torch.tensor([0.5, 0.95, 1.05, 2.0] * 2, dtype=torch.float64)
    advantage = torch.tensor([2.0] * 4 + [-2.0] * 4, dtype=torch.float64)
    log_ratio = ratio.log().requires_grad_()
    loss = ppo_clip(log_ratio, advantage, clip=0.1)
    assert loss.tolist() == pytest.approx([-1.0, -1.9, -2.1, -2.2, 1.8, 1.9, 2.1, 4.0])
    (slope,) = torch.autograd.grad(loss.sum(), log_ratio)
    assert slope.tolist() == pytest.approx([-1.0, -1.9, -2.1, 0.0, 0.0, 1.9, 2.1, 4.0])


def transitions(rewards: list[float], prompts: list[str], first: int, *, steps: int, micro: int) -> list[Transition]:
    """What collecting would leave of some trajectories, as far as their advantages are concerned."""
    nothing = torch.zeros(len(rewards), 1, 1, 1)
    found: list[Transition] = []
    for begin in range(0, len(rewards), micro):
        rows = slice(begin, begin + micro)
        part = nothing[rows]
        keys = [("train", first + begin + i) for i in range(len(part))]
        reward = torch.tensor(rewards[rows])
        found += [
            Transition(
                k=k,
                prompts=prompts[rows],
                keys=keys,
                cond=Conditioning(part, part),
                latents=part,
                next_latents=part,
                old_mean=part,
                reward=reward,
                advantage=torch.zeros_like(reward),
            )
            for k in range(steps)
        ]
    return found


@pytest.mark.parametrize(("history", "least", "limit"), [(4, 2, 5.0), (6, 6, 5.0), (3, 1, 0.8), (16, 16, 5.0)])
def test_advantages_are_per_prompt_over_the_latest_rewards(history: int, least: int, limit: float) -> None:
    """Several updates against a record of everything that ever happened, searched anew for every trajectory."""
    algorithm = DDPO(history=history, history_min=least, advantage_clip=limit)
    generator = np.random.default_rng(history)
    memory: dict[str, list[float]] = {}
    record: list[tuple[str, float]] = []
    kinds: dict[str, int] = {"own": 0, "batch": 0, "clipped": 0, "missing": 0}
    for update in range(8):
        prompts = [str(name) for name in generator.choice(["a", "b", "c"], 6, p=[0.6, 0.3, 0.1])]
        # float32 numbers, as rewards are
        rewards = [float(np.float32(value)) for value in generator.normal(size=6) + np.array([ord(p) for p in prompts])]
        if update in (2, 5):
            rewards[1] = math.nan
            rewards[4] = -math.inf
        whole = [(p, r) for p, r in zip(prompts, rewards, strict=True) if math.isfinite(r)]
        record += whole
        stored = algorithm.prepare(transitions(rewards, prompts, 6 * update, steps=3, micro=4), memory)
        found = {key: [] for each in stored for key in each.keys}
        for each in stored:
            for key, value in zip(each.keys, each.advantage.tolist(), strict=True):
                found[key].append(value)
        for row, (prompt, reward) in enumerate(zip(prompts, rewards, strict=True)):
            if not math.isfinite(reward):
                expected, kind = 0.0, "missing"
            else:
                own = [r for p, r in record if p == prompt][-history:]
                kind = "own" if len(own) >= least else "batch"
                known = np.array(own if kind == "own" else [r for _, r in whole])
                expected = (reward - known.mean()) / (known.std() + 1e-6)
                if abs(expected) > limit:
                    expected, kind = math.copysign(limit, expected), "clipped"
            kinds[kind] += 1
            assert found["train", 6 * update + row] == pytest.approx([expected] * 3, rel=1e-5, abs=1e-6), kind
    assert all(len(rewards) <= history for rewards in memory.values())
    assert memory == {p: [r for q, r in record if q == p][-history:] for p in memory}
    assert kinds["missing"] == 4
    assert kinds["batch" if least == 16 else "own"] > 0
    assert (kinds["clipped"] > 0) == (limit < 1)


def test_equal_rewards_have_no_advantage() -> None:
    for count in (1, 5):
        stored = DDPO().prepare(transitions([0.1] * count, ["a"] * count, 0, steps=1, micro=8), {})
        assert stored[0].advantage.tolist() == [0.0] * count
    missing = DDPO().prepare(transitions([math.nan] * 2, ["a"] * 2, 0, steps=1, micro=8), {})
    assert missing[0].advantage.tolist() == [0.0, 0.0]


def double_mixture(*, eta: float = 1.0, steps: int = 12) -> Policy:
    """A mixture of two Gaussians in the plane whose every number is float64."""
    model = GaussianMixture(
        torch.tensor([0.4, 0.6]),
        torch.tensor([[1.0, 0.3], [-0.7, 0.5]]),
        covariances=torch.tensor([[[0.4, 0.1], [0.1, 0.3]], [[0.2, 0.0], [0.0, 0.5]]]),
    )
    model.covariances = model.covariances.double()
    model._current = {name: nn.Parameter(value.detach().double()) for name, value in model._current.items()}
    return Policy(model, DDIM(steps=steps, eta=eta, guidance_scale=1.0))


def curved(latents: Tensor, prompts: Any) -> Tensor:
    x = latents.flatten(1)
    return torch.sin(x[:, 0]) * x[:, 1] + 0.3 * x[:, 0] ** 2


def end(policy: Policy, x: Tensor, *, first: int, key: tuple[Any, ...]) -> Tensor:
    """Walk one trajectory from x at step `first` to the end, drawing what the keys say."""
    with torch.no_grad():
        for k in range(first, policy.schedule.steps):
            gaussian = policy.step(x, k, policy.model.encode([""])).gaussian
            x = gaussian.mean + gaussian.std * Noise(0).normal(x.shape[1:], *key, "step", k)
    return x


def finite_differences(policy: Policy, *, depth: int, number: int) -> Tensor:
    """d reward / d parameters, where only the last `depth` steps see the parameters change."""
    key, first = ("train", number), policy.schedule.steps - depth
    before = Noise(0).normal(policy.model.latent_shape, *key, "initial").double()[None]
    for k in range(first):
        with torch.no_grad():
            gaussian = policy.step(before, k, policy.model.encode([""])).gaussian
            before = gaussian.mean + gaussian.std * Noise(0).normal(before.shape[1:], *key, "step", k)
    slopes: list[float] = []
    for parameter in policy.model.trainable().values():
        flat = parameter.data.view(-1)
        for index in range(len(flat)):
            middle, values = float(flat[index]), list[float]()
            for sign in (1, -1):
                flat[index] = middle + sign * 1e-5
                values.append(float(curved(end(policy, before, first=first, key=key), None)))
            flat[index] = middle
            slopes.append((values[0] - values[1]) / 2e-5)
    return torch.tensor(slopes, dtype=torch.float64)


def backprop(policy: Policy, algorithm: RewardBackprop, numbers: list[int]) -> Tensor:
    """The method's gradient of each row's loss, (B, P)."""
    keys = [("train", number) for number in numbers]
    trajectories = start_trajectories(policy, [""] * len(keys), noise=Noise(0), keys=keys)
    trajectories.latents = trajectories.latents.double()
    steps = policy.schedule.steps
    trained = algorithm.trained_steps(steps, noise=Noise(0), update=0)
    (finished,) = algorithm.collect(policy, trajectories, trained=trained, score=curved, noise=Noise(0))
    losses = algorithm.loss(policy, finished)
    parameters = list(policy.model.trainable().values())
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([value.flatten() for value in row]) for row in rows])


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("depth", [1, 2, 12])
def test_backpropagated_gradients_are_finite_differences(eta: float, depth: int) -> None:
    policy = double_mixture(eta=eta)
    found = backprop(policy, RewardBackprop(last_steps=depth), [0, 1])
    expected = torch.stack([finite_differences(policy, depth=depth, number=number) for number in (0, 1)])
    torch.testing.assert_close(found, -expected, rtol=1e-6, atol=1e-9)
    if depth < 12:
        deeper = backprop(policy, RewardBackprop(last_steps=depth + 1), [0, 1])
        assert float((deeper - found).abs().max()) > 1e-3, "the next step earlier has a part in the reward"


def test_random_truncation_draws_a_depth_for_every_trajectory() -> None:
    policy, numbers = double_mixture(), list(range(12))
    found = backprop(policy, RewardBackprop(last_steps=3, truncation="random"), numbers)
    fixed = torch.stack([backprop(policy, RewardBackprop(last_steps=depth), numbers) for depth in (1, 2, 3)])
    depths = (fixed - found).abs().amax(dim=2).argmin(dim=0)
    torch.testing.assert_close(found, fixed[depths, torch.arange(12)], rtol=1e-12, atol=1e-14)
    assert set(depths.tolist()) == {0, 1, 2}
    alone = torch.cat([backprop(policy, RewardBackprop(last_steps=3, truncation="random"), [n]) for n in numbers])
    torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-12)
