"""Where training waits for the device: reading a number from a tensor on it. On a CPU the reads can be counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny_model
from tiny_run import settings
from torch.utils._python_dispatch import TorchDispatchMode

from tailorpo.optimizer import Learner
from tailorpo.policy import Policy
from tailorpo.progress import Plain
from tailorpo.rewards import Scorer
from tailorpo.run import Run
from tailorpo.rundir import RunDirectory
from tailorpo.train import Session


class Reads(TorchDispatchMode):
    """Counts numbers that were read from tensors, and searches for true elements, whose size has to be read."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        # The schedule (float64) and the draws of the noise (int64, one element) live on the CPU on every machine.
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype in (torch.float32, torch.bool):
            self.count += 1
        if func is torch.ops.aten.nonzero.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


class CountedScorer(Scorer):
    """Counts calls, each of which looks once, as the next begins, at the number of pictures without a reward: int64."""

    calls = 0

    def _scores(self, *args: Any) -> Any:
        self.calls += 1
        return super()._scores(*args)


class Brightness:
    name = "brightness"
    differentiable = True

    def __call__(self, images: torch.Tensor, prompts: Any) -> torch.Tensor:
        return images.flatten(1).mean(dim=1)


@pytest.mark.parametrize("guidance", [None, {"form": "sigma", "k": 1.0}, {"form": "target", "delta": 0.5}])
@pytest.mark.parametrize("update", ["inline", "buffered"])
def test_collecting_and_training_read_nothing_from_the_device(
    update: str, guidance: dict[str, Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = {"name": "tailorpo", "train_steps": 2, "update": update, "guidance": guidance}
    run = Run.from_dict(settings(save_tiny_model(tmp_path / "model"), algorithm=algorithm, updates=50))
    policy = Policy(run.model.load("cpu", seed=0), run.sampler)
    score = CountedScorer([(Brightness(), 1.0)])
    learner = Learner(policy.model.trainable(), run.optimizer)
    directory = RunDirectory.create(tmp_path / "run", run)
    session = Session(run, policy, score=score, learner=learner, directory=directory, reporter=Plain())
    reads = Reads()
    # The optimizer's step reads the loss and the norm, once, and the summary reads what is logged; both come after it.
    counted: list[int] = []
    step = learner.step

    def stop_counting() -> None:
        counted.append(reads.count)
        step()

    monkeypatch.setattr(learner, "step", stop_counting)
    with reads:
        session.update(20)
    assert counted[0] == 0
    assert score.calls == 3
    assert reads.count > 0  # the reads after it are seen, so that the zero above means something


def test_a_scorer_reads_once_whatever_it_holds() -> None:
    for members in (1, 3):
        for mode in ("stop", "skip"):
            scorer = Scorer([(Brightness(), 1.0)] * members, on_invalid=mode)
            integers: list[int] = []

            class Integers(TorchDispatchMode):
                def __torch_dispatch__(
                    self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
                ) -> Any:
                    if func is torch.ops.aten._local_scalar_dense.default:
                        integers.append(1)  # noqa: B023
                    return func(*args, **(kwargs or {}))

            with Integers():
                scorer(torch.rand(2, 3, 8, 8), ["a", "b"])
            assert len(integers) == 1
