"""Evaluation of a tiny random model: what is paired really is paired, and what is written is what was measured."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import save_tiny_model

from tailorpo.errors import RewardError, UserError
from tailorpo.evaluate import evaluate
from tailorpo.images import load_png
from tailorpo.models import DiffusionModel
from tailorpo.report import write_report
from tailorpo.run import Run
from tailorpo.rundir import RunDirectory
from tailorpo.statistics import pairwise_rms
from tailorpo.weighted_base import reweighted


class Silent:
    """A reporter that remembers how far it was told."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []

    def phase(self, text: str) -> None: ...
    def step(self, done: int, total: int) -> None:
        self.steps.append((done, total))

    def update(self, metrics: dict[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def make_run(model_folder: Path, **changes: Any) -> Run:
    data: dict[str, Any] = {
        "updates": 1,
        "model": {"path": str(model_folder), "lora": {"rank": 2}},
        "sampler": {"steps": 3, "guidance_scale": 2.0},
        "algorithm": {"name": "tailorpo", "train_steps": 2},
        "reward": {"name": "brightness"},
        "prompts": {"list": ["a cat", "a dog"]},
        "batch": {"trajectories": 2, "micro": 2},
        "eval": {
            "prompts_unseen": {"list": ["a horse"]},
            "seeds": 3,
            "batch_size": 4,
            "judge": {"name": "colourfulness"},
        },
    }
    for key, value in changes.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) and key == "eval" else value
    return Run.from_dict(data)


def load(run: Run, *, move: bool) -> DiffusionModel:
    """The model with a fresh adapter, which does nothing, or with one that does."""
    model = run.model.load("cpu")
    if move:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.trainable().values():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def evaluated(run: Run, folder: Path, *, move: bool = True) -> tuple[dict[str, Any], RunDirectory]:
    directory = RunDirectory.create(folder, run)
    return evaluate(run, directory, load(run, move=move), reporter=Silent()), directory


def test_an_adapter_that_does_nothing_changes_nothing_at_all(model_folder: Path, tmp_path: Path) -> None:
    result, directory = evaluated(make_run(model_folder), tmp_path / "run", move=False)
    for group in result["groups"].values():
        for name, row in group["metrics"].items():
            assert (row["difference"], row["low"], row["high"]) == (0, 0, 0) or group["prompts"] == 1, name
            assert row["difference"] == 0
            assert (row["wins"], row["losses"], row["win_rate"]) == (0, 0, 0.5)
    for entry in result["prompts"]:
        for picture in entry["pictures"]:
            assert (directory.path / picture["base"]).read_bytes() == (directory.path / picture["aligned"]).read_bytes()
    assert "Nothing changed" in write_report(directory).read_text()


def test_numbers_are_those_of_the_pictures_on_disk(model_folder: Path, tmp_path: Path) -> None:
    result, directory = evaluated(make_run(model_folder), tmp_path / "run")
    assert json.loads((directory.path / "eval.json").read_text()) == result

    def picture(entry: dict[str, Any], seed: int, side: str) -> torch.Tensor:
        return load_png(directory.path / entry["pictures"][seed][side])

    differences: list[float] = []
    for entry in result["prompts"]:
        means: dict[str, float] = {}
        for side in ("base", "aligned"):
            pictures = [picture(entry, seed, side) for seed in range(3)]
            # brightness: the mean over pixels of 0.2126 R + 0.7152 G + 0.0722 B, here in numpy on the 8-bit files
            weights = np.array([0.2126, 0.7152, 0.0722])
            values = [float((image.numpy().transpose(1, 2, 0) @ weights).mean()) for image in pictures]
            means[side] = float(np.mean(values))
            assert entry["metrics"]["reward"][side] == pytest.approx(means[side], abs=0.003)
            small = torch.stack([image.flatten() for image in pictures])  # 16 x 16 already
            assert entry["metrics"]["pixels"][side] == pytest.approx(pairwise_rms(small), abs=0.003)
        differences.append(means["aligned"] - means["base"])
    row = result["groups"]["all"]["metrics"]["reward"]
    assert row["difference"] == pytest.approx(np.mean(differences), abs=0.004)
    assert row["low"] <= row["difference"] <= row["high"]
    assert row["wins"] == sum(difference > 0 for difference in differences)
    assert result["groups"]["seen"]["metrics"]["reward"]["n"] == 2
    assert result["groups"]["unseen"]["metrics"]["reward"]["low"] is None  # one prompt has no interval
    assert result["settings"]["judge_held_out"] is True
    assert result["metrics"]["judge"]["role"] == "judge"


def test_diversity_among_good_pictures_counts_the_noises_that_gave_both_models_one(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(model_folder, eval={"seeds": 6})
    first, _ = evaluated(run, tmp_path / "first")
    assert "distance_good" not in first["groups"]["all"]["metrics"]  # this judge has no threshold
    scores = [
        picture["scores"]["judge"][side]
        for entry in first["prompts"]
        for picture in entry["pictures"]
        for side in ("base", "aligned")
    ]
    threshold = float(np.quantile(scores, 0.3))
    assert run.eval.judge is not None
    monkeypatch.setattr(type(run.eval.judge.load("cpu")), "good_threshold", threshold, raising=False)
    result, directory = evaluated(run, tmp_path / "run")
    counts: list[int] = []
    for entry in result["prompts"]:
        pictures = entry["pictures"]
        good = [each for each in pictures if min(each["scores"]["judge"].values()) >= threshold]
        counts.append(len(good))
        for side in ("base", "aligned"):
            value = entry["metrics"]["distance_good"][side]
            if len(good) < 2:
                assert value is None
                continue
            means = [block_means(load_png(directory.path / each[side]).numpy()) - 0.5 for each in good]
            expected = np.mean([1 - cosine(a, b) for a, b in itertools.combinations(means, 2)])
            assert value == pytest.approx(expected, abs=0.005)
    assert any(2 <= count < 6 for count in counts)


def test_the_base_weighted_to_the_same_judge_is_drawn_from_the_same_pictures(
    model_folder: Path, tmp_path: Path
) -> None:
    still, _ = evaluated(make_run(model_folder, eval={"seeds": 4}), tmp_path / "still", move=False)
    for group in still["groups"].values():
        assert (group["weighted_base"]["share"], group["weighted_base"]["of_it"]) == (1, pytest.approx(1))
    result, directory = evaluated(make_run(model_folder, eval={"seeds": 5}), tmp_path / "run")
    found = result["groups"]["all"]["weighted_base"]
    judge, between = [], []
    for entry in result["prompts"]:
        judge.append(np.array([each["scores"]["judge"]["base"] for each in entry["pictures"]]))
        images = [block_means(load_png(directory.path / each["base"]).numpy()) - 0.5 for each in entry["pictures"]]
        between.append(np.array([[1 - cosine(a, b) for a in images] for b in images]))
    gain = result["groups"]["all"]["metrics"]["judge"]["difference"]

    def at(strength: float) -> tuple[float, float]:
        found = [reweighted(*each, strength) for each in zip(judge, between, strict=True)]
        return float(np.mean([each[0] for each in found])), float(np.mean([each[1] for each in found]))

    grid = np.array([at(strength) for strength in np.linspace(0, 4 / np.mean([each.std() for each in judge]), 2000)])
    share = np.interp(gain, grid[:, 0] - grid[0, 0], grid[:, 1]) / grid[0, 1]
    assert found["share"] == pytest.approx(share, abs=0.01)
    assert found["of_it"] == pytest.approx(result["groups"]["all"]["metrics"]["distance"]["ratio"] / share, abs=0.02)
    # Three pictures are too few, and a judge that was trained on has no say.
    few, _ = evaluated(make_run(model_folder), tmp_path / "few")
    assert few["groups"]["all"]["weighted_base"] is None
    trained, _ = evaluated(
        make_run(model_folder, eval={"seeds": 4, "judge": {"name": "brightness"}}), tmp_path / "trained"
    )
    assert trained["groups"]["all"]["weighted_base"] is None


def block_means(image: np.ndarray) -> np.ndarray:
    """(3, 16, 16) to the means of its 2 x 2 blocks, flat."""
    return image.reshape(3, 8, 2, 8, 2).mean((2, 4)).ravel()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_pictures_do_not_depend_on_the_batch_or_the_other_prompts(model_folder: Path, tmp_path: Path) -> None:
    first, one = evaluated(make_run(model_folder), tmp_path / "one")
    alone = make_run(model_folder, prompts={"list": ["a dog"]}, eval={"prompts_unseen": None, "batch_size": 1})
    second, two = evaluated(alone, tmp_path / "two")
    ours = next(entry for entry in first["prompts"] if entry["prompt"] == "a dog")
    for mine, other in zip(ours["pictures"], second["prompts"][0]["pictures"], strict=True):
        for side in ("base", "aligned"):
            difference = load_png(one.path / mine[side]) - load_png(two.path / other[side])
            assert difference.abs().max() <= 1 / 255 + 1e-6  # at most one level of rounding
    assert set(second["groups"]) == {"seen", "all"}


def test_training_does_not_notice(model_folder: Path, tmp_path: Path) -> None:
    run = make_run(model_folder)
    directory = RunDirectory.create(tmp_path / "run", run)
    model = load(run, move=True)
    before = {name: parameter.detach().clone() for name, parameter in model.trainable().items()}
    model.evaluations, state = 17, torch.get_rng_state()
    reporter = Silent()
    result = evaluate(run, directory, model, reporter=reporter)
    assert model.evaluations == 17
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.trainable().items())
    assert all(parameter.grad is None for parameter in model.trainable().values())
    assert result["cost"]["forwards"] == 3 * 2 * 9  # steps, sides, pictures
    assert reporter.steps[-1] == (18, 18)


def test_a_later_evaluation_replaces_the_pictures_and_keeps_the_history(model_folder: Path, tmp_path: Path) -> None:
    run = make_run(model_folder)
    directory = RunDirectory.create(tmp_path / "run", run)
    model = load(run, move=True)
    for update, seeds in ((1, 3), (2, 2), (2, 2)):
        directory.append_metrics({"update": update})
        changed = make_run(model_folder, eval={"seeds": seeds})
        result = evaluate(changed, directory, model, reporter=Silent())
    assert [entry["update"] for entry in result["history"]] == [1, 2]
    assert len(list((directory.path / "samples" / "eval" / "base").iterdir())) == 3 * 2
    assert not list((directory.path / "samples").glob("*partial*"))
    assert (directory.path / "samples" / "eval" / "side_by_side.png").is_file()


def test_several_rewards_and_a_judge_that_is_one_of_them(model_folder: Path, tmp_path: Path) -> None:
    rewards = [{"name": "brightness", "weight": 2.0}, {"name": "colourfulness", "weight": 0.5}]
    result, directory = evaluated(make_run(model_folder, reward=rewards), tmp_path / "run")
    for entry in result["prompts"]:
        metrics = entry["metrics"]
        for side in ("base", "aligned"):
            parts = 2.0 * metrics["reward:brightness"][side] + 0.5 * metrics["reward:colourfulness"][side]
            assert metrics["reward"][side] == pytest.approx(parts, rel=1e-5)
    assert result["settings"]["judge_held_out"] is False
    assert "no independent check" in write_report(directory).read_text()


class Fussy:
    """A reward of the user's own that cannot score bright pictures."""

    name = "fussy"
    differentiable = False

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        score = images.mean((1, 2, 3))
        return torch.where(score > score.median(), torch.full_like(score, float("nan")), score)


def test_invalid_scores_stop_or_are_left_out_in_pairs(model_folder: Path, tmp_path: Path) -> None:
    reward = {"name": f"{__name__}:Fussy"}
    with pytest.raises(RewardError, match="nan"):
        evaluated(make_run(model_folder, reward=reward), tmp_path / "stop")
    result, directory = evaluated(make_run(model_folder, reward=reward, on_invalid_reward="skip"), tmp_path / "skip")
    for entry in result["prompts"]:
        scored = [
            picture["scores"]["reward"]
            for picture in entry["pictures"]
            if None not in picture["scores"]["reward"].values()
        ]
        for side in ("base", "aligned"):
            expected = np.mean([scores[side] for scores in scored]) if scored else None
            assert entry["metrics"]["reward"][side] == (None if expected is None else pytest.approx(expected, rel=1e-5))
    assert write_report(directory).is_file()


def test_a_judge_that_leaves_pictures_out_gives_no_weighted_base(model_folder: Path, tmp_path: Path) -> None:
    judged = make_run(model_folder, eval={"seeds": 4, "judge": {"name": f"{__name__}:Fussy"}})
    result, directory = evaluated(judged, tmp_path / "run")
    assert result["settings"]["judge_held_out"] is True
    assert [group["weighted_base"] for group in result["groups"].values()] == [None, None, None]
    assert write_report(directory).is_file()


def test_without_an_adapter_there_is_nothing_to_compare(model_folder: Path, tmp_path: Path) -> None:
    run = make_run(model_folder)
    directory = RunDirectory.create(tmp_path / "run", run)
    model = load(run, move=False)
    model.trainable = dict  # type: ignore[method-assign]
    with pytest.raises(UserError, match="nothing to compare"):
        evaluate(run, directory, model, reporter=Silent())
