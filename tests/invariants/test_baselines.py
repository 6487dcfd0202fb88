"""What must hold for every run of D3PO, DDPO and reward backpropagation, on a tiny random Stable Diffusion."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import outcome, refused, settings, tailorpo, write_recipe
from torch import Tensor

from tailorpo.algorithms.base import Algorithm
from tailorpo.algorithms.d3po import D3PO, ChainPair
from tailorpo.algorithms.ddpo import DDPO
from tailorpo.algorithms.reward_backprop import RewardBackprop
from tailorpo.noise import Noise
from tailorpo.optimizer import Learner
from tailorpo.policy import Policy
from tailorpo.progress import Plain
from tailorpo.rewards import load_scorer
from tailorpo.rollout import Trajectories, rollout_chains, start_trajectories
from tailorpo.run import Run
from tailorpo.rundir import RunDirectory
from tailorpo.train import Session

MakePolicy = Callable[..., Policy]
PROMPTS = ["a cat", "a dog", "a red horse", "a fox"]
LOG2 = math.log(2)
# What -log sigmoid(0.1 log ratio) can be with a ratio in (0.9 / 1.1)..(1.1 / 0.9).
LOW, HIGH = (math.log(1 + math.exp(sign * 0.1 * math.log(1.1 / 0.9))) for sign in (-1, 1))


def contrast(images: Tensor, prompts: Any) -> Tensor:
    return 10 * images.flatten(1).std(dim=1)


def start(policy: Policy, numbers: Sequence[int]) -> Trajectories:
    keys = [("train", number) for number in numbers]
    return start_trajectories(policy, [PROMPTS[i % 4] for i in numbers], noise=Noise(0), keys=keys)


def collect(policy: Policy, algorithm: Algorithm, numbers: Sequence[int] = (0, 1), *, score: Any = contrast) -> Any:
    trained = algorithm.trained_steps(policy.schedule.steps, noise=Noise(0), update=0)
    return list(algorithm.collect(policy, start(policy, numbers), trained=trained, score=score, noise=Noise(0)))


def gradient(policy: Policy, losses: Sequence[Tensor]) -> Tensor:
    """Of the sum of all, in one vector."""
    for parameter in policy.model.trainable().values():
        parameter.grad = None
    for loss in losses:
        loss.sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in policy.model.trainable().values()])  # type: ignore[union-attr]


def move(policy: Policy, size: float) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.model.trainable().values():
            parameter += size * torch.randn(parameter.shape, generator=generator)


# D3PO


def test_d3pos_chains_share_the_first_noise_and_nothing_afterwards(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy(steps=4, moved=0.05)
    seen: list[Tensor] = []

    def score(images: Tensor, prompts: Any) -> Tensor:
        seen.append(images)
        assert list(prompts) == PROMPTS[:2] * 2
        return contrast(images, prompts)

    pairs: list[ChainPair] = collect(policy, D3PO(), score=score)
    first, last = pairs[0], pairs[-1]
    assert torch.equal(first.latents[:, 0], first.latents[:, 1])
    for pair in pairs:
        noise = (pair.next_latents - policy.origin(pair.latents, pair.k)).flatten(2)
        apart = (noise[:, 0] - noise[:, 1]).norm(dim=1) / policy.sampler.std(policy.schedule, pair.k)
        assert apart.min() > 0.5 * math.sqrt(2 * noise.shape[2]), "independent noise is sqrt(2 D) sigma apart"
    for before, after in pairwise(pairs):
        assert torch.equal(before.next_latents, after.latents)
    # One chain is what plain sampling draws under the same keys, and the label belongs to the chain, not to a column.
    chain = rollout_chains(policy, start(policy, (0, 1)), noise=Noise(0))
    (pictures,) = seen
    rewards = contrast(pictures, None).view(2, 2)
    for row in range(2):
        winner = int(rewards[1, row] > rewards[0, row])
        torch.testing.assert_close(last.next_latents[row, winner], chain[row], rtol=1e-4, atol=1e-4)
        assert last.reward[row].tolist() == sorted(rewards[:, row].tolist(), reverse=True)
        assert last.pictures is not None
        assert torch.equal(last.pictures[row, 0], pictures[2 * winner + row])
    assert all(torch.equal(pair.reward, last.reward) for pair in pairs)
    assert [pair.shown() is not None for pair in pairs] == [False, False, False, True]


@pytest.mark.parametrize("update", ["inline", "buffered"])
def test_before_the_first_update_d3po_is_the_reference_to_the_bit(tiny_policy: MakePolicy, update: Any) -> None:
    policy, algorithm = tiny_policy(steps=4), D3PO(update=update)
    for pair in collect(policy, algorithm):
        figures = pair.figures()
        for name in ("log_ratio_winner", "log_ratio_loser", "kl"):
            assert figures[name].tolist() == [0.0, 0.0]
        assert figures["accuracy"].tolist() == [0.5, 0.5]
        losses = algorithm.loss(policy, pair if pair.step else pair.stored(policy))
        assert losses.tolist() == pytest.approx([LOG2] * 2, abs=1e-6)


def test_d3pos_loss_is_stuck_near_log_2_whatever_the_policy(tiny_policy: MakePolicy) -> None:
    """beta 0.1 and clip 0.1: 0.6832 to 0.7033; beyond the clamp there is no gradient that could bring it back."""
    algorithm, policy = D3PO(), tiny_policy(steps=3)
    pairs = [pair.stored(policy) for pair in collect(policy, algorithm)]
    assert 0.683 < LOW < HIGH < 0.7033
    for size in (0.01, 1.0, 5.0):
        move(policy, size)
        losses = [algorithm.loss(policy, each) for pair in pairs for each in (pair, swapped(pair))]
        together = torch.cat(losses).detach()
        assert float(together.min()) >= LOW - 1e-6
        assert float(together.max()) <= HIGH + 1e-6
    # By now every branch is far outside, on the side where pi is smaller.
    assert together.tolist() == pytest.approx([LOG2] * len(together), abs=1e-6)
    assert gradient(policy, losses).abs().max() == 0
    free = replace(algorithm, clip=None)
    assert gradient(policy, [free.loss(policy, pair) for pair in pairs]).abs().max() > 0


def swapped(pair: ChainPair) -> ChainPair:
    """Winner and loser change places."""
    names = ("latents", "next_latents", "reference_mean", "reward", "log_ratio", "kl")
    return replace(pair, **{name: getattr(pair, name).flip(1) for name in names})


def test_both_bounds_of_d3pos_loss_are_reached(tiny_policy: MakePolicy) -> None:
    """Next latents far out along mean - reference mean make the ratio as large or small as one likes."""
    policy = tiny_policy(steps=3, moved=0.05)
    for pair in collect(policy, D3PO()):
        stored = pair.stored(policy)
        with torch.no_grad():
            sides = stored.latents.transpose(0, 1).flatten(0, 1)
            mean = policy.step(sides, stored.k, stored.cond.repeat(2)).gaussian.mean.view(2, 2, *sides.shape[1:])
        shift = 1e6 * (mean.transpose(0, 1) - stored.reference_mean)
        shift[:, 1] *= -1
        for sign, bound in ((1, LOW), (-1, HIGH)):
            extreme = replace(stored, next_latents=stored.next_latents + sign * shift)
            assert D3PO().loss(policy, extreme).tolist() == pytest.approx([bound] * 2, abs=2e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_swapping_winner_and_loser_turns_d3pos_gradient_around(tiny_policy: MakePolicy, reduction: Any) -> None:
    algorithm, policy = D3PO(reduction=reduction, clip=None, beta=0.7), tiny_policy(steps=3)
    pairs = [pair.stored(policy) for pair in collect(policy, algorithm)]
    there, back = (
        gradient(policy, [algorithm.loss(policy, turn(pair)) for pair in pairs]) for turn in (lambda p: p, swapped)
    )
    assert there.abs().max() > 0
    torch.testing.assert_close(there, -back, rtol=1e-3, atol=1e-3 * float(there.abs().max()))
    # Away from the reference -log sigmoid(z) + log sigmoid(-z) = -z, the logit.
    move(policy, 1e-3)
    for pair in pairs:
        step = policy.step(pair.latents.transpose(0, 1).flatten(0, 1), pair.k, pair.cond.repeat(2))
        means, std = step.gaussian.mean.detach().double().view(2, 2, -1).transpose(0, 1), step.gaussian.std
        x, reference = (value.double().flatten(2) for value in (pair.next_latents, pair.reference_mean))
        normal = torch.distributions.Normal
        ratio = normal(means, std).log_prob(x) - normal(reference, std).log_prob(x)
        ratio = ratio.mean(dim=2) if reduction == "mean" else ratio.sum(dim=2)
        difference = algorithm.loss(policy, pair) - algorithm.loss(policy, swapped(pair))
        torch.testing.assert_close(
            difference.detach().double(), -0.7 * (ratio[:, 0] - ratio[:, 1]), rtol=1e-2, atol=1e-6
        )


def test_d3po_inline_and_buffered_have_one_gradient(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy(steps=4, moved=0.05)
    inline, buffered = D3PO(update="inline"), D3PO()
    graphs = gradient(policy, [inline.loss(policy, pair) for pair in collect(policy, inline)])
    stored = [pair.stored(policy) for pair in collect(policy, buffered)]
    assert all(pair.step is None and pair.pictures is None for pair in stored)
    again = gradient(policy, [buffered.loss(policy, pair.rows(torch.tensor([i]))) for pair in stored for i in (1, 0)])
    torch.testing.assert_close(graphs, again, rtol=1e-3, atol=1e-4 * float(graphs.abs().max()))


@pytest.mark.parametrize("update", ["inline", "buffered"])
def test_ties_and_missing_rewards_do_not_train_d3po(tiny_policy: MakePolicy, update: Any) -> None:
    policy, algorithm = tiny_policy(steps=2, moved=0.01), D3PO(update=update)

    def flat(images: Tensor, prompts: Any) -> Tensor:
        return torch.ones(len(images))

    def half_missing(images: Tensor, prompts: Any) -> Tensor:
        return torch.tensor([math.nan, 1.0, 2.0, 3.0])

    for score, trains, ties in ((flat, [False, False], [True, True]), (half_missing, [False, True], [False, False])):
        for pair in collect(policy, algorithm, score=score):
            assert pair.tie.tolist() == ties
            assert (pair.present & ~pair.tie).tolist() == trains
            losses = algorithm.loss(policy, pair if pair.step else pair.stored(policy))
            assert (losses != 0).tolist() == trains
            for row in range(2):
                slope = torch.autograd.grad(
                    losses[row], list(policy.model.trainable().values()), retain_graph=True, allow_unused=True
                )
                assert any(bool(value.abs().max() > 0) for value in slope if value is not None) == trains[row]
            if score is half_missing:
                assert pair.reward[0, 0] == 2.0, "a chain with a reward wins against one without"
                assert pair.reward[1].tolist() == [3.0, 1.0]


# DDPO


def test_before_the_first_update_ddpos_loss_is_minus_the_advantage(tiny_policy: MakePolicy) -> None:
    policy, algorithm = tiny_policy(steps=4, moved=0.05), DDPO()
    samples = algorithm.prepare(collect(policy, algorithm, (0, 1, 2)), {})
    assert len(samples) == 4
    for sample in samples:
        assert sample.advantage.abs().min() > 0.01
        assert torch.equal(algorithm.loss(policy, sample), -sample.advantage), "the ratio is 1 to the bit"
        alone = torch.cat([algorithm.loss(policy, sample.rows(torch.tensor([i]))) for i in (2, 0, 1)])
        torch.testing.assert_close(alone, -sample.advantage[[2, 0, 1]], rtol=1e-5, atol=1e-6)
    # All steps of a trajectory share the advantage of its end.
    assert all(torch.equal(sample.advantage, samples[0].advantage) for sample in samples)


def test_ddpo_follows_plain_sampling_and_leaves_out_missing_rewards(tiny_policy: MakePolicy) -> None:
    policy, algorithm = tiny_policy(steps=3, moved=0.05), DDPO()

    def score(images: Tensor, prompts: Any) -> Tensor:
        return contrast(images, prompts).index_fill(0, torch.tensor([1]), math.nan)

    samples = algorithm.prepare(collect(policy, algorithm, (0, 1, 2), score=score), {})
    chain = rollout_chains(policy, start(policy, (0, 1, 2)), noise=Noise(0))
    torch.testing.assert_close(samples[-1].next_latents, chain, rtol=1e-5, atol=1e-5)
    losses = [algorithm.loss(policy, sample) for sample in samples]
    assert all(loss[1] == 0 and loss[0] != 0 for loss in losses)
    assert samples[0].advantage[1] == 0
    assert samples[0].figures()["present"].tolist() == [True, False, True]
    assert gradient(policy, [loss[1] for loss in losses]).abs().max() == 0


# Reward backpropagation


def test_missing_rewards_reach_no_parameter(tiny_policy: MakePolicy) -> None:
    """A square root of something negative: NaN forwards and NaN times zero backwards."""
    policy, algorithm = tiny_policy(steps=3, moved=0.05), RewardBackprop(last_steps=2)

    def sometimes(images: Tensor, prompts: Any) -> Tensor:
        level = images.flatten(1).mean(dim=1)
        return (level - torch.tensor([2.0, 0.0])).sqrt()

    (both,) = collect(policy, algorithm, score=sometimes)
    assert both.figures()["present"].tolist() == [False, True]
    losses = algorithm.loss(policy, both)
    assert losses[0] == 0
    found = gradient(policy, [losses])
    (alone,) = collect(policy, algorithm, (1,), score=lambda images, _: images.flatten(1).mean(dim=1).sqrt())
    torch.testing.assert_close(found, gradient(policy, [algorithm.loss(policy, alone)]), rtol=1e-3, atol=1e-7)
    assert found.abs().max() > 0


def test_a_reward_without_a_gradient_is_refused_before_anything_is_loaded(tmp_path: Path, tiny_folder: Path) -> None:
    algorithm = {"name": "reward_backprop"}
    recipe = write_recipe(tmp_path, tiny_folder, algorithm=algorithm, reward={"name": "jpeg_compressibility"})
    message = refused("show", recipe)
    assert (
        "is reward_backprop, which needs the gradient of the reward, and this reward is not differentiable" in message
    )
    assert "use tailorpo, d3po or ddpo, or a differentiable reward" in message
    both = [{"name": "brightness"}, {"name": "jpeg_compressibility", "weight": 0.1}]
    assert "needs the gradient" in refused(
        "train", write_recipe(tmp_path, tiny_folder, algorithm=algorithm, reward=both)
    )


# All of them


@pytest.mark.parametrize("algorithm", [D3PO(), D3PO(update="inline"), DDPO(), RewardBackprop()])
def test_a_last_step_without_noise_is_no_obstacle(tiny_policy: MakePolicy, algorithm: Algorithm) -> None:
    """Schedulers with `set_alpha_to_one` end on the predicted clean latent itself, which has no density."""
    policy = tiny_policy(steps=3, moved=0.05)
    alpha, sigma = policy.schedule.alpha.clone(), policy.schedule.sigma.clone()
    alpha[-1], sigma[-1] = 1.0, 0.0
    policy.schedule = replace(policy.schedule, alpha=alpha, sigma=sigma)
    assert policy.sampler.std(policy.schedule, 2) == 0
    samples = collect(policy, algorithm)
    assert [sample.k for sample in samples] == ([2] if isinstance(algorithm, RewardBackprop) else [0, 1])
    assert isinstance(algorithm, DDPO | RewardBackprop) or samples[-1].shown() is not None
    stored = algorithm.prepare(samples, {})
    assert gradient(policy, [algorithm.loss(policy, each) for each in stored]).isfinite().all()


@pytest.mark.parametrize("algorithm", [D3PO(), DDPO(), RewardBackprop(last_steps=2, truncation="random")])
def test_eight_at_once_are_one_by_one(tiny_policy: MakePolicy, algorithm: Algorithm) -> None:
    policy, numbers = tiny_policy(steps=3, moved=0.05), range(8)
    together = collect(policy, algorithm, numbers)
    alone = [collect(policy, algorithm, (number,)) for number in numbers]
    for index, sample in enumerate(together):
        for name, value in sample.figures().items():
            single = torch.cat([samples[index].figures()[name] for samples in alone])
            torch.testing.assert_close(value, single, rtol=2e-3, atol=2e-3)
        if not isinstance(algorithm, RewardBackprop):
            for name in ("latents", "next_latents"):
                single = torch.cat([getattr(samples[index], name) for samples in alone])
                torch.testing.assert_close(getattr(sample, name), single, rtol=1e-3, atol=1e-4)
    if isinstance(algorithm, RewardBackprop):
        whole = gradient(policy, [algorithm.loss(policy, sample) for sample in together])
        parts = gradient(policy, [algorithm.loss(policy, sample) for samples in alone for sample in samples])
        torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))


class Count:
    """Counts what one update of the real loop costs, by hooks on the UNet: items forwards, items backwards."""

    def __init__(self, policy: Policy) -> None:
        self.forwards = self.backwards = 0
        unet: Any = policy.model.unet  # type: ignore[attr-defined]
        unet.register_forward_hook(self.forward)

    def forward(self, module: Any, arguments: Any, output: Any) -> None:
        self.forwards += len(arguments[0])
        if output[0].requires_grad:
            output[0].register_hook(self.backward)

    def backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


@pytest.mark.parametrize(
    ("algorithm", "steps", "forwards", "backwards", "queries"),
    [
        ({"name": "d3po"}, 20, 120, 40, 2),  # the official schedule
        ({"name": "d3po", "update": "inline"}, 20, 80, 40, 2),
        ({"name": "d3po", "inner_epochs": 2, "minibatch": 1, "accumulate": 7}, 5, 40, 20, 2),
        ({"name": "ddpo"}, 20, 40, 20, 1),
        ({"name": "ddpo", "inner_epochs": 2, "minibatch": 1, "accumulate": 4}, 5, 15, 10, 1),
        ({"name": "reward_backprop"}, 20, 20, 1, 1),
        ({"name": "reward_backprop", "last_steps": 3}, 20, 20, 3, 1),
    ],
)
def test_one_update_costs_what_is_announced(
    tmp_path: Path,
    tiny_folder: Path,
    algorithm: dict[str, Any],
    steps: int,
    forwards: int,
    backwards: int,
    queries: int,
) -> None:
    data = settings(tiny_folder, algorithm=algorithm, sampler={"steps": steps, "guidance_scale": 2.0})
    run = Run.from_dict(data)
    policy = Policy(run.model.load("cpu"), run.sampler)
    session = Session(
        run,
        policy,
        score=load_scorer(run.reward, "cpu"),
        learner=Learner(policy.model.trainable(), run.optimizer),
        directory=RunDirectory.create(tmp_path / "run", run),
        reporter=Plain(),
    )
    count = Count(policy)
    metrics = session.update(0)
    cost = run.algorithm.cost(steps, run.algorithm.trained_steps(steps, noise=Noise(0), update=0))
    assert (cost.forwards, cost.backwards, cost.input_gradients, cost.reward_queries) == (
        forwards,
        backwards,
        0,
        queries,
    )
    # Two trajectories; an evaluation with guidance is two items.
    assert (count.forwards, count.backwards) == (2 * 2 * forwards, 2 * 2 * backwards)
    assert (metrics["forwards"], metrics["reward_queries"]) == (2 * forwards, 2 * queries)


D3PO_EPOCHS = {"name": "d3po", "inner_epochs": 2, "minibatch": 1, "accumulate": 3}
DDPO_EPOCHS = {"name": "ddpo", "inner_epochs": 2, "minibatch": 1, "accumulate": 3, "history": 3, "history_min": 2}


@pytest.mark.parametrize("algorithm", [D3PO_EPOCHS, DDPO_EPOCHS], ids=["d3po", "ddpo"])
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, algorithm: dict[str, Any]
) -> None:
    changes = {"updates": 4, "checkpoint_every": 2, "sampler": {"steps": 2, "guidance_scale": 2.0}}
    recipe = write_recipe(
        tmp_path, tiny_folder, algorithm=algorithm, **changes, eval={"prompts_seen": {"list": ["a cat"]}, "seeds": 1}
    )
    assert tailorpo("train", recipe, "--out", tmp_path / "whole").exit_code == 0
    expected = outcome(tmp_path / "whole")
    # 4 updates of 2 trajectories: 3 prompts were met 2 or 3 times each.
    remembered = json.loads(expected["checkpoints"]["update-000004/state.json"])["memory"]
    assert sorted(map(len, remembered.values())) == ([2, 3, 3] if algorithm["name"] == "ddpo" else [])

    plain = Session.update

    def strike(self: Session, number: int) -> dict[str, Any]:
        if number == 3:
            raise KeyboardInterrupt
        return plain(self, number)

    monkeypatch.setattr(Session, "update", strike)
    assert tailorpo("train", recipe, "--out", tmp_path / "struck").exit_code == 130
    monkeypatch.setattr(Session, "update", plain)
    assert tailorpo("resume", tmp_path / "struck").exit_code == 0
    found = outcome(tmp_path / "struck")
    for part, value in expected.items():
        assert found[part] == value, part


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize(
    ("name", "forwards", "backwards"), [("d3po", 120, 40), ("ddpo", 40, 20), ("reward_backprop", 20, 1)]
)
def test_the_recipes_show_their_cost_and_train(
    tmp_path: Path, tiny_folder: Path, name: str, forwards: int, backwards: int
) -> None:
    recipe = RECIPES / f"emoji_{name}.yaml"
    shown = tailorpo("show", recipe)
    assert shown.exit_code == 0, shown.output
    lines = [" ".join(line.split()) for line in shown.output.splitlines()]
    updates = Run.load(recipe).updates
    assert f"guided forwards {forwards} {8 * forwards} {8 * forwards * updates:,} " in "".join(f"{x} " for x in lines)
    assert any(line.startswith(f"backwards {backwards} ") for line in lines)
    assert any(line.startswith(f"tailorpo/algorithms/{name}.py ") for line in lines)
    # The same settings on a tiny model and a reward that needs no files.
    small = (
        f"model.path={tiny_folder}",
        "reward.name=brightness",
        "updates=1",
        "sampler.steps=3",
        "prompts={list: [a cat, a dog]}",
    )
    sizes = ("batch={trajectories: 2, micro: 2}", "eval={seeds: 1, prompts_seen: {list: [a cat, a dog]}}")
    result = tailorpo("train", recipe, *small, *sizes, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    assert metrics["grad_norm"] > 0
    assert metrics["reward_final"] is not None
    assert ("kl" in metrics) == (name == "d3po")
