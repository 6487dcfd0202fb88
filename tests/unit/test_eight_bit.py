"""AdamW in 8 bits against AdamW, its bytes against what is allocated, and its state through a checkpoint."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from tiny_run import outcome, refused, settings, tailorpo, write_recipe
from torch import Tensor, nn

from tailorpo.models import ModelConfig
from tailorpo.optimizer import Learner, Optimizer
from tailorpo.plan import make_plan
from tailorpo.plan.networks import build_network
from tailorpo.run import Run

EIGHT = Optimizer(name="adamw8bit", lr=1e-2, weight_decay=1e-2)
FULL = Optimizer(lr=1e-2, weight_decay=1e-2)


@pytest.fixture
def bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")


class Regression:
    """A matrix of 8,192 values and one of 640, both to be found from noisy products."""

    def __init__(self, optimizer: Optimizer) -> None:
        torch.manual_seed(0)
        self.inputs, target = torch.randn(512, 64), torch.randn(64, 138)
        self.wanted = self.inputs @ target
        self.large, self.small = nn.Parameter(torch.zeros(64, 128)), nn.Parameter(torch.zeros(64, 10))
        self.learner = Learner({"large": self.large, "small": self.small}, optimizer)

    def train(self, steps: int) -> float:
        for _ in range(steps):
            loss = (self.inputs @ torch.cat([self.large, self.small], dim=1) - self.wanted).square().mean()
            self.learner.backward(loss)
            self.learner.step()
        return self.learner.take_metrics()["loss"]


def apart(one: Tensor, other: Tensor) -> float:
    return float(((one - other).norm() / other.norm()).detach())


def test_it_goes_where_adamw_goes(bitsandbytes: None) -> None:
    eight, full = Regression(EIGHT), Regression(FULL)
    assert eight.train(200) == pytest.approx(full.train(200), rel=0.05)
    # Where 8 bits are not used there is nothing but rounding; where they are, 2.5 % was measured.
    assert apart(eight.small, full.small) < 2e-3
    assert 1e-4 < apart(eight.large, full.large) < 0.05


def test_going_on_from_a_checkpoint_is_bit_for_bit_the_same(bitsandbytes: None) -> None:
    whole, first, second = Regression(EIGHT), Regression(EIGHT), Regression(EIGHT)
    whole.train(7)
    first.train(4)
    second.learner.load_tensors(load(save(first.learner.tensors())), steps=4)
    second.train(3)
    assert torch.equal(second.large, whole.large)
    assert torch.equal(second.small, whole.small)
    ours, theirs = second.learner.tensors(), whole.learner.tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_predicted_bytes_are_those_that_are_kept(bitsandbytes: None) -> None:
    task = Regression(EIGHT)
    task.train(1)
    kept = {name: tensor for name, tensor in task.learner.tensors().items() if name.startswith("optimizer/")}
    for name, parameter in (("large", task.large), ("small", task.small)):
        own = [each for key, each in kept.items() if key.endswith(name) and "/step/" not in key]
        assert sum(each.numel() * each.element_size() for each in own) == EIGHT.state_bytes(parameter.numel())
    assert EIGHT.state_bytes(1 << 20) < FULL.state_bytes(1 << 20) / 3.9
    assert EIGHT.state_bytes(640) == FULL.state_bytes(640)


def test_the_plan_knows_its_bytes(tiny_folder: Path) -> None:
    whole: dict[str, Any] = {"path": str(tiny_folder), "lora": None, "full": True}
    plans = [
        make_plan(Run.from_dict(settings(tiny_folder, model=whole, optimizer={"name": name}), files=False))
        for name in ("adamw", "adamw8bit")
    ]
    trained = build_network(ModelConfig(**whole), "meta").model.trainable().values()
    saved = sum(FULL.state_bytes(each.numel()) - EIGHT.state_bytes(each.numel()) for each in trained)
    key = "what is trained, its gradient, Adam's moments"
    full, eight = (plan.memory[key] for plan in plans)
    assert full - eight == plans[0].peak_bytes - plans[1].peak_bytes == saved
    assert saved > 0


def test_a_run_of_the_whole_network_resumes_bit_for_bit(bitsandbytes: None, tiny_folder: Path, tmp_path: Path) -> None:
    model = ModelConfig(path=str(tiny_folder), lora=None, full=True)
    sizes = [each.numel() for each in build_network(model, "meta").model.trainable().values()]
    assert max(sizes) >= 4096 > min(sizes)  # both kinds of state
    changes: dict[str, Any] = {
        "model": {"path": str(tiny_folder), "lora": None, "full": True},
        "optimizer": {"name": "adamw8bit", "lr": 1e-4},
    }
    recipe = write_recipe(tmp_path, tiny_folder, **changes)
    assert tailorpo("train", recipe, "--out", tmp_path / "whole").exit_code == 0
    assert tailorpo("train", recipe, "updates=1", "--out", tmp_path / "parts").exit_code == 0
    assert tailorpo("resume", tmp_path / "parts", "updates=3").exit_code == 0
    whole, parts = ({**each} for each in (_outcome(tmp_path / "whole"), _outcome(tmp_path / "parts")))
    assert parts == whole
    assert "cannot change" in refused("resume", tmp_path / "parts", "updates=4", "optimizer.name=adamw")


def _outcome(run: Path) -> dict[str, Any]:
    (run / "lora").mkdir()
    (run / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"")  # there is none, the whole network is trained
    return outcome(run)


def test_without_bitsandbytes_it_is_said_what_to_install(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("tailorpo.eight_bit.find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    recipe = write_recipe(tmp_path, tiny_folder, optimizer={"name": "adamw8bit"})
    for command in (("train", recipe, "--out", tmp_path / "run"), ("show", recipe)):
        message = refused(*command)
        assert "adamw8bit needs bitsandbytes" in message
        assert "pip install 'tailorpo[8bit]'" in message
    assert tailorpo("plan", recipe).exit_code == 0


def test_a_layout_it_would_undo_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    model = {"path": str(tiny_folder), "lora": None, "full": True, "channels_last": True}
    recipe = write_recipe(tmp_path, tiny_folder, model=model, optimizer={"name": "adamw8bit"})
    assert "undoes model.channels_last" in refused("plan", recipe)
