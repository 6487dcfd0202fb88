"""A reward on a device of its own: the pictures go there, the score and its gradient come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_run import refused, settings, tailorpo, write_recipe
from torch import Tensor

from tailorpo.rewards import Scorer, load_scorer
from tailorpo.run import Run


class Elsewhere:
    """Notes where its pictures are; its score is on the CPU."""

    name, differentiable = "elsewhere", False

    def __init__(self) -> None:
        self.given: list[torch.device] = []

    def __call__(self, images: Tensor, prompts: Any) -> Tensor:
        self.given.append(images.device)
        return torch.arange(len(images), dtype=torch.float32)


def test_pictures_go_to_the_reward_and_scores_come_back() -> None:
    # "meta" is the one second device that every machine has; nothing can be computed there, but it can be noted.
    there, here = Elsewhere(), Elsewhere()
    scorer = Scorer([(there, 2.0), (here, 1.0)], devices=[torch.device("meta"), torch.device("cpu")])
    score = scorer(torch.rand(3, 3, 8, 8), ["a", "b", "c"])
    assert there.given == [torch.device("meta")]
    assert here.given == [torch.device("cpu")]
    assert score.device.type == "cpu"
    assert score.tolist() == [0.0, 3.0, 6.0]


def test_the_key_is_read_written_and_free_to_change(tiny_folder: Path, tmp_path: Path) -> None:
    plain = Run.from_dict(settings(tiny_folder))
    placed = Run.from_dict(settings(tiny_folder, reward={"name": "brightness", "device": "cpu"}))
    assert "device" not in plain.to_dict()["reward"]
    assert placed.to_dict()["reward"]["device"] == "cpu"
    assert Run.from_dict(placed.to_dict()).reward[0].device == "cpu"
    listed = Run.from_dict(settings(tiny_folder, reward=[{"name": "brightness", "device": "cpu", "weight": 2.0}]))
    assert (listed.reward[0].device, listed.reward[0].weight) == ("cpu", 2.0)
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(load_scorer(placed.reward, "cpu")(images, ["a", "b"]).sum(), images)
    assert float(gradient.abs().sum()) > 0

    recipe = write_recipe(tmp_path, tiny_folder, updates=1)
    assert tailorpo("train", recipe, "--out", tmp_path / "run").exit_code == 0
    (tmp_path / "run" / "report.html").unlink()
    assert tailorpo("resume", tmp_path / "run", "reward.device=cpu").exit_code == 0


def test_a_device_that_is_not_there_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_folder)
    assert "device 'nowhere' is not one that torch knows" in refused(
        "train", recipe, "reward.device=nowhere", "--out", tmp_path / "run"
    )
    if not torch.cuda.is_available():
        assert "device 'cuda:1' is not available here" in refused(
            "train", recipe, "reward.device=cuda:1", "--out", tmp_path / "run"
        )
    assert "reward.device" in refused("show", recipe, "reward.device=1")


def test_a_wrong_device_is_found_at_its_line(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_folder, reward=[{"name": "brightness", "device": 3}])
    message = refused("show", recipe)
    number = next(n for n, line in enumerate(recipe.read_text().splitlines(), 1) if "device" in line)
    assert f"line {number}" in message
