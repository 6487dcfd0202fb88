"""Two processes that hold a part of the optimizer's state each (DeepSpeed's ZeRO-2) train as one that holds it all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import processes as many
import pytest
import torch
from processes import DEEPSPEED, checkpoint, metrics, needs_deepspeed, norm
from tiny_run import refused, settings, write_recipe

from tailorpo._distributed import Processes
from tailorpo._zero import Zero
from tailorpo.errors import UserError
from tailorpo.run import Run
from tailorpo.sharing import check_shares

CUTS: dict[str, dict[str, Any]] = {
    "LoRA": {
        "algorithm": {"name": "tailorpo", "train_steps": 2, "guidance": {"form": "sigma", "k": 0.5}, "kl_target": 1.0},
        "model": {"lora": {"rank": 2}},
        "stage": {"overlap_comm": True, "reduce_scatter": False, "contiguous_gradients": False},
    },
    "full": {
        "algorithm": {"name": "tailorpo", "train_steps": 2, "update": "buffered", "minibatch": 1, "accumulate": 3},
        "model": {"lora": None, "full": True},
        "stage": {"reduce_bucket_size": 10_000, "allgather_bucket_size": "auto"},
    },
    "moving reference": {
        "algorithm": {"name": "tailorpo", "train_steps": 2, "reference": {"ema": 0.5}},
        "model": {"lora": {"rank": 2}},
        "stage": {},
    },
}
# A large eps makes Adam's step a smooth function of the gradient, so that rounding stays small; the clipping acts.
OPTIMIZER = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1, "grad_clip": 1e-3, "warmup": 2}


def run_file(tiny_folder: Path, cut: str, **changes: Any) -> dict[str, Any]:
    chosen, changes = CUTS[cut], {"updates": 2, "batch": {"trajectories": 4, "micro": 2}} | changes
    model = {"path": str(tiny_folder), **chosen["model"]}
    return settings(tiny_folder, algorithm=chosen["algorithm"], model=model, optimizer=OPTIMIZER, **changes)


def train(count: int, folder: Path, data: dict[str, Any], prepare: Any = many.record_state, **variables: str) -> Path:
    environment = DEEPSPEED | variables
    ended = many.run(count, folder, many.training, data, folder / "run", prepare=prepare, environment=environment)
    assert [each.exit_code for each in ended] == [0] * count, ended
    return folder / "run"


def apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], kind: str) -> float:
    """The distance of two checkpoints relative to the norm of one."""
    names = [name for name in ours if name.startswith(kind)]
    assert names
    return norm(ours[name] - theirs[name] for name in names) / norm(ours[name] for name in names)


@needs_deepspeed
@pytest.mark.parametrize("cut", list(CUTS))
def test_with_a_part_of_the_state_each_two_processes_train_as_one(tiny_folder: Path, tmp_path: Path, cut: str) -> None:
    """The buffered update deals out its minibatches unequally, so that a process has to fill up."""
    data, file = run_file(tiny_folder, cut), tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"gradient_clipping": "auto", "zero_optimization": {"stage": 2, **CUTS[cut]["stage"]}}))
    variables = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    one, two = (train(count, tmp_path / str(count), data, **variables) for count in (1, 2))
    whole = sum(each.numel() for name, each in checkpoint(one, 2).items() if name.startswith("optimizer/exp_avg"))
    for rank in (0, 1):
        held = int((tmp_path / "2" / f"state-{rank}.txt").read_text())
        assert whole // 2 <= held < 0.55 * whole
    assert int((tmp_path / "1" / "state-0.txt").read_text()) == whole

    for mine, other in zip(metrics(one), metrics(two), strict=True):
        for name in ("loss", "grad_norm", "lr", "reward_mean", "reward_final", "kl", "forwards"):
            if name in mine:
                assert other[name] == pytest.approx(mine[name], rel=1e-4, abs=1e-6), name
        assert mine["grad_norm"] > OPTIMIZER["grad_clip"]
    for update in (1, 2):
        ours, theirs = checkpoint(one, update), checkpoint(two, update)
        assert {name: each.shape for name, each in ours.items()} == {name: each.shape for name, each in theirs.items()}
        assert all(torch.equal(ours[name], theirs[name]) for name in ours if name.startswith("optimizer/step/"))
        assert apart(ours, theirs, "optimizer/exp_avg/") < 1e-4
        assert apart(ours, theirs, "optimizer/exp_avg_sq/") < 1e-4
        assert apart(ours, theirs, "parameter/") < 1e-5
        if cut == "moving reference":
            assert apart(ours, theirs, "reference/") < 1e-5

    if cut == "moving reference":
        assert apart(checkpoint(one, 1), checkpoint(one, 2), "reference/") > 1e-4

    if cut == "full":  # either goes on from the other's checkpoint
        longer = Run.from_dict(data | {"updates": 3})
        for count, begun in ((1, two), (2, one)):
            folder = tmp_path / f"on-{count}"
            shutil.copytree(begun, folder / "run")
            ended = many.run(count, folder, many.going_on, longer, folder / "run", environment=DEEPSPEED)
            assert [each.exit_code for each in ended] == [0] * count, ended
        alone, together = checkpoint(tmp_path / "on-1" / "run", 3), checkpoint(tmp_path / "on-2" / "run", 3)
        assert apart(alone, together, "optimizer/exp_avg/") < 1e-3
        assert apart(alone, together, "parameter/") < 1e-5
        assert apart(alone, checkpoint(one, 2), "parameter/") > 1e-4


@needs_deepspeed
def test_without_sums_of_gradients_two_processes_would_come_to_something_else(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """So that the test above can fail."""
    data = run_file(tiny_folder, "LoRA", updates=1)
    one = train(1, tmp_path / "1", data)
    two = train(2, tmp_path / "2", data, prepare=many.without_sums)
    assert apart(checkpoint(one, 1), checkpoint(two, 1), "optimizer/exp_avg/") > 0.1


@needs_deepspeed
def test_a_gradient_that_is_not_finite_ends_the_run_before_a_step(tiny_folder: Path, tmp_path: Path) -> None:
    """In one process of two; the other hears of it."""
    data = run_file(tiny_folder, "LoRA")
    ended = many.run(2, tmp_path, many.diverging, data, tmp_path / "run", environment=DEEPSPEED)
    assert [each.exit_code for each in ended] == [0, 0], ended
    assert all("left as they were: loss 0.0, gradient norm inf" in each.output for each in ended), ended


def zero(**changes: Any) -> Zero:
    stage = {"stage": 2, **changes.pop("zero_optimization", {})}
    return Zero.read(
        {"train_batch_size": "auto", "gradient_accumulation_steps": 1, **changes, "zero_optimization": stage}
    )


def test_what_a_configuration_says_is_honoured_or_refused_all_at_once() -> None:
    buckets = {"reduce_bucket_size": 1000, "allgather_bucket_size": "auto", "offload_param": {"device": "none"}}
    assert zero(zero_optimization=buckets, gradient_clipping=0.5) == Zero({"reduce_bucket_size": 1000}, 0.5)
    assert zero(fp16={"enabled": "auto"}, bf16={"enabled": False}, steps_per_print=10) == Zero({})
    with pytest.raises(UserError) as refusal:
        zero(
            zero_optimization={"stage": 3, "offload_optimizer": {"device": "cpu"}, "round_robin_gradients": True},
            gradient_accumulation_steps=4,
            optimizer={"type": "Adam"},
            fp16={"enabled": True},
            zenflow={"topk": 1},
        )
    message = str(refusal.value)
    for part in (
        "zero_optimization.stage has to be 2",
        "offload_optimizer.device has to be none",
        "gradient_accumulation_steps 4: the run file decides",
        "optimizer: the optimizer section in the run file decides",
        "fp16: model.dtype in the run file decides",
        "zero_optimization.round_robin_gradients, zenflow: not known",
    ):
        assert part in message
    with pytest.raises(UserError, match="gradient_clipping has to be auto or a number, got 'one'"):
        zero(gradient_clipping="one")
    with pytest.raises(UserError, match="offload_optimizer"):
        zero(zero_optimization={"offload_optimizer": "cpu"})
    with pytest.raises(UserError, match="zero_optimization has to be a mapping, got True"):
        Zero.read({"zero_optimization": True})


def test_what_processes_in_step_cannot_do_is_refused(tiny_folder: Path) -> None:
    processes = Processes(0, 2, zero=Zero({}, clipping=0.5))
    batch = {"trajectories": 4, "micro": 2}
    for changes, expected in (
        ({"batch": {"trajectories": 6, "micro": 2}}, "a multiple of 4, or start without DeepSpeed"),
        ({"optimizer": {"name": "adamw8bit"}, "batch": batch}, "adamw8bit cannot be had with DeepSpeed"),
        ({"model": {"path": str(tiny_folder), "channels_last": True}, "batch": batch}, "channels_last cannot be had"),
        ({"optimizer": {"grad_clip": 1.0}, "batch": batch}, "says gradient_clipping 0.5, and the run file"),
    ):
        with pytest.raises(UserError, match=expected):
            check_shares(Run.from_dict(settings(tiny_folder, **changes)), processes)
    check_shares(Run.from_dict(settings(tiny_folder, optimizer={"grad_clip": 0.5}, batch=batch)), processes)


def test_a_missing_deepspeed_and_a_wrong_stage_are_said_in_words(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path, tiny_folder)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "1")
    assert "zero_optimization.stage has to be 2" in refused("train", path, "--out", tmp_path / "run")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("tailorpo._zero.find_spec", lambda name: None)
    assert "pip install 'tailorpo[deepspeed]'" in refused("train", path, "--out", tmp_path / "run")
