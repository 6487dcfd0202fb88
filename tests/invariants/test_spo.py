"""What must hold for every SPO run, on a tiny random Stable Diffusion and on the Gaussian mixture."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from counting import Counter
from torch import Tensor

from tailorpo.algorithms.pairs import CandidatePair
from tailorpo.algorithms.spo import SPO
from tailorpo.algorithms.tailorpo import TailorPO
from tailorpo.models.toy import GaussianMixture
from tailorpo.noise import Noise
from tailorpo.policy import Policy
from tailorpo.rollout import Trajectories, start_trajectories
from tailorpo.samplers import DDIM
from tailorpo.step_rewards import score_latents

MakePolicy = Callable[..., Policy]
PROMPTS = ["a cat", "a dog", "a red horse"]
STEPS = 6
OPEN: dict[str, Any] = {"threshold": 0.0, "first_step": 2}


def contrast(images: Tensor, prompts: Any) -> Tensor:
    return 360 * images.flatten(1).std(dim=1)


def start(policy: Policy, count: int = 2) -> Trajectories:
    return start_trajectories(policy, PROMPTS[:count], noise=Noise(0), keys=[("train", i) for i in range(count)])


def collect(policy: Policy, algorithm: SPO | TailorPO, count: int = 2, score: Any = contrast) -> list[CandidatePair]:
    trained = algorithm.trained_steps(policy.schedule.steps, noise=Noise(0), update=0)
    walk = algorithm.collect(policy, start(policy, count), trained=trained, score=score, noise=Noise(0))
    return list(walk)  # type: ignore[arg-type]


def gradients(policy: Policy, losses: list[Tensor]) -> dict[str, Tensor]:
    for parameter in policy.model.trainable().values():
        parameter.grad = None
    for loss in losses:
        loss.sum().backward()
    return {name: p.grad.clone() for name, p in policy.model.trainable().items() if p.grad is not None}


def move(policy: Policy, size: float, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.trainable().values():
            parameter += size * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_is_that_of_four_clamped_log_probabilities_in_float64(tiny_policy: MakePolicy, reduction: Any) -> None:
    """As the paper writes it: densities of both candidates on their own, ratios by exp, clamped, sigmoid; after the
    policy has moved on from the one that drew them, with a clamp that some branches reach."""
    policy = tiny_policy(steps=STEPS, moved=0.05)
    pairs = [pair.stored(policy) for pair in collect(policy, SPO(threshold=0.0, first_step=STEPS - 2), 3)]
    move(policy, 0.02, seed=5)

    def log_prob(mean: Tensor, std: float, x: Tensor) -> Tensor:
        each = torch.distributions.Normal(mean.double(), std).log_prob(x.double()).flatten(1)
        return each.mean(dim=1) if reduction == "mean" else each.sum(dim=1)

    def textbook(pair: Any, clip: float) -> tuple[Tensor, Tensor]:
        gaussian = policy.step(pair.latents, pair.k, pair.cond).gaussian
        reference = policy.reference_step(pair.latents, pair.k, pair.cond)
        ratios = torch.stack(
            [
                (log_prob(gaussian.mean, gaussian.std, x) - log_prob(reference.mean, gaussian.std, x)).exp()
                for x in (pair.winner, pair.loser)
            ]
        )
        first, second = ratios.clamp(1 - clip, 1 + clip).log()
        return -torch.sigmoid(10 * first - 10 * second).log(), ratios.detach()

    sizes = torch.stack([textbook(pair, 0.5)[1].log().abs() for pair in pairs])
    clip = float(sizes.median())
    algorithm = replace(SPO(**OPEN), reduction=reduction, clip=clip)
    expected, ratios = zip(*[textbook(pair, clip) for pair in pairs], strict=True)
    outside = (torch.stack(ratios) - 1).abs() > clip
    assert outside.any()
    assert not outside.all()
    losses = [algorithm.loss(policy, pair) for pair in pairs]
    torch.testing.assert_close(
        torch.stack(losses).detach().double(), torch.stack(expected).detach(), rtol=1e-4, atol=1e-6
    )
    got = gradients(policy, losses)
    wanted = gradients(policy, [*expected])
    assert max(float(value.abs().max()) for value in wanted.values()) > 0
    for name, value in got.items():
        torch.testing.assert_close(value, wanted[name], rtol=5e-3, atol=1e-6 + 1e-3 * float(value.abs().max()))


def test_the_clamp_bounds_the_loss_and_leaves_no_gradient_outside(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy(steps=STEPS, moved=0.05)
    algorithm = SPO(**OPEN)
    stored = collect(policy, algorithm)[0].stored(policy)
    for sign, bound in ((1.0, math.log1p((0.9 / 1.1) ** 10)), (-1.0, math.log1p((1.1 / 0.9) ** 10))):
        push = sign * 1e6 * (policy.step(stored.latents, stored.k, stored.cond).gaussian.mean - stored.reference.mean)
        far = replace(stored, winner=stored.winner + push.detach(), loser=stored.loser - push.detach())
        losses = algorithm.loss(policy, far)
        assert losses.tolist() == pytest.approx([bound] * 2, rel=1e-5)
        assert all(float(value.abs().max()) == 0 for value in gradients(policy, [losses]).values())
        unclamped = gradients(policy, [replace(algorithm, clip=None, beta=1e-9).loss(policy, far)])
        assert any(float(value.abs().max()) > 0 for value in unclamped.values())


def test_before_the_first_update_every_pair_that_is_kept_costs_log_two(tiny_policy: MakePolicy) -> None:
    policy, algorithm = tiny_policy(steps=STEPS), SPO(first_step=1, update="inline")
    pairs = collect(policy, algorithm)
    kept = torch.cat([pair.valid for pair in pairs])
    losses = torch.cat([algorithm.loss(policy, pair) for pair in pairs])
    assert 0 < int(kept.sum()) < len(kept)
    assert losses[kept].tolist() == pytest.approx([math.log(2)] * int(kept.sum()))
    assert (losses[~kept] == 0).all()
    assert all(pair.kl.tolist() == [0.0, 0.0] == pair.extra["clamped"].tolist() for pair in pairs)


def test_with_two_candidates_it_is_tailorpo_that_goes_on_from_a_random_one(tiny_policy: MakePolicy) -> None:
    """Same draws, same walk, same loss: what is left of the difference are clamp, threshold, mean and k."""
    policy = tiny_policy(steps=STEPS, moved=0.05)
    spo = SPO(candidates=2, beta=0.3, reduction="sum", clip=None, **OPEN)
    other = TailorPO(beta=0.3, train_steps=tuple(range(2, STEPS)), continue_from="random")
    first, second = collect(policy, replace(spo, update="inline")), collect(policy, other)
    assert len(first) == len(second) == STEPS - 2
    for pair, twin in zip(first, second, strict=True):
        torch.testing.assert_close(pair.next_latents, twin.next_latents, rtol=0, atol=0)
        torch.testing.assert_close(spo.loss(policy, pair), other.loss(policy, twin), rtol=1e-4, atol=1e-5)
    got = gradients(policy, [spo.loss(policy, pair) for pair in collect(policy, replace(spo, update="inline"))])
    for name, value in gradients(policy, [other.loss(policy, pair) for pair in collect(policy, other)]).items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-5)


def test_best_and_worst_of_all_candidates_make_the_pair(tiny_policy: MakePolicy) -> None:
    policy, seen = tiny_policy(steps=STEPS, moved=0.05), list[Tensor]()

    def score(images: Tensor, prompts: Any) -> Tensor:
        seen.append(contrast(images, prompts))
        return seen[-1]

    trajectories = start(policy)
    algorithm = SPO(candidates=5, **OPEN)
    trained = algorithm.trained_steps(STEPS, noise=Noise(0), update=0)
    assert trained == (2, 3, 4, 5)
    pairs = list(algorithm.collect(policy, trajectories, trained=trained, score=score, noise=Noise(0)))
    for pair, rewards in zip(pairs, seen, strict=True):
        by_candidate = rewards.view(5, 2)
        assert torch.equal(pair.reward_winner, by_candidate.amax(dim=0))
        assert torch.equal(pair.reward_loser, by_candidate.amin(dim=0))
        for latents, reward in ((pair.winner, pair.reward_winner), (pair.loser, pair.reward_loser)):
            again = score_latents(policy, latents, k=pair.k + 1, cond=pair.cond, prompts=pair.prompts, score=contrast)
            torch.testing.assert_close(again.reward, reward, rtol=1e-4, atol=1e-4)
        difference = (pair.winner - pair.loser) / pair.reference.std
        torch.testing.assert_close(difference, pair.noise_difference, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(pair.log_ratio_winner - pair.log_ratio_loser, pair.logit, rtol=1e-3, atol=1e-4)
    # The finished picture is a candidate of the last step, so its reward is known.
    assert trajectories.reward is not None
    finished = contrast(policy.model.decode(trajectories.latents), PROMPTS)
    torch.testing.assert_close(trajectories.reward, finished, rtol=1e-5, atol=1e-5)


def test_pairs_are_dropped_at_the_threshold_of_their_softmax(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy(steps=STEPS, moved=0.05)
    edge = 2 * math.atanh(0.3)
    gaps = torch.tensor([0.0, edge - 1e-3, edge + 1e-3])

    def score(images: Tensor, prompts: Any) -> Tensor:
        """Four candidates of three trajectories: best and worst `gaps` apart, two between them."""
        place = torch.tensor([0.0, 1.0, 0.4, 0.6])[: len(images) // 3]
        return 20 + (place[:, None] * gaps).flatten()

    algorithm = SPO(first_step=STEPS - 1)
    (pair,) = collect(policy, algorithm, 3, score=score)
    two = torch.softmax(torch.stack([pair.reward_winner, pair.reward_loser]).double(), dim=0)
    torch.testing.assert_close(pair.extra["softmax_gap"].double(), two[0] - two[1], rtol=1e-4, atol=1e-6)
    assert pair.valid.tolist() == [False, False, True]
    assert pair.figures()["kept"].tolist() == [0.0, 0.0, 1.0]
    assert pair.tie.tolist() == [True, False, False]
    assert algorithm.loss(policy, pair)[:2].tolist() == [0.0, 0.0]
    (kept,) = algorithm.prepare([pair.stored(policy)], {})
    assert torch.equal(kept.latents, pair.latents[2:])
    (loss,) = algorithm.loss(policy, kept)
    torch.testing.assert_close(loss, algorithm.loss(policy, pair)[2])
    (none,) = collect(policy, replace(algorithm, threshold=0.9), 3, score=score)
    assert algorithm.prepare([none.stored(policy)], {}) == []


def test_candidates_without_a_reward_are_neither_best_nor_worst(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy(steps=STEPS)

    def score(images: Tensor, prompts: Any) -> Tensor:
        nan = torch.nan  # rows: candidates; columns: three trajectories
        return torch.tensor([[nan, nan, nan], [1.0, nan, nan], [nan, 2.0, nan], [3.0, nan, nan]]).flatten()

    algorithm = SPO(first_step=STEPS - 1)
    (pair,) = collect(policy, algorithm, 3, score=score)
    assert pair.present.tolist() == [True, False, False] == pair.valid.tolist()
    assert (float(pair.reward_winner[0]), float(pair.reward_loser[0])) == (3.0, 1.0)
    assert algorithm.loss(policy, pair)[1:].tolist() == [0.0, 0.0]
    assert pair.next_latents.isfinite().all()


def test_the_walk_goes_on_from_every_rank_equally_often() -> None:
    """600 trajectories of the mixture: how often the best, ..., the worst of four candidates is chosen."""
    model = GaussianMixture(torch.ones(1), torch.zeros(1, 2), covariances=torch.eye(2)[None])
    policy, noise, ranks = Policy(model, DDIM(steps=4, guidance_scale=1.0)), Noise(3), list[Tensor]()
    rewards: list[Tensor] = []

    def score(latents: Tensor, prompts: Any) -> Tensor:
        rewards.append(latents.flatten(1)[:, 0])
        return rewards[-1]

    trajectories = start_trajectories(policy, [""] * 600, noise=noise, keys=[("t", i) for i in range(600)])
    algorithm = SPO(first_step=1)
    for pair in algorithm.collect(policy, trajectories, trained=(1, 2, 3), score=score, noise=noise):
        cond = policy.model.encode([""] * 600)
        chosen = score_latents(policy, pair.next_latents, k=pair.k + 1, cond=cond, prompts=[""] * 600, score=score)
        by_candidate = rewards[-2].view(4, 600)
        ranks.append((by_candidate > chosen.reward + 1e-5).sum(dim=0))
    for rank in ranks:
        counts = torch.bincount(rank, minlength=4)
        assert len(counts) == 4
        assert float(((counts - 150) ** 2 / 150).sum()) < 16.3  # chi-square with 3 degrees of freedom, p = 0.001
    assert float(torch.corrcoef(torch.stack(ranks).float())[0, 1].abs()) < 0.15


@pytest.mark.parametrize("update", ["inline", "buffered"])
@pytest.mark.parametrize("dropped", [False, True])
def test_network_evaluations_are_those_that_are_announced(tiny_policy: MakePolicy, update: Any, dropped: bool) -> None:
    policy = tiny_policy(steps=STEPS)
    counted = Counter(policy, contrast)
    for first, candidates in ((0, 3), (2, 4), (STEPS - 1, 2)):
        counted.items = counted.queries = backwards = saved = 0
        algorithm = SPO(
            update=update,
            candidates=candidates,
            first_step=first,
            threshold=0.3 if dropped else 0.0,
            inner_epochs=1 if update == "inline" else 2,
        )
        trained, stored = algorithm.trained_steps(STEPS, noise=Noise(0), update=0), list[Any]()
        trajectories = start(policy, 1)
        for pair in algorithm.collect(policy, trajectories, trained=trained, score=counted.score, noise=Noise(0)):
            if update == "inline":
                algorithm.loss(policy, pair).sum().backward()
                backwards += 1
            else:
                stored.append(pair.stored(policy))
                saved += 2 * int((~pair.valid).sum())
        for _ in range(algorithm.inner_epochs):
            for each in algorithm.prepare(stored, {}):
                algorithm.loss(policy, each).sum().backward()
                backwards += 1
        cost = algorithm.cost(STEPS, trained)
        assert trajectories.reward is not None  # nothing is left to score
        assert counted.items == 2 * (cost.forwards - saved)  # guidance: two items an evaluation
        assert (backwards, counted.queries) == (cost.backwards - saved, cost.reward_queries)
        assert dropped or not saved


def test_the_cost_of_the_official_settings() -> None:
    """20 steps, 4 candidates from step 4 on; the official code needs 129 forwards and 32 backwards."""
    for update, forwards in (("inline", 96), ("buffered", 97)):
        algorithm = SPO(update=update)
        cost = algorithm.cost(20, algorithm.trained_steps(20, noise=Noise(0), update=0))
        assert (cost.forwards, cost.backwards, cost.reward_queries) == (forwards, 16, 64)


def test_inline_and_buffered_give_the_same_gradient(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy(steps=STEPS, moved=0.05)
    inline, buffered = SPO(update="inline", first_step=1), SPO(first_step=1)
    expected = gradients(policy, [inline.loss(policy, pair) for pair in collect(policy, inline)])
    stored = buffered.prepare([pair.stored(policy) for pair in collect(policy, buffered)], {})
    assert 0 < sum(len(each) for each in stored) < 2 * (STEPS - 1)
    rows = [each.rows(torch.tensor([row])) for each in stored for row in range(len(each))]
    for name, value in gradients(policy, [buffered.loss(policy, row) for row in rows]).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "settings", [{"beta": 0.0}, {"clip": 1.0}, {"candidates": 1}, {"threshold": 1.0}, {"minibatch": 0}]
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        SPO(**settings)


def test_the_first_step_has_to_be_one_of_the_samplers() -> None:
    (problem,) = SPO(first_step=6).problems(sampler=DDIM(steps=6), differentiable=False, trainable=True)
    assert "first_step must be in 0..5" in problem
    assert SPO(first_step=5).problems(sampler=DDIM(steps=6), differentiable=False, trainable=True) == []
