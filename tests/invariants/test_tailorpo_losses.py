"""TailorPO with more candidates and other losses: what must hold on a tiny random Stable Diffusion."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import Counter
from tiny_run import outcome, refused, settings, tailorpo, write_recipe
from torch import Tensor

from tailorpo import Run
from tailorpo.algorithms.groups import Group, StoredGroups, group_scores
from tailorpo.algorithms.misranks import misrank_at
from tailorpo.algorithms.pairs import CandidatePair, Pair, current_step
from tailorpo.algorithms.tailorpo import TailorPO
from tailorpo.errors import RunFileError
from tailorpo.guidance import SigmaGuidance
from tailorpo.noise import Noise
from tailorpo.policy import Policy
from tailorpo.rewards import Ensemble
from tailorpo.rewards.ensemble import GapScales
from tailorpo.rewards.ensemble_scorer import EnsembleScorer
from tailorpo.rollout import Trajectories, start_trajectories, step_noise

MakePolicy = Callable[..., Policy]
PROMPTS = ["a cat", "a dog", "a red horse"]
STEPS = 6


def contrast(images: Tensor, prompts: Any) -> Tensor:
    return 10 * images.flatten(1).std(dim=1)


def start(policy: Policy, count: int = 2) -> Trajectories:
    keys = [("train", i) for i in range(count)]
    return start_trajectories(policy, PROMPTS[:count], noise=Noise(0), keys=keys)


def collect(policy: Policy, algorithm: TailorPO, *, score: Any = contrast, gaps: GapScales | None = None) -> list[Pair]:
    trained = algorithm.trained_steps(STEPS, noise=Noise(0), update=0)
    trajectories = start(policy)
    trajectories.gaps = gaps
    return list(algorithm.collect(policy, trajectories, trained=trained, score=score, noise=Noise(0)))


def gradients(policy: Policy, losses: list[Tensor]) -> dict[str, Tensor]:
    for parameter in policy.model.trainable().values():
        parameter.grad = None
    torch.stack([loss.sum() for loss in losses]).sum().backward()
    return {name: p.grad.clone() for name, p in policy.model.trainable().items() if p.grad is not None}


LOSSES: list[dict[str, Any]] = [
    {"objective": "plackett_luce", "candidates": 4},
    {"objective": "plackett_luce", "candidates": 3, "labels": "soft", "tau": 0.5, "label_smoothing": 0.1},
    {"objective": "ipo", "beta": 0.3, "step_weights": "normalised"},
    {"candidates": 4, "labels": "soft", "tau": "auto"},
    {"label_smoothing": 0.2, "guidance": SigmaGuidance()},
    {"safeguard": True, "candidates": 3},
]


@pytest.mark.parametrize("options", LOSSES)
def test_inline_and_buffered_give_the_same_gradient(tiny_policy: MakePolicy, options: Any) -> None:
    policy = tiny_policy(steps=STEPS, moved=0.05)
    inline = TailorPO(train_steps=3, **options)
    buffered = TailorPO(train_steps=3, update="buffered", **options)
    expected = gradients(policy, [inline.loss(policy, pair) for pair in collect(policy, inline)])
    stored: list[Any] = [pair.stored(policy) for pair in collect(policy, buffered)]
    assert [len(each) for each in stored] == [2, 2, 2]
    rows = [each.rows(torch.tensor([row])) for each in stored for row in (1, 0)]
    found = gradients(policy, [buffered.loss(policy, row) for row in rows])
    assert max(float(value.abs().max()) for value in found.values()) > 0
    for name, value in found.items():
        # Of the whole, since a single entry can be what is left of a sum: on one processor 0.5 % of one was rounding.
        assert float((value - expected[name]).norm()) <= 1e-3 * float(expected[name].norm()), name


def test_a_list_of_two_has_the_gradient_of_the_pair(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy(steps=STEPS, moved=0.05)
    for options in ({}, {"labels": "soft", "tau": 0.3}, {"guidance": SigmaGuidance()}, {"label_smoothing": 0.1}):
        pair, listwise = (
            TailorPO(train_steps=(1, 4), objective=name, **options)  # pyright: ignore
            for name in ("dpo", "plackett_luce")
        )
        expected = gradients(policy, [pair.loss(policy, each) for each in collect(policy, pair)])
        found = gradients(policy, [listwise.loss(policy, each) for each in collect(policy, listwise)])
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


def test_before_the_first_update_a_list_costs_the_log_of_its_orders(tiny_policy: MakePolicy) -> None:
    policy, algorithm = tiny_policy(steps=STEPS), TailorPO(train_steps=2, objective="plackett_luce", candidates=4)
    for group in collect(policy, algorithm):
        assert algorithm.loss(policy, group).tolist() == pytest.approx([math.log(24)] * 2, abs=1e-5)


def test_scores_are_log_ratios_of_the_candidates_up_to_a_constant(tiny_policy: MakePolicy) -> None:
    """By torch.distributions in float64, of the candidates as they were drawn, in the order of their rewards."""
    policy, algorithm = (
        tiny_policy(steps=STEPS, moved=0.05),
        TailorPO(train_steps=(2,), objective="plackett_luce", candidates=4, beta=1.0),
    )
    (group,) = collect(policy, algorithm)
    assert isinstance(group, Group)
    stored = group.stored(policy)
    assert isinstance(stored, StoredGroups)
    with torch.no_grad():
        step = policy.step(group.latents, 2, group.cond)
    mean, reference, std = step.gaussian.mean.double(), group.reference.mean.double(), step.gaussian.std
    noises = torch.stack([step_noise(Noise(0), start(policy), 2, "candidate", j, like=group.latents) for j in range(4)])
    drawn = mean + std * noises.double()
    ratios = [
        (torch.distributions.Normal(mean, std).log_prob(x) - torch.distributions.Normal(reference, std).log_prob(x))
        .flatten(1)
        .sum(dim=1)
        for x in drawn
    ]
    with torch.no_grad():
        clean = [policy.step(x, 3, group.cond).x0 for x in drawn.float()]
        rewards = [contrast(policy.model.decode(x0), None) for x0 in clean]
    order = torch.stack(rewards).argsort(dim=0, descending=True)
    expected = torch.stack(ratios).gather(0, order).T
    expected = expected - expected[:, -1:]
    for each in (group, stored):
        torch.testing.assert_close(
            group_scores(policy, each, current_step(policy, each)).double(), expected, rtol=1e-3, atol=1e-3
        )


def test_the_first_candidates_are_those_of_a_smaller_number(tiny_policy: MakePolicy) -> None:
    policy, seen = tiny_policy(steps=STEPS), dict[int, list[Tensor]]()
    for count in (2, 4):
        batches = seen.setdefault(count, [])

        def score(images: Tensor, prompts: Any, batches: list[Tensor] = batches) -> Tensor:
            batches.append(images)
            return contrast(images, prompts)

        collect(policy, TailorPO(train_steps=(1,), candidates=count), score=score)
    torch.testing.assert_close(seen[2][0], seen[4][0][:4], rtol=1e-4, atol=1e-5)


def test_guidance_moves_the_best_of_all_and_nothing_else(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy(steps=STEPS, moved=0.05)
    plain, guided = (
        collect(policy, TailorPO(train_steps=(2,), objective="plackett_luce", candidates=4, guidance=g))[0]
        for g in (None, SigmaGuidance(k=0.7))
    )
    assert isinstance(plain, Group)
    assert isinstance(guided, Group)
    moved = (guided.noise_differences - plain.noise_differences).flatten(2).norm(dim=2)
    assert moved[0].tolist() == pytest.approx([0.7, 0.7], rel=1e-3)
    assert moved[1:].abs().max() == 0
    torch.testing.assert_close(guided.targets, plain.targets)


@pytest.mark.parametrize("update", ["inline", "buffered"])
def test_network_evaluations_are_those_that_are_announced(tiny_policy: MakePolicy, update: Any) -> None:
    policy = tiny_policy(steps=STEPS)
    counted = Counter(policy, contrast)
    for options in (*LOSSES, {"candidates": 5, "guidance": SigmaGuidance(accept_reject=True)}):
        steps = (0, 1, 5)
        counted.items = counted.queries = 0
        algorithm = TailorPO(train_steps=steps, update=update, **options)
        stored: list[Any] = []
        for pair in algorithm.collect(policy, start(policy, 1), trained=steps, score=counted.score, noise=Noise(0)):
            if update == "inline":
                algorithm.loss(policy, pair).sum().backward()
            else:
                stored.append(pair.stored(policy))
        for each in stored:
            algorithm.loss(policy, each).sum().backward()
        cost = algorithm.cost(STEPS, steps)
        assert counted.items == 2 * cost.forwards
        assert counted.queries + 1 == cost.reward_queries  # the last one is of the end
    two, four = (TailorPO(candidates=n).cost(20, (2, 6, 10, 14, 18)) for n in (2, 4))
    assert (four.forwards - two.forwards, four.reward_queries - two.reward_queries) == (2 * 5, 2 * 5)


def test_missing_rewards(tiny_policy: MakePolicy) -> None:
    """Best and worst need two candidates with a reward, a list needs all."""
    policy = tiny_policy(steps=STEPS, moved=0.05)

    def some(images: Tensor, prompts: Any) -> Tensor:
        scores = contrast(images, prompts)
        scores[0] = torch.nan  # of the first trajectory one of three candidates
        scores[1] = scores[3] = torch.nan  # of the second two
        return scores

    for objective, present in (("dpo", [True, False]), ("plackett_luce", [False, False])):
        algorithm = TailorPO(train_steps=(2,), candidates=3, objective=objective)  # pyright: ignore
        (pair,) = collect(policy, algorithm, score=some)
        assert pair.present.tolist() == present
        assert float(pair.gap[0]) > 0
        losses = algorithm.loss(policy, pair)
        assert (losses > 0).tolist() == present
        assert all(value.isfinite().all() for value in gradients(policy, [losses]).values())


def test_tau_auto_is_the_running_gap_of_siblings(tiny_policy: MakePolicy) -> None:
    policy, gaps = tiny_policy(steps=STEPS, moved=0.05), GapScales(0.5)
    algorithm = TailorPO(train_steps=(2,), labels="soft", tau="auto")
    (first,) = collect(policy, algorithm, gaps=gaps)
    assert first.probability.tolist() == pytest.approx([1 / (1 + math.exp(-1))] * 2)  # each by its own gap
    gaps.settle(lambda mine: [mine])
    (second,) = collect(policy, algorithm, gaps=gaps, score=lambda images, _: 3 * contrast(images, _))
    rms = math.sqrt(float(first.gap.double().square().mean()))
    assert second.extra["tau"].tolist() == pytest.approx([rms] * 2)
    torch.testing.assert_close(second.probability, torch.sigmoid(second.gap / rms))


def test_the_safeguard_is_idle_on_fresh_pairs_of_this_size(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy(steps=STEPS, moved=0.05)
    plain, safe = TailorPO(train_steps=(1, 4)), TailorPO(train_steps=(1, 4), safeguard=True)
    pairs = collect(policy, safe)
    assert all(isinstance(pair, CandidatePair) and pair.extra["safeguarded"].max() == 0 for pair in pairs)
    expected = gradients(policy, [plain.loss(policy, pair) for pair in collect(policy, plain)])
    for name, value in gradients(policy, [safe.loss(policy, pair) for pair in pairs]).items():
        torch.testing.assert_close(value, expected[name], rtol=5e-3, atol=1e-5)


def test_an_ensemble_ranks_more_than_two(tiny_policy: MakePolicy) -> None:
    """The members agree, so the order is theirs."""
    policy = tiny_policy(steps=STEPS, moved=0.05)

    class Twice:
        name = "twice"

        def __call__(self, images: Tensor, prompts: Any) -> Tensor:
            return 2 * contrast(images, prompts)

    class Once:
        name = "once"

        def __call__(self, images: Tensor, prompts: Any) -> Tensor:
            return contrast(images, prompts)

    members: Any = [(Once(), 1.0), (Twice(), 1.0)]
    score = EnsembleScorer(members, Ensemble(rule="mean"))
    algorithm = TailorPO(train_steps=(2,), objective="plackett_luce", candidates=4)
    (group,), (alone,) = collect(policy, algorithm, score=score), collect(policy, algorithm)
    assert isinstance(group, Group)
    assert isinstance(alone, Group)
    torch.testing.assert_close(group.noise_differences, alone.noise_differences)


def test_measured_misranking_by_time(tmp_path: Path) -> None:
    file = tmp_path / "jensen.json"
    steps = [{"k": 0, "time": 800, "misrank": 0.6}, {"k": 1, "time": 400, "misrank": 0.2}, {"k": 2, "time": 1}]
    file.write_text(json.dumps({"steps": steps}))
    found = [misrank_at(str(file), time) for time in (950, 800, 600, 400, 1)]
    assert found == pytest.approx([0.5, 0.5, 0.35, 0.2, 0.2])


def test_measured_misranking_smooths_the_labels_of_its_step(tiny_policy: MakePolicy, tmp_path: Path) -> None:
    policy, file = tiny_policy(steps=STEPS), tmp_path / "jensen.json"
    times = [int(policy.schedule.time[k]) for k in (1, 4)]
    file.write_text(json.dumps({"steps": [{"time": times[0], "misrank": 0.4}, {"time": times[1], "misrank": 0.1}]}))
    pairs = collect(policy, TailorPO(train_steps=(1, 4), label_smoothing="auto", misranks=str(file)))
    assert [pair.probability.tolist() for pair in pairs] == [pytest.approx([0.6] * 2), pytest.approx([0.9] * 2)]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"candidates": 1}, "candidates must be at least 2, got 1"),
        ({"labels": "soft", "tau": -1.0}, "tau must be positive or auto, got -1"),
        ({"labels": "soft", "tau": "atuo"}, "auto"),
        ({"tau": "auto"}, "algorithm.tau has no effect with hard labels"),
        ({"label_smoothing": 0.5}, "label_smoothing must be auto or at least 0 and below 0.5"),
        ({"label_smoothing": "auto"}, "needs algorithm.misranks"),
        ({"misranks": "jensen.json"}, "algorithm.misranks has no effect without label_smoothing: auto"),
        ({"safeguard": True, "objective": "ipo"}, "algorithm.safeguard"),
        ({"safeguard": True, "labels": "soft", "tau": 1.0}, "algorithm.safeguard"),
        ({"safeguard": True, "label_smoothing": 0.1}, "algorithm.safeguard"),
        (
            {"objective": "plackett_luce", "guidance": {"form": "sigma", "symmetric": True}},
            "algorithm.guidance.symmetric moves the two of a pair",
        ),
        ({"objective": "placket_luce"}, "did you mean `plackett_luce`?"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], problem: str) -> None:
    data = settings("emoji", algorithm={"name": "tailorpo", "train_steps": 2, **changes})
    with pytest.raises(RunFileError) as caught:
        Run.from_dict(data, files=False)
    assert len(caught.value.problems) == 1
    assert problem in caught.value.problems[0]


def test_pareto_needs_two_candidates() -> None:
    data = settings(
        "emoji",
        algorithm={"name": "tailorpo", "train_steps": 2, "candidates": 3},
        reward=[{"name": "brightness"}, {"name": "colourfulness"}],
        ensemble={"rule": "pareto"},
    )
    with pytest.raises(RunFileError, match=r"use algorithm\.candidates 2 or another rule"):
        Run.from_dict(data, files=False)


def test_a_file_of_misranks_that_cannot_be_used_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    algorithm = {"name": "tailorpo", "train_steps": 2, "label_smoothing": "auto", "misranks": str(tmp_path / "none")}
    message = refused("show", write_recipe(tmp_path, tiny_folder, algorithm=algorithm))
    assert "algorithm.misranks" in message
    assert "tailorpo jensen" in message
    for number, content in enumerate(("[1, 2]", "{", '{"steps": [{"time": 1}]}')):
        file = tmp_path / f"{number}.json"
        file.write_text(content)
        message = refused("show", write_recipe(tmp_path, tiny_folder, algorithm={**algorithm, "misranks": str(file)}))
        assert "algorithm.misranks" in message


def test_a_run_resumes_to_the_same_bits(tiny_folder: Path, tmp_path: Path) -> None:
    """The running gaps are in the checkpoint."""
    algorithm = {
        "name": "tailorpo",
        "train_steps": 2,
        "objective": "plackett_luce",
        "candidates": 3,
        "labels": "soft",
        "tau": "auto",
    }
    recipe = write_recipe(tmp_path, tiny_folder, algorithm=algorithm)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert tailorpo("train", recipe, "--out", whole).exit_code == 0
    assert tailorpo("train", recipe, "updates=1", "--out", parts).exit_code == 0
    assert tailorpo("resume", parts, "updates=3").exit_code == 0
    first, second = outcome(whole), outcome(parts)
    assert first["metrics"] == second["metrics"]
    assert first["lora"] == second["lora"]
    state = json.loads(
        next(iter(sorted((whole / "checkpoints").iterdir(), reverse=True))).joinpath("state.json").read_text()
    )
    assert len(state["memory"]) == 2
    assert first["metrics"][1]["tau"] > 0
