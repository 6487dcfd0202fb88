"""A user's own reward: import paths, factories, Python objects, and the message for every way to get them wrong."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tailorpo.errors import RewardError
from tailorpo.rewards import CustomReward, Scorer
from tailorpo.rewards.custom import PythonReward

REPOSITORY = Path(__file__).parents[2]
MODULE = '''
import torch

def score(images, prompts):
    return images[:, 0].mean((1, 2))
score.differentiable = True

def make(channel=0, *, scale: float = 1.0):
    """A factory."""
    return Channel(channel, scale)

def with_device(channel, device):
    assert str(device) == "cpu"
    return Channel(channel, 1.0)

class Channel:
    differentiable = True
    def __init__(self, channel, scale=1.0):
        self.channel, self.scale = channel, scale
    def __call__(self, images, prompts):
        return self.scale * images[:, self.channel].mean((1, 2))

def listed(images, prompts):
    return [len(prompt) for prompt in prompts]

def in_place(images, prompts):
    images.mul_(0)
    return images.mean((1, 2, 3))

def broken(path):
    raise FileNotFoundError(path)

def empty():
    return None

class Odd:
    differentiable = "yes"
    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))

ready = Channel(2)
number = 3
'''


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A directory of the user's with modules in it, as the current one; forgotten afterwards."""
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "rewards.py").write_text(MODULE)
    (package / "syntax.py").write_text("def broken(:\n")
    (package / "needy.py").write_text("import a_library_nobody_has\n")
    (package / "raises.py").write_text("\n\nassert 1 == 2, 'no GPU here'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "my_package"]:
        del sys.modules[name]


def pictures() -> Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def own(attribute: str, **args: object) -> PythonReward:
    return CustomReward(name=f"my_package.rewards:{attribute}", args=args).load("cpu")


@pytest.mark.parametrize(
    ("attribute", "args", "channel", "scale"),
    [
        ("score", {}, 0, 1.0),
        ("make", {}, 0, 1.0),
        ("make", {"channel": 1, "scale": 3.0}, 1, 3.0),
        ("with_device", {"channel": 2}, 2, 1.0),
        ("Channel", {"channel": 1}, 1, 1.0),
        ("ready", {}, 2, 1.0),
    ],
)
def test_functions_factories_classes_and_objects(
    attribute: str, args: dict[str, object], channel: int, scale: float
) -> None:
    images = pictures().requires_grad_()
    scores = Scorer([(own(attribute, **args), 1.0)])(images, ["a", "b", "c"])
    assert scores.tolist() == pytest.approx((scale * images.detach().numpy()[:, channel].mean(axis=(1, 2))).tolist())
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert (gradient[:, channel] != 0).all()


def test_whether_it_is_differentiable_is_known_before_it_is_loaded() -> None:
    def config(attribute: str, **args: object) -> bool:
        return CustomReward(name=f"my_package.rewards:{attribute}", args=args).differentiable

    assert config("score")
    assert config("Channel", channel=1)
    assert config("make")  # the factory does not say, what it makes does
    assert config("ready")
    assert not config("listed")


def test_lists_arrays_and_integers_become_float_tensors() -> None:
    for function in (
        lambda images, prompts: [len(prompt) for prompt in prompts],
        lambda images, prompts: np.array([float(len(prompt)) for prompt in prompts]),
        lambda images, prompts: torch.tensor([len(prompt) for prompt in prompts]),
    ):
        scorer = Scorer([(CustomReward.of(function).load("cpu"), 1.0)])
        assert torch.equal(scorer(pictures(), ["a", "bb", "cccc"]), torch.tensor([1.0, 2.0, 4.0]))


def test_working_in_place_does_not_touch_the_pictures() -> None:
    images = pictures()
    Scorer([(own("in_place"), 1.0)])(images, ["a", "b", "c"])
    assert torch.equal(images, pictures())


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("my_packag.rewards:make", {}, r"no module 'my_packag'; did you mean `my_package`\?\n.*started from"),
        ("my_package.reward:make", {}, r"no module 'my_package\.reward'; did you mean `rewards`\?"),
        ("my_package.rewards:mak", {}, r"has no 'mak'; did you mean `make`\?"),
        ("my_package.rewards:number", {}, r"is a int, and cannot be called"),
        (
            "my_package.rewards:make",
            {"chanel": 1},
            r"unexpected keyword.*did you mean `channel`\?\n.*\n.*make\(channel=0",
        ),
        ("my_package.rewards:Channel", {}, r"missing a required argument: 'channel'"),
        ("my_package.rewards:ready", {"channel": 1}, r"is a ready object and takes no args; got channel"),
        (
            "my_package.rewards:broken",
            {"path": "x.bin"},
            r"making it raised FileNotFoundError: x\.bin \(in rewards\.py",
        ),
        ("my_package.rewards:empty", {}, r"made a NoneType, which cannot be called"),
        ("my_package.rewards:Odd", {}, r"`differentiable` has to be True or False, not 'yes'"),
        ("my_package.syntax:f", {}, r"importing 'my_package\.syntax' raised SyntaxError"),
        ("my_package.needy:f", {}, r"needs 'a_library_nobody_has', not installed"),
        ("my_package.raises:f", {}, r"raised AssertionError: no GPU here \(in raises\.py, line 3\)"),
        ("__main__:reward#1", {}, r"was a Python object of the process that began this run"),
    ],
)
def test_every_way_to_get_it_wrong_has_its_message(name: str, args: dict[str, object], message: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        CustomReward(name=name, args=args).load("cpu")
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["my_package/rewards.py:make", "make", "a:", ":b", "a b:c", "a..b:c"])
def test_a_name_that_is_no_import_path(name: str) -> None:
    with pytest.raises(ValueError, match=r"package\.module:attribute"):
        CustomReward(name=name)


def module_level(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean((1, 2, 3))


def test_a_python_object_is_a_reward_as_it_is() -> None:
    first, second = (lambda images, prompts: images.mean((1, 2, 3)) for _ in range(2))
    one, again, two = CustomReward.of(first), CustomReward.of(first), CustomReward.of(second)
    assert one == again
    assert one != two
    assert "#" in one.name
    assert CustomReward(name=one.name).load("cpu").name == one.name  # the name alone, as in a copied configuration
    named = CustomReward.of(module_level)
    assert named.name == f"{__name__}:module_level"
    assert torch.allclose(one.load("cpu")(pictures(), "abc"), named.load("cpu")(pictures(), "abc"))


def test_the_example_of_the_documentation_runs(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs" / "add_a_reward.md").read_text()
    blocks = re.findall(r"```python\n# my_rewards\.py\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 1
    (tmp_path / "my_rewards.py").write_text(blocks[0])
    try:
        for name, args in (("my_rewards:warmth", {}), ("my_rewards:Sharpness", {"threshold": 0.1})):
            config = CustomReward(name=name, args=args)
            assert config.differentiable
            images = pictures().requires_grad_()
            scores = Scorer([(config.load("cpu"), 1.0)])(images, ["a", "b", "c"])
            (gradient,) = torch.autograd.grad(scores.sum(), images)
            assert (gradient != 0).any()
    finally:
        sys.modules.pop("my_rewards", None)
