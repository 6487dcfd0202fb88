"""Step rewards that look ahead: against DDIM, against closed forms on a mixture, and what they must leave alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import Counter
from tiny_run import outcome, settings, tailorpo, write_recipe
from torch import Tensor

from tailorpo.algorithms.pairs import Pair
from tailorpo.algorithms.tailorpo import TailorPO
from tailorpo.errors import RunFileError
from tailorpo.futures import Continuations, Lookahead
from tailorpo.models.toy import GaussianMixture
from tailorpo.noise import Noise
from tailorpo.policy import Policy
from tailorpo.rollout import start_trajectories
from tailorpo.run import Run
from tailorpo.samplers import DDIM
from tailorpo.step_rewards import score_latents

MakePolicy = Callable[..., Policy]
PROMPTS = ["a cat", "a dog"]
AHEAD = [Lookahead(lookahead=1), Lookahead(lookahead=9), Continuations(continuations=2)]
CUT = Continuations(continuations=3, cut=2)
WEIGHTS, MEANS, VARIANCES = torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [1.5]]), torch.tensor([0.2, 0.05])


def contrast(images: Tensor, prompts: Any) -> Tensor:
    return 10 * images.flatten(1).std(dim=1)


def collect(policy: Policy, algorithm: TailorPO, score: Any = contrast) -> list[Pair]:
    trained = algorithm.trained_steps(policy.schedule.steps, noise=Noise(0), update=0)
    start = start_trajectories(policy, PROMPTS, noise=Noise(0), keys=[("train", i) for i in range(2)])
    return list(algorithm.collect(policy, start, trained=trained, score=score, noise=Noise(0)))


def material(policy: Policy, pair: Pair) -> Any:
    """What the loss is made of: the pair with its graph, or what a buffer keeps of it."""
    return pair if pair.step else pair.stored(policy)


def mixture(steps: int) -> Policy:
    model = GaussianMixture(WEIGHTS, MEANS, covariances=VARIANCES.view(2, 1, 1))
    return Policy(model, DDIM(steps=steps, guidance_scale=1.0))


def first(pictures: Tensor, prompts: Any) -> Tensor:
    return pictures.flatten(1)[:, 0]


def test_looking_ahead_through_all_that_is_left_is_ddim_without_noise(tiny_policy: MakePolicy) -> None:
    policy, plain = (tiny_policy(steps=6, moved=0.05, eta=eta) for eta in (1.0, 0.0))
    cond = policy.model.encode(PROMPTS)
    for k in (1, 3, 5):
        x = start = Noise(2).normals(policy.model.latent_shape, [("a",), ("b",)])
        with torch.no_grad():
            for each in range(k, 6):
                step = plain.step(x, each, cond)
                x = step.gaussian.mean
            seen = [policy.model.decode_draft(step.x0)]
            for count in (5 - k, 20):
                if count:
                    ahead = Lookahead(lookahead=count)
                    scored = score_latents(
                        policy, start, k=k, cond=cond, prompts=PROMPTS, score=contrast, step_reward=ahead
                    )
                    seen.append(scored.pictures)
        for pictures in seen[1:]:
            torch.testing.assert_close(pictures, seen[0], rtol=1e-4, atol=1e-4)


def test_lookahead_follows_the_ode_of_a_mixture() -> None:
    """In one dimension the flow keeps every quantile, so where it ends is known from the distribution functions."""
    policy, k = mixture(100), 40

    def quantile(x: Tensor, alpha: float, sigma: float) -> Tensor:
        spread = (alpha**2 * VARIANCES + sigma**2).sqrt()
        return (WEIGHTS * torch.distributions.Normal(alpha * MEANS[:, 0], spread).cdf(x.view(-1, 1))).sum(dim=1)

    x = torch.linspace(-2.0, 2.0, 9)
    want = quantile(x, float(policy.schedule.alpha[k]), float(policy.schedule.sigma[k]))
    error: list[float] = []
    for count in (1, 4, 59):
        scored = score_latents(
            policy,
            x.view(-1, 1, 1, 1),
            k=k,
            cond=policy.model.encode([""] * 9),
            prompts=[""] * 9,
            score=first,
            step_reward=Lookahead(lookahead=count),
        )
        error.append(float((quantile(scored.reward, 1.0, 0.0) - want).abs().max()))
    assert error[2] < 0.02
    assert error[0] > 1.5 * error[1] > 6 * error[2]


def chains(policy: Policy, x: Tensor, *, k: int, seed: int, ahead: Continuations, siblings: int = 1) -> Tensor:
    noise, rows = Noise(seed), len(x)
    return score_latents(
        policy,
        x,
        k=k,
        cond=policy.model.encode([""] * rows),
        prompts=[""] * rows,
        score=lambda pictures, prompts: -((first(pictures, prompts) - 0.5) ** 2),
        siblings=siblings,
        step_reward=ahead,
        draw=lambda number, step: noise.normal((rows // siblings, 1, 1, 1), number, step),
    ).reward


def test_continuations_are_worth_the_posterior_mean_of_a_quadratic_reward() -> None:
    """E[-(x_0 - b)^2 | x] = -sum_j w_j(x) ((m_j(x) - b)^2 + v_j(x)), from Bayes' rule for each component."""
    policy, k, rows = mixture(200), 100, 4000
    alpha, sigma = float(policy.schedule.alpha[k]), float(policy.schedule.sigma[k])
    x = 0.3
    spread = alpha**2 * VARIANCES + sigma**2
    weights = torch.softmax(
        WEIGHTS.log() + torch.distributions.Normal(alpha * MEANS[:, 0], spread.sqrt()).log_prob(torch.tensor(x)), dim=0
    )
    variances = 1 / (1 / VARIANCES + alpha**2 / sigma**2)
    means = variances * (MEANS[:, 0] / VARIANCES + alpha * x / sigma**2)
    exact = -float((weights * ((means - 0.5) ** 2 + variances)).sum())
    predicted = -float(((weights * means).sum() - 0.5) ** 2)
    found = chains(policy, torch.full((rows, 1, 1, 1), x), k=k, seed=3, ahead=Continuations(continuations=2)).double()
    error = float(found.std()) / math.sqrt(rows)
    assert abs(float(found.mean()) - exact) < 4 * error
    assert abs(predicted - exact) > 20 * error
    single = chains(policy, torch.full((rows, 1, 1, 1), x), k=k, seed=3, ahead=Continuations(continuations=1)).double()
    assert float(found.var()) == pytest.approx(float(single.var()) / 2, rel=0.1)


