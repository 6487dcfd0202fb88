"""What must hold for every run with an ensemble, on a tiny random Stable Diffusion."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import outcome, settings, tailorpo, write_recipe
from torch import Tensor

from tailorpo.optimizer import Learner
from tailorpo.policy import Policy
from tailorpo.progress import Plain
from tailorpo.rewards import Brightness, Colourfulness, Ensemble, EnsembleScorer, Scorer
from tailorpo.run import Run
from tailorpo.rundir import RunDirectory
from tailorpo.train import Session

TAILORPO = {"name": "tailorpo", "train_steps": 2, "labels": "soft", "tau": 1.0}
GUIDED = {**TAILORPO, "guidance": {"form": "sigma", "k": 0.5}}
SPO = {"name": "spo", "first_step": 2, "candidates": 3, "threshold": 0.0}
D3PO = {"name": "d3po", "ranking": "step", "accumulate": 2}
TWO = [{"name": "brightness"}, {"name": "colourfulness", "weight": 2.0}]


@dataclass
class Times:
    """A reward in another unit."""

    inner: Brightness | Colourfulness
    factor: float = 1.0
    differentiable: bool = True

    @property
    def name(self) -> str:
        return self.inner.name

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.factor * self.inner(images, prompts)


def session(folder: Path, model: Path, score: Scorer, **changes: Any) -> Session:
    run = Run.from_dict(settings(model, reward=TWO, **{"batch": {"trajectories": 4, "micro": 2}, **changes}))
    policy = Policy(run.model.load("cpu"), run.sampler)
    learner = Learner(policy.model.trainable(), run.optimizer)
    directory = RunDirectory.create(folder, run)
    return Session(run, policy, score=score, learner=learner, directory=directory, reporter=Plain())


def trained(updates: int, *arguments: Any, **changes: Any) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The metrics of some updates, and the weights they lead to."""
    found = session(*arguments, **changes)
    lines = [found.update(update) for update in range(updates)]
    return lines, {name: each.detach().clone() for name, each in found.policy.model.trainable().items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def pair(factor: float = 1.0, *, swapped: bool = False, rule: str = "mean") -> EnsembleScorer:
    members = [(Times(Brightness()), 1.0), (Times(Colourfulness(), factor), 2.0)]
    return EnsembleScorer(members[::-1] if swapped else members, Ensemble(rule=rule, decay=0.5))  # type: ignore[arg-type]


@pytest.mark.parametrize("algorithm", [TAILORPO, GUIDED, SPO, D3PO], ids=["tailorpo", "guided", "spo", "d3po"])
def test_neither_a_members_unit_nor_the_order_of_members_changes_the_training(
    tmp_path: Path, tiny_folder: Path, algorithm: dict[str, Any]
) -> None:
    """From the first update on. A factor that is a power of two rounds nothing, so then to the bit."""
    lines, weights = trained(2, tmp_path / "a", tiny_folder, pair(), algorithm=algorithm)
    scaled, other = trained(2, tmp_path / "b", tiny_folder, pair(1024.0), algorithm=algorithm)
    _, swapped = trained(2, tmp_path / "c", tiny_folder, pair(swapped=True), algorithm=algorithm)
    assert same(weights, other)
    for name, each in weights.items():
        torch.testing.assert_close(swapped[name], each, rtol=0, atol=1e-5)
    for line, large in zip(lines, scaled, strict=True):
        assert large["gap"] == line["gap"]
        assert large["gap:colourfulness"] == 1024 * line["gap:colourfulness"]
        assert large["scale:colourfulness"] == 1024 * line["scale:colourfulness"] > 0
        assert large["reward_final:colourfulness"] == 1024 * line["reward_final:colourfulness"]
    if algorithm is not TAILORPO:
        return
    # A control: added up as they are, the unit decides.
    sums = [Scorer([(Times(Brightness()), 1.0), (Times(Colourfulness(), factor), 2.0)]) for factor in (1e-4, 1024.0)]
    by_one, by_other = (
        trained(2, tmp_path / f"sum{number}", tiny_folder, score, algorithm=algorithm)[1]
        for number, score in enumerate(sums)
    )
    assert not same(by_one, by_other)


@pytest.mark.parametrize("rule", ["worst_case", "uncertainty", "pareto"])
def test_twice_the_same_member_trains_as_that_member_alone(tmp_path: Path, tiny_folder: Path, rule: str) -> None:
    algorithm = {"name": "tailorpo", "train_steps": 2}  # hard labels: the order is all
    twice = EnsembleScorer([(Colourfulness(), 1.0), (Colourfulness(), 1.0)], Ensemble(rule=rule))  # type: ignore[arg-type]
    lines, weights = trained(2, tmp_path / "twice", tiny_folder, twice, algorithm=algorithm)
    _, alone = trained(2, tmp_path / "alone", tiny_folder, Scorer([(Colourfulness(), 1.0)]), algorithm=algorithm)
    assert same(weights, alone)
    assert all(line["agreement:colourfulness#2"] == 1 and line["abstained"] == 0 for line in lines)


def test_batch_micro_changes_memory_and_not_the_result(tmp_path: Path, tiny_folder: Path) -> None:
    found = [
        trained(2, tmp_path / str(micro), tiny_folder, pair(), algorithm=TAILORPO, batch=batch)
        for micro in (1, 4)
        for batch in [{"trajectories": 4, "micro": micro}]
    ]
    (lines, weights), (others, other_weights) = found
    for name, each in weights.items():
        torch.testing.assert_close(other_weights[name], each, rtol=1e-3, atol=1e-5)
    for line, other in zip(lines, others, strict=True):
        for name in ("gap", "scale:brightness", "agreement:brightness", "abstained"):
            assert other[name] == pytest.approx(line[name], rel=1e-3)


class Opposite:
    """Brightness the other way round."""

    name = "darkness"
    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return -50 * Brightness()(images, prompts)


def test_an_abstention_is_counted_and_trains_nothing(tmp_path: Path, tiny_folder: Path) -> None:
    """Two members that never agree, dominance never given: no pair has an order."""
    never = EnsembleScorer([(Brightness(), 1.0), (Opposite(), 1.0)], Ensemble(rule="pareto"))
    algorithm = {"name": "tailorpo", "train_steps": 2}
    found = session(tmp_path / "run", tiny_folder, never, algorithm=algorithm, optimizer={"weight_decay": 0.0})
    before = {name: each.detach().clone() for name, each in found.policy.model.trainable().items()}
    line = found.update(0)
    assert (line["abstained"], line["ties"], line["pairs"]) == (1.0, 8, 8)
    assert line["agreement:brightness"] == line["agreement:darkness"] == 0.5
    assert same(before, found.policy.model.trainable())


@pytest.mark.parametrize("algorithm", [GUIDED, D3PO], ids=["tailorpo", "d3po"])
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, algorithm: dict[str, Any]
) -> None:
    """The third update comes after the last checkpoint and is done again, with the scales of the first two."""
    recipe = write_recipe(
        tmp_path,
        tiny_folder,
        updates=4,
        checkpoint_every=2,
        algorithm=algorithm,
        reward=TWO,
        ensemble={"rule": "mean", "decay": 0.5},
    )
    assert tailorpo("train", recipe, "--out", tmp_path / "whole").exit_code == 0
    plain = Session.update

    def strike(self: Session, number: int) -> dict[str, Any]:
        if number == 3:
            raise KeyboardInterrupt
        return plain(self, number)

    struck = tmp_path / "struck"
    monkeypatch.setattr(Session, "update", strike)
    assert tailorpo("train", recipe, "--out", struck).exit_code == 130
    monkeypatch.setattr(Session, "update", plain)
    scales = json.loads((struck / "checkpoints/update-000002/state.json").read_text())["gap_scales"]
    assert {name.split()[1] for name in scales} == {"brightness", "colourfulness"}
    assert tailorpo("resume", struck).exit_code == 0
    expected, found = outcome(tmp_path / "whole"), outcome(struck)
    for part, value in expected.items():
        assert found[part] == value, part


