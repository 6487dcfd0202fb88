"""KL terms against torch.distributions in double precision, fixed points against algebra, references by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import settings
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from tailorpo.algorithms.kl_step import KLStep
from tailorpo.algorithms.pairs import Pair
from tailorpo.algorithms.tailorpo import Steps, TailorPO
from tailorpo.control import adapted, observe
from tailorpo.gaussian_step import GaussianStep
from tailorpo.metrics import UpdateMetrics
from tailorpo.models.toy import GaussianMixture
from tailorpo.moving_reference import MovingReference, ParameterCopy
from tailorpo.noise import Noise
from tailorpo.objectives import soft_dpo
from tailorpo.policy import Policy
from tailorpo.progress import Silent
from tailorpo.rollout import Trajectories, start_trajectories, walk_chains
from tailorpo.run import Run
from tailorpo.rundir import RunDirectory
from tailorpo.samplers import DDIM
from tailorpo.train import train

MakePolicy = Callable[..., Policy]
PROMPTS = ["a cat", "a dog"]
DIRECTION = torch.tensor([1.0, -0.5])


def contrast(images: Tensor, prompts: Any) -> Tensor:
    return 10 * images.flatten(1).std(dim=1)


def begin(policy: Policy, measured: int = 0) -> Trajectories:
    trajectories = start_trajectories(policy, PROMPTS, noise=Noise(0), keys=[("train", i) for i in range(2)])
    trajectories.measured = measured
    return trajectories


def walk(policy: Policy, method: TailorPO, way: Trajectories, trained: tuple[int, ...]) -> list[Pair | KLStep]:
    return list(method.collect(policy, way, trained=trained, score=contrast, noise=Noise(0)))


def exact_kl(policy: Policy, latents: Tensor, k: int, way: Trajectories) -> Tensor:
    """torch's own KL of two normal distributions, with the graph of the policy's mean, in double precision."""
    with torch.no_grad(), policy.model.reference():
        base = policy.step(latents, k, way.cond).gaussian
    own = policy.step(latents, k, way.cond).gaussian
    normals = [Independent(Normal(each.mean.double(), each.std), 3) for each in (own, base)]
    return kl_divergence(*normals)


def gradient(policy: Policy, losses: list[Tensor]) -> dict[str, Tensor]:
    parameters = policy.model.trainable()
    for parameter in parameters.values():
        parameter.grad = None
    for loss in losses:
        loss.sum().backward()
    return {name: p.grad.double() for name, p in parameters.items() if p.grad is not None}


@pytest.mark.parametrize("update", ["inline", "buffered"])
def test_the_penalty_is_lambda_times_the_kl_of_torch_with_its_gradient(tiny_policy: MakePolicy, update: Any) -> None:
    """At pairs and at untrained steps; kl_mask leaves the penalty alone."""
    policy = tiny_policy(moved=0.05)
    method = TailorPO(update=update, kl_penalty=0.7, kl_steps=(9, 19), kl_mask=1e-9)
    way = begin(policy)
    parts, kinds = list[Tensor](), list[tuple[int, type]]()
    expected: list[Tensor] = []
    for sample in method.collect(policy, way, trained=(3, 12), score=contrast, noise=Noise(0)):
        kinds.append((sample.k, type(sample)))
        loss = method.loss(policy, sample if update == "inline" else sample.stored(policy))
        expected.append(0.7 * exact_kl(policy, sample.latents, sample.k, way))
        torch.testing.assert_close(loss.double(), expected[-1], rtol=1e-4, atol=1e-7)
        parts.append(loss)
    assert kinds == [(3, Pair), (9, KLStep), (12, Pair), (19, KLStep)]
    ours, theirs = gradient(policy, parts), gradient(policy, expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-6)


def test_penalty_and_pair_loss_add_up_and_the_mask_takes_only_the_pair(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy(moved=0.05)

    def losses(**options: Any) -> list[float]:
        method = TailorPO(**options)
        (pair,) = walk(policy, method, begin(policy), (5,))
        return method.loss(policy, pair).tolist()

    plain, penalty, both = losses(), losses(kl_penalty=0.5, kl_mask=1e-9), losses(kl_penalty=0.5)
    assert both == pytest.approx([a + b for a, b in zip(plain, penalty, strict=True)], rel=1e-5)
    assert losses(kl_mask=1e-9) == [0.0, 0.0]
    (pair,) = walk(policy, TailorPO(), begin(policy), (5,))
    assert isinstance(pair, Pair)
    between = float(pair.kl.mean())  # one of the two is beyond it
    assert sorted(loss == 0 for loss in losses(kl_mask=between)) == [False, True]
    assert losses(kl_mask=1e9) == plain


def test_the_kl_of_every_step_is_that_of_a_plain_walk(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy(moved=0.05)
    way = begin(policy, measured=1)
    assert walk(policy, TailorPO(), way, ()) == []
    plain = begin(policy)
    steps = list(walk_chains(policy, plain, noise=Noise(0)))
    assert torch.equal(plain.latents, way.latents)
    assert sorted(way.kl) == list(range(20))
    for step in steps:
        expected = exact_kl(policy, step.latents, step.k, plain).detach()[:1]
        torch.testing.assert_close(way.kl[step.k].double(), expected, rtol=5e-3, atol=0)


@pytest.mark.parametrize("options", [{}, {"update": "buffered"}, {"kl_penalty": 0.1, "kl_steps": (0, 19)}])
def test_measuring_draws_nothing_else_and_counts_on_its_own_account(tiny_policy: MakePolicy, options: Any) -> None:
    found: list[tuple[Tensor, int, int]] = []
    for measured in (0, 1):
        policy = tiny_policy(moved=0.05)
        way = begin(policy, measured)
        before = policy.model.evaluations
        method = TailorPO(kl_measured=measured, **options)
        trained = method.trained_steps(20, noise=Noise(0), update=0)
        for sample in walk(policy, method, way, trained):
            if method.update == "buffered":
                method.loss(policy, sample.stored(policy))
        assert policy.evaluations == 2 * 2 * method.cost(20, trained).forwards  # guidance, two trajectories
        between = len(method.penalised_between(20, trained))
        assert policy.measuring == 2 * measured * (20 - len(trained) - between)
        assert policy.model.evaluations - before == (policy.evaluations + policy.measuring) // 2
        assert sorted(way.kl) == (list(range(20)) if measured else [])
        found.append((way.latents, policy.evaluations, policy.measuring))
    assert torch.equal(found[0][0], found[1][0])


def test_before_the_first_update_every_reference_is_the_policy(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy()
    policy.moving = ParameterCopy(policy.model.trainable(), MovingReference(ema=0.9))
    method = TailorPO(reference=MovingReference(ema=0.9), kl_penalty=0.5, kl_steps=(19,))
    way = begin(policy, measured=2)
    for sample in walk(policy, method, way, (3, 12)):
        expected = math.log(2) if isinstance(sample, Pair) else 0.0
        assert method.loss(policy, sample).tolist() == pytest.approx([expected] * 2, abs=1e-5)
        if isinstance(sample, Pair):
            assert sample.logit.tolist() == [0.0, 0.0]
    assert all(kl.tolist() == [0.0, 0.0] for kl in way.kl.values())


def test_a_moving_reference_is_the_copy_and_leaves_graph_and_parameters_alone(tiny_policy: MakePolicy) -> None:
    """Copied before the adapter moved, it is the base model: same pairs, same gradients. Copied after, it is the
    policy: no KL to it, while the KL to the base model is still measured."""
    policy, method = tiny_policy(), TailorPO(train_steps=(3, 12))
    parameters = policy.model.trainable()
    copy = ParameterCopy(parameters, MovingReference(every=1))
    with torch.no_grad():
        for name, parameter in parameters.items():
            if ".lora_B." in name:
                parameter.copy_(0.05 * Noise(2).normal(parameter.shape, name))
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    results: list[tuple[list[Tensor], dict[str, Tensor]]] = []
    for moving in (None, copy):
        policy.moving = moving
        samples = walk(policy, method, begin(policy), (3, 12))
        losses = [method.loss(policy, sample) for sample in samples]
        results.append(([loss.detach() for loss in losses], gradient(policy, losses)))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert any(value.abs().max() > 0 for value in results[0][1].values())
    for name, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], value, rtol=1e-4, atol=1e-7)
    copy.follow(1)
    way = begin(policy, measured=1)
    for sample in walk(policy, method, way, (3, 12)):
        assert isinstance(sample, Pair)
        assert sample.kl.tolist() == [0.0, 0.0]
    assert len(way.kl) == 20
    assert all(float(kl) > 0 for kl in way.kl.values())
    assert all(torch.equal(before[name], parameter) for name, parameter in parameters.items())


def test_the_reference_follows_by_hand() -> None:
    values = [torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2)]
    slow = ParameterCopy({"x": values[0]}, MovingReference(ema=0.75))
    jumps = ParameterCopy({"x": values[1]}, MovingReference(every=2))
    seen: list[list[list[float]]] = []
    for update, value in enumerate(([5.0, 2.0], [9.0, 2.0], [0.0, 0.0]), start=1):
        for parameter, copy in zip(values, (slow, jumps), strict=True):
            with torch.no_grad():
                parameter.copy_(torch.tensor(value))
            copy.follow(update)
        seen.append([copy.tensors()["reference/x"].tolist() for copy in (slow, jumps)])
    # 0.75 * 1 + 0.25 * 5 = 2, 0.75 * 2 + 0.25 * 9 = 3.75, 0.75 * 3.75 = 2.8125; -2, -1, -0.25, -0.1875.
    assert [row[0] for row in seen] == [[2.0, -1.0], [3.75, -0.25], [2.8125, -0.1875]]
    assert [row[1] for row in seen] == [[1.0, -2.0], [9.0, 2.0], [9.0, 2.0]]


# On the Gaussian model.


def gaussian() -> Policy:
    model = GaussianMixture(torch.ones(1), torch.zeros(1, 2), covariances=torch.eye(2)[None], train_weights=False)
    return Policy(model, DDIM(steps=20, guidance_scale=1.0))


def linear(latents: Tensor, prompts: Any) -> Tensor:
    return latents.flatten(1) @ DIRECTION


def align(method: TailorPO, *, updates: int, lr: float, decay: bool = True) -> tuple[Policy, list[dict[str, Any]]]:
    policy, noise, memory = gaussian(), Noise(0), dict[str, list[float]]()
    adam = torch.optim.Adam(policy.model.trainable().values(), lr=lr)
    rows: list[dict[str, Any]] = []
    for update in range(updates):
        for group in adam.param_groups:
            group["lr"] = lr * (1 - update / updates) if decay else lr
        now, metrics = adapted(method, memory), UpdateMetrics()
        assert isinstance(now, TailorPO)
        trained = now.trained_steps(20, noise=noise, update=update)
        way = start_trajectories(policy, [""] * 2, noise=noise, keys=[("train", update * 2 + i) for i in range(2)])
        way.measured = 2
        adam.zero_grad()
        for sample in now.collect(policy, way, trained=trained, score=linear, noise=noise):
            (now.loss(policy, sample).sum() / (2 * len(trained))).backward()
            metrics.add(sample)
        adam.step()
        metrics.add_kl(way.kl)
        metrics.add_final({"reward_final": linear(way.latents, None)})
        figures = metrics.summary(times=policy.schedule.time)
        rows.append(figures | observe(method, memory, figures, policy) | memory)
    return policy, rows


@pytest.mark.parametrize("penalty", [0.0, 0.125, 0.5])
def test_a_penalty_shrinks_the_fixed_point_of_soft_labels(penalty: float) -> None:
    """To first order in small logits the loss's slope in u, the shift in sigma, is beta (beta u - g / tau) / 2 for a
    reward g . z, since z_w - z_l has variance 2; with lambda u added, u = g / (beta tau) / (1 + 2 lambda / beta^2)."""
    beta, tau, slope = 0.5, 20.0, torch.tensor([1.0, -0.5], dtype=torch.float64)
    reference = GaussianStep(torch.zeros(1, 2, 1, 1, dtype=torch.float64), 0.3)
    noises = torch.randn(2, 20_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    difference = (noises[0] - noises[1]).view(-1, 2, 1, 1)
    probability = torch.sigmoid(difference.flatten(1) @ slope / tau)
    mean = torch.zeros(1, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([mean], max_iter=50, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def closure() -> Tensor:
        search.zero_grad()
        step = GaussianStep(mean, 0.3)
        pairs = soft_dpo(step.pair_logit(difference, reference), beta=beta, probability=probability)
        loss = pairs.mean() + penalty * step.kl(reference).mean()
        loss.backward()
        return loss

    search.step(closure)
    expected = slope / (beta * tau) / (1 + 2 * penalty / beta**2)
    torch.testing.assert_close(mean.detach().flatten() / 0.3, expected, rtol=0.03, atol=1e-4)


def test_soft_labels_come_to_rest_at_the_kl_of_their_gaps() -> None:
    """KL_t = s_t^2 / (4 (beta tau)^2), which beta: auto turns round. The early steps, where 20 DDIM steps are close to
    the continuous process; their own optimum is 0.99 to 0.91 of the tilt, so its KL is some 0.9 of it."""
    method = TailorPO(beta=0.5, labels="soft", tau=2.0, train_steps=Steps(first=0, last=9, count=10))
    _, rows = align(method, updates=60, lr=0.1)
    squares = sum(row["gap_rms"] ** 2 for figures in rows for row in figures["by_step"]) / len(rows)
    realised = sum(sum(figures["kl_by_step"][:10]) for figures in rows[-10:]) / 10
    assert realised == pytest.approx(0.9 * squares / (4 * (0.5 * 2.0) ** 2), rel=0.15)


def test_the_penalty_holds_hard_labels_which_have_no_fixed_point_of_their_own() -> None:
    method = TailorPO(beta=1.0, train_steps=5)
    free = align(method, updates=80, lr=0.05, decay=False)[1]
    held = align(replace(method, kl_target=0.6), updates=120, lr=0.05, decay=False)[1]
    assert free[-1]["kl_trajectory"] > 3 * 0.6
    late = [row["kl_trajectory"] for row in held[-60:]]
    assert sum(late) / len(late) == pytest.approx(0.6, rel=0.2)


# Whole runs.

RUNS: dict[str, dict[str, Any]] = {
    "ema": {"reference": {"ema": 0.5}},
    "every": {"reference": {"every": 2}, "kl_penalty": 0.01},
    "penalty": {"kl_target": 0.01},
    "auto": {"beta": "auto", "labels": "soft", "tau": 0.01, "kl_target": 0.01, "update": "buffered"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_interrupted_ends_with_the_same_bits(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    run = Run.from_dict(settings(tiny_folder, algorithm={"name": "tailorpo", "train_steps": 2, **RUNS[name]}))
    outcomes: list[Any] = []
    for parts in ((3,), (1, 3)):
        directory = RunDirectory.create(tmp_path / str(len(parts)), run)
        for updates in parts:
            train(replace(run, updates=updates), directory, reporter=Silent())
        rows = directory.metrics()
        assert all(row["kl_trajectory"] >= 0 and len(row["kl_by_step"]) == 4 for row in rows)
        assert rows[-1]["kl_trajectory"] > 0
        checkpoint = directory.path / "checkpoints/update-000003"
        state = json.loads((checkpoint / "state.json").read_text())
        tensors = load_file(checkpoint / "tensors.safetensors")
        assert any(key.startswith("reference/") for key in tensors) == ("reference" in RUNS[name])
        assert bool(state["memory"]) == ("kl_target" in RUNS[name])
        measured = 4 if "reference" in RUNS[name] else 1 if name == "penalty" else 2
        assert [row["forwards_measuring"] for row in rows] == [measured, 2 * measured, 3 * measured]
        outcomes.append(
            (
                {key: value.tolist() for key, value in tensors.items()},
                state,
                [{key: value for key, value in row.items() if key != "seconds"} for row in rows],
            )
        )
    assert outcomes[0] == outcomes[1]
