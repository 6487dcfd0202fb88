"""On a CUDA GPU, where there is one: nothing waits for it on the way, and it computes what the CPU does."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny_model, save_tiny_xl_model
from tiny_run import settings

from tailorpo.noise import Noise
from tailorpo.optimizer import Learner
from tailorpo.policy import Policy
from tailorpo.progress import Plain
from tailorpo.rewards import load_scorer
from tailorpo.rollout import sample_images
from tailorpo.run import Run
from tailorpo.rundir import RunDirectory
from tailorpo.train import Session, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SIGMA = {"form": "sigma", "k": 1.0}


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Convolutions in float32 instead of TF32, which keeps 10 bits; matrix products are by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def session_on(device: str, run: Run, folder: Path) -> Session:
    """A training session."""
    policy = Policy(run.model.load(torch.device(device), seed=0), run.sampler)
    return Session(
        run,
        policy,
        score=load_scorer(run.reward, torch.device(device)),
        learner=Learner(policy.model.trainable(), run.optimizer),
        directory=RunDirectory.create(folder, run),
        reporter=Plain(),
    )


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("guidance", [None, SIGMA, {"form": "target", "delta": 0.5}], ids=["plain", "sigma", "target"])
@pytest.mark.parametrize("update", ["inline", "buffered"])
def test_only_the_scores_are_waited_for(
    update: str, guidance: dict[str, Any] | None, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = (save_tiny_xl_model if family == "sdxl" else save_tiny_model)(tmp_path / "model")
    algorithm = {"name": "tailorpo", "train_steps": 2, "update": update, "guidance": guidance}
    data = settings(path, algorithm=algorithm, updates=50)
    data["model"]["family"] = family
    session = session_on("cuda", Run.from_dict(data), tmp_path / "run")
    session.update(20)  # loads kernels and encodes prompts
    before: list[list[str]] = []
    step = session.learner.step

    def note_and_step() -> None:
        waits = [each for each in caught if "synchronizing CUDA operation" in str(each.message)]
        before.append([f"{Path(each.filename).name}:{each.lineno}" for each in waits])
        step()

    monkeypatch.setattr(session.learner, "step", note_and_step)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            session.update(21)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Of each of the two steps when the next pictures are scored, of the finished ones at once.
    assert [each.partition(":")[0] for each in before[0]] == ["scorer.py"] * 3, before[0]
    assert len(caught) > 4  # what is logged is read after it


def test_pictures_are_those_of_the_cpu() -> None:
    run = Run.from_dict(settings("emoji", sampler={"steps": 20, "guidance_scale": 2.0}))
    pictures: list[torch.Tensor] = []
    for device in ("cpu", "cuda"):
        policy = Policy(run.model.load(torch.device(device), seed=0), run.sampler)
        pictures.append(sample_images(policy, ["a cat", "a dog"], noise=Noise(3), keys=[("a",), ("b",)]).cpu())
    assert torch.allclose(pictures[0], pictures[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("guidance", [None, SIGMA], ids=["plain", "sigma"])
def test_an_update_is_that_of_the_cpu(guidance: dict[str, Any] | None, tmp_path: Path) -> None:
    algorithm = {"name": "tailorpo", "train_steps": 2, "guidance": guidance}
    run = Run.from_dict(settings("emoji", algorithm=algorithm, reward={"name": "emoji_preference"}))
    figures: list[dict[str, Any]] = []
    weights: list[torch.Tensor] = []
    for device in ("cpu", "cuda"):
        session = session_on(device, run, tmp_path / device)
        figures += [session.update(update) for update in range(2)]
        weights.append(flat(session.policy.model.trainable()))
    for update in range(2):
        on_cpu, on_gpu = figures[update], figures[2 + update]
        for name in ("loss", "gap", "kl", "kl_trajectory", "reward_mean", "reward_final", "grad_norm"):
            assert on_gpu[name] == pytest.approx(on_cpu[name], rel=1e-2, abs=1e-4), name
        assert on_gpu["reward_queries"] == on_cpu["reward_queries"]
    # Adam divides by the root of the squared gradient, so weights whose gradient is rounding may go anywhere.
    start = flat(run.model.load(torch.device("cpu"), seed=0).trainable())
    apart, moved = (torch.dist(weights[0], other) for other in (weights[1], start))
    assert bool(apart < 0.1 * moved)


def flat(parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """All numbers in a row, on the CPU."""
    return torch.cat([each.detach().cpu().flatten() for each in parameters.values()])


@pytest.mark.parametrize("method", ["tailorpo", "d3po", "spo", "ddpo"])
def test_the_same_run_has_the_same_numbers_again(method: str, tmp_path: Path) -> None:
    """Also where other prompts were encoded first, as by sentinels or in another part of an interrupted run."""
    steps, reward = {"steps": 8, "guidance_scale": 2.0}, {"name": "emoji_preference"}
    run = Run.from_dict(settings("emoji", algorithm={"name": method}, sampler=steps, reward=reward))
    runs: list[list[dict[str, Any]]] = []
    for again in range(2):
        session = session_on("cuda", run, tmp_path / str(again))
        session.policy.model.encode([["a dog"], ["a horse", "a cat", "a dog"]][again])
        runs.append([session.update(update) for update in range(2)])
    assert runs[0] == runs[1]


@pytest.mark.parametrize("method", ["tailorpo", "ddpo"])
def test_a_resumed_run_is_the_uninterrupted_one(method: str, tmp_path: Path) -> None:
    steps, reward = {"steps": 8, "guidance_scale": 2.0}, {"name": "emoji_preference"}
    data = settings("emoji", algorithm={"name": method}, sampler=steps, reward=reward, updates=4)
    run = Run.from_dict({**data, "sentinels": {"every": 1, "judge": {"name": "emoji_judge"}}})
    whole, parts = (RunDirectory.create(tmp_path / name, run) for name in ("whole", "parts"))
    train(run, whole, reporter=Plain())
    for updates in (1, 3, 4):
        train(replace(run, updates=updates), parts, reporter=Plain())
    assert timeless(parts) == timeless(whole)
    assert weights_file(parts) == weights_file(whole)


def timeless(directory: RunDirectory) -> list[dict[str, Any]]:
    """The metrics without what the clock says."""
    rows = directory.metrics()
    for row in rows:
        del row["seconds"], row["sentinel"]["seconds"]
    return rows


def weights_file(directory: RunDirectory) -> bytes:
    """What was trained."""
    return (directory.path / "lora/pytorch_lora_weights.safetensors").read_bytes()
