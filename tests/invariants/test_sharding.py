"""Two processes that hold a part of the network each (FSDP2) train as one that holds it whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import processes as many
import pytest
import torch
from processes import checkpoint, metrics, norm
from safetensors.torch import load_file
from tiny_run import settings, write_recipe

from tailorpo._distributed import Processes
from tailorpo._sharding import Sharding
from tailorpo.errors import UserError
from tailorpo.run import Run
from tailorpo.sharing import check_shares

METHODS: dict[str, dict[str, Any]] = {
    "guided": {"name": "tailorpo", "train_steps": 2, "guidance": {"form": "sigma", "k": 0.5}},
    "buffered": {"name": "tailorpo", "train_steps": 2, "update": "buffered", "minibatch": 1, "accumulate": 3},
}
# A large eps makes Adam's step a smooth function of the gradient, so that rounding stays small.
SHARED: dict[str, Any] = {
    "updates": 2,
    "batch": {"trajectories": 4, "micro": 2},
    "optimizer": {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.0},
}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(("method", "full"), [("guided", False), ("buffered", True)])
def test_in_shards_two_processes_train_as_one_does(tiny_folder: Path, tmp_path: Path, method: str, full: bool) -> None:
    """The buffered update deals out its minibatches unequally, so that a process has to fill up."""
    model: dict[str, Any] = {"path": str(tiny_folder)} | (
        {"lora": None, "full": True} if full else {"lora": {"rank": 2}}
    )
    data = settings(tiny_folder, algorithm=METHODS[method], model=model, **SHARED)
    for count in (1, 2):
        folder = tmp_path / str(count)
        ended = many.run(
            count, folder, many.training, data, folder / "run", prepare=many.record_shards, environment=FSDP
        )
        assert [each.exit_code for each in ended] == [0] * count, ended
    for rank in (0, 1):  # between two forwards each holds about half, after an update as before
        held, whole = map(int, (tmp_path / "2" / f"bytes-{rank}-2.txt").read_text().split())
        assert held < 0.6 * whole
    held, whole = map(int, (tmp_path / "1" / "bytes-0-2.txt").read_text().split())
    assert held == whole

    one, two = tmp_path / "1" / "run", tmp_path / "2" / "run"
    for mine, other in zip(metrics(one), metrics(two), strict=True):
        for name in ("loss", "grad_norm", "reward_mean", "reward_final", "kl"):
            if name in mine:
                assert other[name] == pytest.approx(mine[name], rel=1e-4, abs=1e-6), name
        assert other["forwards"] == mine["forwards"]  # what fills up is not counted
    for update in (1, 2):
        ours, theirs = checkpoint(one, update), checkpoint(two, update)
        assert ours.keys() == theirs.keys()
        moments = [name for name in ours if name.startswith("optimizer/exp_avg/")]
        assert moments
        assert norm(ours[name] - theirs[name] for name in moments) < 1e-4 * norm(ours[name] for name in moments)
        names = [name for name in ours if name.startswith("parameter/")]
        assert norm(ours[name] - theirs[name] for name in names) < 1e-4
    if full:
        assert (one / "unet" / "config.json").read_bytes() == (two / "unet" / "config.json").read_bytes()
        saved = load_file(two / "unet" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(saved[name.removeprefix("parameter/")], theirs[name]) for name in names)


def test_shards_resume_on_one_process_or_two_after_one_was_killed(tiny_folder: Path, tmp_path: Path) -> None:
    """Also an evaluation of an odd number of batches, which leaves a process without one."""
    path = write_recipe(
        tmp_path,
        tiny_folder,
        model={"path": str(tiny_folder), "lora": None, "full": True},
        reward={"name": "processes:striking"},
        batch={"trajectories": 2, "micro": 1},
        optimizer={"lr": 1e-2, "eps": 1e-2},
        eval={"seeds": 3, "batch_size": 1, "prompts_seen": {"list": ["a cat"]}},
        updates=2,
    )
    harmless, deadly = FSDP | {"STRIKE": "none 0 0"}, FSDP | {"STRIKE": "kill 1 6"}
    whole, run, alone = tmp_path / "whole", tmp_path / "run", tmp_path / "alone"
    ended = many.run(2, tmp_path / "a", many.command, "train", str(path), "--out", str(whole), environment=harmless)
    assert [each.exit_code for each in ended] == [0, 0], ended
    assert "in shards: each process holds" in ended[0].output
    ended = many.run(2, tmp_path / "b", many.command, "train", str(path), "--out", str(run), environment=deadly)
    assert ended[0].exit_code == 1, ended
    assert "another process of this run has failed" in ended[0].output
    assert "Traceback" not in ended[0].output
    assert not (run / "checkpoints" / "update-000002").exists()
    shutil.copytree(run, alone)
    for count, folder in ((2, run), (1, alone)):
        ended = many.run(count, tmp_path / f"c{count}", many.command, "resume", str(folder), environment=harmless)
        assert [each.exit_code for each in ended] == [0] * count, ended
    expected = checkpoint(whole, 2)
    assert all(torch.equal(each, expected[name]) for name, each in checkpoint(run, 2).items())
    rounded = checkpoint(alone, 2)
    assert all(torch.allclose(rounded[name], each, rtol=1e-3, atol=1e-5) for name, each in expected.items())


def test_what_would_make_unequal_calls_is_refused(tiny_folder: Path) -> None:
    processes = Processes(0, 2, Sharding(lambda network: lambda module: False, reshard=True))
    uneven = Run.from_dict(settings(tiny_folder, batch={"trajectories": 6, "micro": 2}))
    with pytest.raises(UserError, match="a multiple of 4, or start without FSDP"):
        check_shares(uneven, processes)
    method = {"name": "reward_backprop", "last_steps": 2, "truncation": "random"}
    even = Run.from_dict(settings(tiny_folder, algorithm=method, batch={"trajectories": 4, "micro": 2}))
    with pytest.raises(UserError, match="say fixed, or start without FSDP"):
        check_shares(even, processes)
    check_shares(uneven, Processes(0, 2))
