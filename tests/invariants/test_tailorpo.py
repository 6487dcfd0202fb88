"""What must hold for every TailorPO run, on a tiny random Stable Diffusion."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import Counter
from torch import Tensor

from tailorpo.algorithms.pairs import Pair
from tailorpo.algorithms.tailorpo import Steps, TailorPO
from tailorpo.guidance import SigmaGuidance, TargetGuidance
from tailorpo.models import LoRA, ModelConfig
from tailorpo.noise import Noise
from tailorpo.policy import Policy
from tailorpo.rollout import Trajectories, rollout_chains, start_trajectories
from tailorpo.samplers import DDIM

MakePolicy = Callable[..., Policy]
PROMPTS = ["a cat", "a dog", "a red horse"]


def contrast(images: Tensor, prompts: Any) -> Tensor:
    return 10 * images.flatten(1).std(dim=1)


def start(policy: Policy, count: int = 2, *, seed: int = 0, first: int = 0) -> Trajectories:
    keys = [("train", first + i) for i in range(count)]
    return start_trajectories(policy, PROMPTS[first : first + count], noise=Noise(seed), keys=keys)


def collect(policy: Policy, algorithm: TailorPO, count: int = 2, **kwargs: Any) -> list[Pair]:
    noise = Noise(0)
    trained = algorithm.trained_steps(policy.schedule.steps, noise=noise, update=0)
    score = kwargs.pop("score", contrast)
    trajectories = start(policy, count, **kwargs)
    return list(algorithm.collect(policy, trajectories, trained=trained, score=score, noise=noise))


def gradients(policy: Policy) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in policy.model.trainable().items() if p.grad is not None}


def backward(policy: Policy, algorithm: TailorPO, pairs: list[Pair]) -> dict[str, Tensor]:
    for parameter in policy.model.trainable().values():
        parameter.grad = None
    for pair in pairs:
        algorithm.loss(policy, pair if pair.step else pair.stored(policy)).sum().backward()
    return gradients(policy)


def test_before_the_first_update_policy_and_reference_are_the_same_to_the_bit(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy()
    plain = tiny_policy(lora=LoRA(rank=1))
    x = Noise(1).normals(policy.model.latent_shape, [("a",), ("b",)])
    cond = policy.model.encode(PROMPTS[:2])
    with torch.no_grad():
        step = policy.step(x, 3, cond).gaussian
        without_any = plain.reference_step(x, 3, cond)
    assert torch.equal(step.mean, policy.reference_step(x, 3, cond).mean)
    assert torch.equal(step.mean, without_any.mean)
    for algorithm in (TailorPO(), TailorPO(update="buffered"), TailorPO(guidance=SigmaGuidance())):
        for pair in collect(policy, algorithm):
            losses = algorithm.loss(policy, pair if pair.step else pair.stored(policy))
            assert losses.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-5)
            assert pair.kl.tolist() == [0.0, 0.0]
            assert pair.logit.tolist() == [0.0, 0.0]


def test_the_pairs_gradient_is_that_of_four_log_probabilities_in_float64(tiny_policy: MakePolicy) -> None:
    """Autograd through the textbook form: exp-free, both candidates evaluated on their own, double precision sums."""
    policy, algorithm = tiny_policy(moved=0.05), TailorPO(beta=0.3, train_steps=(4,))
    (pair,) = collect(policy, algorithm)
    closed = backward(policy, algorithm, [pair])
    for parameter in policy.model.trainable().values():
        parameter.grad = None
    gaussian = policy.step(pair.latents, 4, pair.cond).gaussian
    std = gaussian.std
    # Any pair with this difference of noises will do; the logit depends on nothing else.
    loser = torch.randn(pair.latents.shape, generator=torch.Generator().manual_seed(3)).double()
    winner = loser + pair.noise_difference.double()
    behaviour = gaussian.mean.detach().double()

    def log_prob(mean: Tensor, z: Tensor) -> Tensor:
        return torch.distributions.Normal(mean.double(), std).log_prob(behaviour + std * z).flatten(1).sum(dim=1)

    reference = policy.reference_step(pair.latents, 4, pair.cond).mean
    logit = log_prob(gaussian.mean, winner) - log_prob(reference, winner)
    logit = logit - (log_prob(gaussian.mean, loser) - log_prob(reference, loser))
    (-torch.nn.functional.logsigmoid(0.3 * logit)).sum().backward()
    textbook = gradients(policy)
    torch.testing.assert_close(pair.logit.double(), logit.detach(), rtol=1e-4, atol=1e-4)
    for name, value in closed.items():
        torch.testing.assert_close(value, textbook[name], rtol=2e-3, atol=1e-5)


def test_swapping_winner_and_loser_negates_the_gradient_before_the_first_update(tiny_policy: MakePolicy) -> None:
    policy, algorithm = tiny_policy(), TailorPO(update="buffered", train_steps=(2, 9))
    pairs = [pair.stored(policy) for pair in collect(policy, algorithm)]
    both: list[dict[str, Tensor]] = []
    for sign in (1.0, -1.0):
        for parameter in policy.model.trainable().values():
            parameter.grad = None
        for pair in pairs:
            swapped = replace(
                pair,
                noise_difference=sign * pair.noise_difference,
                reference_projection=sign * pair.reference_projection,
            )
            algorithm.loss(policy, swapped).sum().backward()
        both.append(gradients(policy))
    assert any(value.abs().max() > 0 for value in both[0].values())
    for name, value in both[0].items():
        torch.testing.assert_close(value, -both[1][name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("guidance", [None, SigmaGuidance(k=1.0)])
def test_one_batch_of_three_is_three_batches_of_one(tiny_policy: MakePolicy, guidance: Any) -> None:
    policy, algorithm = tiny_policy(moved=0.05), TailorPO(guidance=guidance)
    together = collect(policy, algorithm, 3)
    whole = backward(policy, algorithm, together)
    parts: dict[str, Tensor] = {}
    for row in range(3):
        alone = collect(policy, algorithm, 1, first=row)
        for pair, batch in zip(alone, together, strict=True):
            torch.testing.assert_close(pair.latents[0], batch.latents[row], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(pair.reward_winner[0], batch.reward_winner[row], rtol=1e-3, atol=1e-3)
        for name, value in backward(policy, algorithm, alone).items():
            parts[name] = parts.get(name, torch.zeros_like(value)) + value
    for name, value in whole.items():
        torch.testing.assert_close(value, parts[name], rtol=2e-2, atol=2e-4)


def test_inline_and_buffered_give_the_same_gradient(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy(moved=0.05)
    inline, buffered = TailorPO(), TailorPO(update="buffered")
    expected = backward(policy, inline, collect(policy, inline))
    for name, value in backward(policy, buffered, collect(policy, buffered)).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


def test_permuting_the_batch_permutes_the_pairs(tiny_policy: MakePolicy) -> None:
    policy, algorithm, noise = tiny_policy(moved=0.05), TailorPO(), Noise(0)
    trained = algorithm.trained_steps(20, noise=noise, update=0)
    order = [2, 0, 1]
    straight = start(policy, 3)
    shuffled = start_trajectories(policy, [PROMPTS[i] for i in order], noise=noise, keys=[("train", i) for i in order])
    first = list(algorithm.collect(policy, straight, trained=trained, score=contrast, noise=noise))
    second = list(algorithm.collect(policy, shuffled, trained=trained, score=contrast, noise=noise))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a.latents[order], b.latents, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a.gap[order], b.gap, rtol=1e-3, atol=1e-3)


def test_the_same_seed_gives_the_same_bits_and_another_seed_other_numbers(tiny_policy: MakePolicy) -> None:
    draws = [collect(tiny_policy(moved=0.05), TailorPO(), seed=seed)[-1].latents for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_the_global_random_state_is_neither_read_nor_changed(tiny_policy: MakePolicy) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = collect(tiny_policy(), TailorPO())[-1].latents
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, collect(tiny_policy(), TailorPO())[-1].latents)


def count_evaluations(policy: Policy, algorithm: TailorPO, trained: tuple[int, ...]) -> tuple[int, int, int]:
    """Items through the UNet, backwards through it for the loss, pictures scored."""
    counted = Counter(policy, contrast)
    noise, backwards = Noise(0), 0
    stored: list[Any] = []
    trajectories = start(policy, 1)
    for pair in algorithm.collect(policy, trajectories, trained=trained, score=counted.score, noise=noise):
        if algorithm.update == "inline":
            algorithm.loss(policy, pair).sum().backward()
            backwards += 1
        else:
            stored.append(pair.stored(policy))
    for _ in range(algorithm.inner_epochs):
        for pair in stored:
            algorithm.loss(policy, pair).sum().backward()
            backwards += 1
    if trajectories.finished:
        counted.score(policy.model.decode(trajectories.latents), trajectories.prompts)
    return counted.items, backwards, counted.queries


GUIDANCES = [
    None,
    SigmaGuidance(),
    SigmaGuidance(accept_reject=True),
    SigmaGuidance(symmetric=True, shell=True, accept_reject=True),
    TargetGuidance(delta=0.5),
    TargetGuidance(delta=0.5, jacobian="free"),
]


@pytest.mark.parametrize("update", ["inline", "buffered"])
@pytest.mark.parametrize("guidance", GUIDANCES)
def test_network_evaluations_are_those_that_are_announced(tiny_policy: MakePolicy, update: Any, guidance: Any) -> None:
    policy = tiny_policy()
    for continue_from, steps in product(("winner", "loser", "random"), (5, (3, 4, 19), (0,), (18, 19))):
        algorithm = TailorPO(
            update=update,
            finish=continue_from != "random",
            guidance=guidance,
            continue_from=continue_from,
            train_steps=steps,
            inner_epochs=1 if update == "inline" else 2,
        )
        trained = algorithm.trained_steps(20, noise=Noise(0), update=0)
        before = policy.model.evaluations
        items, backwards, queries = count_evaluations(policy, algorithm, trained)
        cost = algorithm.cost(20, trained)
        assert items == 2 * cost.forwards  # guidance: two items an evaluation
        assert policy.model.evaluations - before == cost.forwards
        assert (backwards, queries) == (cost.backwards, cost.reward_queries)


def test_the_costs_of_the_contract() -> None:
    """T = 20, K = 5: TailorPO 30 + 5, buffered 35 + 5, TailorPO-G 35 + 5 and 5 gradients to the input."""
    for algorithm, expected in (
        (TailorPO(), (30, 5, 0)),
        (TailorPO(update="buffered"), (35, 5, 0)),
        (TailorPO(finish=False), (30, 5, 0)),
        (TailorPO(finish=False, train_steps=Steps(first=4, last=16, count=5)), (28, 5, 0)),
        (TailorPO(guidance=SigmaGuidance()), (35, 5, 5)),
        (TailorPO(guidance=TargetGuidance(delta=0.5)), (35, 5, 5)),
        (TailorPO(guidance=SigmaGuidance(jacobian="free")), (35, 5, 0)),
    ):
        cost = algorithm.cost(20, algorithm.trained_steps(20, noise=Noise(0), update=0))
        assert (cost.forwards, cost.backwards, cost.input_gradients) == expected


@pytest.mark.parametrize("guidance", [None, SigmaGuidance()])
def test_what_is_trained_on_does_not_depend_on_what_comes_after(tiny_policy: MakePolicy, guidance: Any) -> None:
    gradient: list[dict[str, Tensor]] = []
    for finish in (True, False):
        policy = tiny_policy(moved=0.05)
        algorithm = TailorPO(finish=finish, train_steps=(2, 9), guidance=guidance)
        trajectories, noise = start(policy), Noise(0)
        for pair in algorithm.collect(policy, trajectories, trained=(2, 9), score=contrast, noise=noise):
            algorithm.loss(policy, pair).sum().backward()
        gradient.append(gradients(policy))
        assert trajectories.finished == finish
    assert all(torch.equal(each, gradient[1][name]) for name, each in gradient[0].items())


def test_trained_steps() -> None:
    noise = Noise(0)
    assert TailorPO().trained_steps(20, noise=noise, update=0) == (2, 6, 10, 14, 18)
    assert TailorPO(train_steps=(9, 3)).trained_steps(20, noise=noise, update=0) == (3, 9)
    spread = TailorPO(train_steps=Steps(first=0, last=16, count=5)).trained_steps(20, noise=noise, update=0)
    assert spread == (0, 4, 8, 12, 16)
    seen: set[int] = set()
    for update in range(200):
        steps = TailorPO(train_steps=3, offset="random").trained_steps(20, noise=noise, update=update)
        assert len(set(steps)) == 3
        assert all(i * 20 // 3 <= k <= (i + 1) * 20 // 3 for i, k in enumerate(steps))
        seen |= set(steps)
    assert seen == set(range(20))


def test_ties_and_missing_rewards_do_not_train(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy(moved=0.05)

    def flat(images: Tensor, prompts: Any) -> Tensor:
        return torch.ones(len(images))

    def half_missing(images: Tensor, prompts: Any) -> Tensor:
        scores = contrast(images, prompts)
        scores[0] = torch.nan
        return scores

    hard, soft = TailorPO(train_steps=(5,)), TailorPO(train_steps=(5,), labels="soft", tau=1.0)
    (tied,) = collect(policy, hard, score=flat)
    assert tied.tie.all()
    assert not tied.valid.any()
    assert hard.loss(policy, tied).tolist() == [0.0, 0.0]
    (even,) = collect(policy, soft, score=flat)
    assert even.valid.all()
    assert even.probability.tolist() == [0.5, 0.5]
    guided = replace(hard, guidance=SigmaGuidance())
    for algorithm in (hard, soft):
        (pair,) = collect(policy, algorithm, score=half_missing)
        assert pair.present.tolist() == [False, True] == pair.valid.tolist()
        assert algorithm.loss(policy, pair)[0].item() == 0.0
        assert pair.next_latents.isfinite().all()
    missing = collect(policy, guided, score=lambda images, _: contrast(images, _) * float("nan"))
    assert all(bool(pair.next_latents.isfinite().all()) and float(pair.push.max()) == 0 for pair in missing)


def test_the_walk_goes_on_from_the_chosen_candidate(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy(moved=0.05)
    chosen: dict[str, Tensor] = {}
    for where in ("winner", "loser", "random"):
        (pair,) = collect(policy, TailorPO(train_steps=(7,), continue_from=where))
        chosen[where] = pair.next_latents
    difference = pair.noise_difference * policy.sampler.std(policy.schedule, 7)
    torch.testing.assert_close(chosen["winner"] - chosen["loser"], difference, rtol=1e-4, atol=1e-5)
    for row in range(2):
        assert any(torch.equal(chosen["random"][row], chosen[where][row]) for where in ("winner", "loser"))


def test_guidance_moves_the_winner_by_k_sigma_and_raises_its_step_reward(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy(moved=0.05)
    plain, guided = (collect(policy, TailorPO(train_steps=(9,), guidance=g))[0] for g in (None, SigmaGuidance(k=0.5)))
    moved = (guided.next_latents - plain.next_latents).flatten(1).norm(dim=1)
    torch.testing.assert_close(
        moved, torch.full((2,), 0.5 * policy.sampler.std(policy.schedule, 9)), rtol=1e-3, atol=1e-5
    )
    assert guided.push.tolist() == pytest.approx([0.5, 0.5], rel=1e-4)
    accepted = collect(policy, TailorPO(train_steps=(9,), guidance=SigmaGuidance(k=0.5, accept_reject=True)))[0]
    assert accepted.extra["guidance_accepted"].all()
    torch.testing.assert_close(accepted.next_latents, guided.next_latents)
    # Far enough along any direction the reward falls, and the winner stays where it was.
    wild = collect(policy, TailorPO(train_steps=(9,), guidance=SigmaGuidance(k=1e4, accept_reject=True)))[0]
    rejected = wild.extra["guidance_accepted"] == 0
    torch.testing.assert_close(wild.next_latents[rejected], plain.next_latents[rejected])
    assert wild.push[rejected].abs().sum() == 0


def test_branching_off_leaves_the_plain_walk_alone(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy(moved=0.05)
    chain = rollout_chains(policy, start(policy), noise=Noise(0))
    trajectories = start(policy)
    assert list(TailorPO().collect(policy, trajectories, trained=(), score=contrast, noise=Noise(0))) == []
    torch.testing.assert_close(chain, trajectories.latents)


def test_memory_does_not_grow_with_the_number_of_steps(tiny_policy: MakePolicy) -> None:
    """Count the numbers in all tensors that are alive whenever the walk has moved on."""

    def numbers_alive() -> int:
        gc.collect()
        return sum(item.numel() for item in gc.get_objects() if type(item) is Tensor)

    policy, algorithm, noise = tiny_policy(steps=20), TailorPO(train_steps=10), Noise(0)
    trained = algorithm.trained_steps(20, noise=noise, update=0)
    alive: list[int] = []
    for pair in algorithm.collect(policy, start(policy), trained=trained, score=contrast, noise=noise):
        algorithm.loss(policy, pair).sum().backward()
        del pair
        alive.append(numbers_alive())
    assert max(alive) <= 1.02 * alive[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_networks_train_a_float32_adapter(dtype: Any, tiny_folder: Path) -> None:
    config = ModelConfig(path=str(tiny_folder), dtype=dtype, lora=LoRA(rank=2, targets="attention+conv"))
    policy = Policy(config.load("cpu"), DDIM())
    algorithm = TailorPO(train_steps=(2, 18), guidance=SigmaGuidance())
    trajectories = start(policy)
    assert trajectories.latents.dtype == torch.float32
    for pair in algorithm.collect(policy, trajectories, trained=(2, 18), score=contrast, noise=Noise(0)):
        losses = algorithm.loss(policy, pair)
        assert losses.tolist() == pytest.approx([math.log(2)] * 2)
        losses.sum().backward()
    for value in gradients(policy).values():
        assert value.dtype == torch.float32
        assert value.isfinite().all()
    assert max(float(value.abs().max()) for value in gradients(policy).values()) > 0