@pytest.mark.parametrize("rule", ["majority", "worst_case"])
def test_three_rewards_on_the_miniature_from_the_command_line(tmp_path: Path, rule: str) -> None:
    changes = {
        "updates": 2,
        "sampler": {"steps": 4, "guidance_scale": 1.5},
        "reward": [{"name": "emoji_preference"}, {"name": "colourfulness"}, {"name": "jpeg_compressibility"}],
        "ensemble": {"rule": rule},
        "eval": {"seeds": 1, "prompts_seen": {"list": ["a cat"]}},
    }
    recipe, run = write_recipe(tmp_path, "emoji", **changes), tmp_path / "run"
    result = tailorpo("train", recipe, "--out", run)
    assert result.exit_code == 0, result.output
    first, second = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = {"emoji_preference", "colourfulness", "jpeg_compressibility"}
    for key in ("reward_winner", "reward_loser", "reward_final", "gap", "agreement", "scale"):
        assert {f"{key}:{name}" for name in names} <= first.keys() == second.keys()
    # Before there are scales a pair's own gap is its scale: +1 or -1. Three votes have a majority, two extremes cancel.
    agreements = sum(first[f"agreement:{name}"] for name in names)
    assert first["abstained"] == 0 and agreements >= 2 if rule == "majority" else agreements >= 1.5
    assert first["ties"] == (0 if rule == "majority" else round(first["abstained"] * first["pairs"]))
    assert all(step[f"scale:{name}"] > 0 for step in first["by_step"] for name in names)
    evaluated = (run / "eval.json").read_text()
    assert all(f'"reward:{name}"' in evaluated for name in names)
    report = (run / "report.html").read_text()
    assert "Agreement with the ensemble" in report
    assert "Reward: jpeg_compressibility" in report
    refused_pairs = tailorpo("pairs", recipe, "--count", "1", "--out", tmp_path / "pairs")
    assert refused_pairs.exit_code == 2
    assert "set ensemble=null" in refused_pairs.output