@pytest.mark.parametrize("cut", [None, 10])
def test_shared_noise_makes_the_difference_of_siblings_clear(cut: int | None) -> None:
    policy, k, rows = mixture(60), 30, 500
    ahead = Continuations(continuations=1, cut=cut)
    pair = torch.tensor([0.3, 0.4]).repeat_interleave(rows).view(-1, 1, 1, 1)
    shared = chains(policy, pair, k=k, seed=1, ahead=ahead, siblings=2).view(2, rows)
    apart = chains(policy, pair, k=k, seed=1, ahead=ahead, siblings=1).view(2, rows)
    clear, vague = shared[0] - shared[1], apart[0] - apart[1]
    assert float(clear.var()) < 0.25 * float(vague.var())
    assert abs(float(clear.mean() - vague.mean())) < 4 * float(vague.std()) / math.sqrt(rows)


def test_the_walk_draws_the_same_whatever_ranks_its_candidates(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy(steps=6, moved=0.05)
    plain = collect(policy, TailorPO(train_steps=(1, 3, 5), continue_from="random"))
    for ahead in (*AHEAD, CUT):
        method = TailorPO(train_steps=(1, 3, 5), continue_from="random", step_reward=ahead)
        for pair, same in zip(collect(policy, method), plain, strict=True):
            assert torch.equal(pair.latents, same.latents)
            assert torch.equal(pair.noise_difference.abs(), same.noise_difference.abs())
            if pair.next_step is not None:
                anew = policy.step(pair.next_latents, pair.k + 1, pair.cond)
                torch.testing.assert_close(pair.next_step.gaussian.mean, anew.gaussian.mean, rtol=1e-4, atol=1e-5)
            else:
                # Finished candidates are scored as they are.
                assert torch.equal(pair.gap, same.gap)
        assert any(not torch.equal(a.gap, b.gap) for a, b in zip(collect(policy, method), plain, strict=True))


@pytest.mark.parametrize("update", ["inline", "buffered"])
@pytest.mark.parametrize("ahead", [*AHEAD, CUT])
def test_network_evaluations_are_those_that_are_announced(tiny_policy: MakePolicy, update: Any, ahead: Any) -> None:
    policy, steps = tiny_policy(steps=6), 6
    for trained in ((1,), (0, 3, 4), (4, 5)):
        algorithm = TailorPO(update=update, train_steps=trained, step_reward=ahead)
        counted = Counter(policy, contrast)
        for pair in collect(policy, algorithm, score=counted.score):
            algorithm.loss(policy, material(policy, pair))
        cost = algorithm.cost(steps, trained)
        assert counted.items == 2 * 2 * cost.forwards  # two trajectories, guided
        assert counted.queries == 2 * (cost.reward_queries - 1)  # the finished picture is scored by the loop


def test_the_costs_of_five_of_twenty_steps() -> None:
    """By hand, steps 2, 6, 10, 14, 18: 17, 13, 9, 5, 1 left after them, the first of which a candidate pays anyway."""
    costs = {
        Lookahead(lookahead=2): (30 + 2 * (4 * 2), 11),
        Continuations(continuations=2): (30 + 2 * 2 * (16 + 12 + 8 + 4), 21),
        Continuations(continuations=2, cut=5): (30 + 2 * 2 * (5 + 5 + 5 + 4), 21),
    }
    for ahead, expected in costs.items():
        cost = TailorPO(step_reward=ahead).cost(20, (2, 6, 10, 14, 18))
        assert (cost.forwards, cost.reward_queries) == expected
    # Decoded in full: the chains to the end, of cut ones those of steps 14 and 18, and the finished picture.
    assert [TailorPO(step_reward=ahead).cost(20, (2, 6, 10, 14, 18)).finished for ahead in costs] == [1, 21, 9]


@pytest.mark.parametrize("ahead", [Lookahead(lookahead=2), CUT])
def test_inline_and_buffered_give_the_same_gradient(tiny_policy: MakePolicy, ahead: Any) -> None:
    policy = tiny_policy(steps=6, moved=0.05)
    found: list[dict[str, Tensor]] = []
    for update in ("inline", "buffered"):
        for parameter in policy.model.trainable().values():
            parameter.grad = None
        algorithm = TailorPO(update=update, train_steps=(1, 2, 4), step_reward=ahead)
        for pair in collect(policy, algorithm):
            algorithm.loss(policy, material(policy, pair)).sum().backward()
        found.append({name: p.grad.clone() for name, p in policy.model.trainable().items() if p.grad is not None})
    assert any(float(value.abs().max()) > 0 for value in found[0].values())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-3, atol=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, tiny_folder: Path) -> None:
    measured = tmp_path / "measured.json"
    measured.write_text('{"steps": [{"k": 0, "v": 1.0, "misrank": 0.2}, {"k": 2, "v": 0.1, "misrank": 0.1}]}')
    method = {
        "name": "tailorpo",
        "train_steps": {"auto": 2, "measured": str(measured)},
        "step_reward": {"continuations": 2, "cut": 1},
    }
    recipe = write_recipe(tmp_path, tiny_folder, algorithm=method, updates=2)
    assert tailorpo("train", recipe, "--out", tmp_path / "whole").exit_code == 0
    assert tailorpo("train", recipe, "updates=1", "--out", tmp_path / "parts").exit_code == 0
    assert tailorpo("resume", tmp_path / "parts", "updates=2").exit_code == 0
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step_reward": {"lookahead": 0}}, "step_reward: lookahead must be at least 1, got 0"),
        ({"step_reward": {"continuations": 0}}, "step_reward: continuations must be at least 1, got 0"),
        ({"step_reward": {"continuations": 1, "cut": 0}}, "cut must be at least 1, or null"),
        ({"step_reward": {"lookahead": 1, "cut": 2}}, "step_reward.cut: unknown key"),
        ({"step_reward": {"lookahed": 1}}, "step_reward.lookahed: unknown key; did you mean `lookahead`?"),
        ({"step_reward": "predictd"}, "did you mean `predicted`?"),
        ({"step_reward": {"lookahead": 1}, "guidance": {"form": "sigma"}}, "algorithm.step_reward ranks by another"),
    ],
)
def test_mistakes_are_said_in_words(changes: dict[str, Any], message: str) -> None:
    algorithm = {"name": "tailorpo", "train_steps": 2, **changes}
    with pytest.raises(RunFileError, match="this run") as caught:
        Run.from_dict(settings("emoji", algorithm=algorithm, reward={"name": "emoji_preference"}))
    assert message in str(caught.value)


def test_an_ensemble_ranks_predicted_pictures() -> None:
    algorithm = {"name": "tailorpo", "train_steps": 2, "step_reward": {"lookahead": 1}}
    data = settings("emoji", algorithm=algorithm, reward=[{"name": "brightness"}, {"name": "colourfulness"}])
    with pytest.raises(RunFileError, match=r"which algorithm\.step_reward replaces"):
        Run.from_dict({**data, "ensemble": {"rule": "mean"}})
