"""Two processes do what one does: the same samples bit for bit, the same training up to the order of one sum."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import processes as many
import pytest
import torch
from processes import norm
from safetensors.torch import load_file
from tiny_run import settings, tailorpo, write_recipe
from torch import Tensor

METHODS: dict[str, dict[str, Any]] = {
    "tailorpo": {"name": "tailorpo", "train_steps": 2, "offset": "random"},
    "tailorpo-g": {"name": "tailorpo", "train_steps": 2, "guidance": {"form": "sigma", "k": 0.5}},
    "buffered": {
        "name": "tailorpo",
        "train_steps": 2,
        "update": "buffered",
        "inner_epochs": 2,
        "minibatch": 1,
        "accumulate": 3,
    },
    "d3po": {"name": "d3po", "minibatch": 1, "accumulate": 4},
    "ddpo": {"name": "ddpo", "history": 4, "history_min": 2, "minibatch": 2, "accumulate": 5},
    "ensemble": {"name": "tailorpo", "train_steps": 2},
    "kl target": {"name": "tailorpo", "train_steps": 2, "kl_target": 0.01, "kl_measured": 3},
    "moving reference": {"name": "tailorpo", "train_steps": 2, "kl_penalty": 0.1, "reference": {"ema": 0.5}},
    "spo": {"name": "spo", "first_step": 1, "threshold": 0.0, "candidates": 2, "minibatch": 1, "accumulate": 2},
}
# Three batches for two processes: unequal shares. Adam divides a gradient by its own size, so that one of rounding
# noise alone moves a parameter by lr; a large eps makes the step a smooth function of the gradient.
SHARED = {
    "updates": 2,
    "batch": {"trajectories": 6, "micro": 2},
    "optimizer": {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.0},
}


ENSEMBLE = {"reward": [{"name": "brightness"}, {"name": "colourfulness"}], "ensemble": {"rule": "mean"}}


def drawn(folder: Path, count: int) -> dict[str, Tensor]:
    parts = [load_file(folder / f"drawn-{rank}.safetensors") for rank in range(count)]
    assert sum(map(len, parts)) == len({name for part in parts for name in part})  # nobody draws what another does
    return {name: tensor for part in parts for name, tensor in part.items()}


def parameters(folder: Path, rank: int, update: int) -> dict[str, Tensor]:
    return load_file(folder / f"parameters-{rank}-{update}.safetensors")


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def flat(data: Any, name: str = "") -> dict[str, Any]:
    """Every value of nested data by its place."""
    if isinstance(data, dict):
        return {key: value for part, item in data.items() for key, value in flat(item, f"{name}.{part}").items()}
    if isinstance(data, list):
        return {key: value for at, item in enumerate(data) for key, value in flat(item, f"{name}[{at}]").items()}
    return {name: data}


# Four batches for three processes are shares of 1, 1 and 2.
@pytest.mark.parametrize(
    ("method", "several", "trajectories", "micro"),
    [*((method, 2, 6, 2) for method in METHODS), ("d3po", 3, 8, 2), ("tailorpo", 3, 8, 2)],
)
def test_several_processes_train_as_one_does(
    tiny_folder: Path, tmp_path: Path, method: str, several: int, trajectories: int, micro: int
) -> None:
    rewards, controlled = ENSEMBLE if method == "ensemble" else {}, method == "kl target"
    batch = {"trajectories": trajectories, "micro": micro}
    data = settings(tiny_folder, algorithm=METHODS[method], **{**SHARED, "batch": batch}, **rewards)
    for count in (1, several):
        folder = tmp_path / str(count)
        ended = many.run(count, folder, many.training, data, folder / "run", prepare=many.record)
        assert [each.exit_code for each in ended] == [0] * count, ended
    one, many_ = tmp_path / "1", tmp_path / str(several)

    # The first update's trajectories, the lowest numbers, are drawn by equal parameters: every bit is the same, and so
    # is every figure but the norm of the summed gradient.
    ours, theirs = drawn(one, 1), drawn(many_, several)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 2 * trajectories
    first = [name for name in ours if int(name.split()[0]) < trajectories]
    assert len(first) == trajectories
    assert all(torch.equal(ours[name], theirs[name]) for name in first)
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-4) for name in ours)

    a, b = metrics(one / "run"), metrics(many_ / "run")
    assert list(map(list, a)) == list(map(list, b))  # the same figures in the same order
    ours_first, theirs_first = flat(a[0]), flat(b[0])
    summed = {".loss", ".grad_norm"}
    assert {name for name in ours_first if ours_first[name] != theirs_first[name]} <= summed
    # Gaps that an ensemble divides by their scale, which is tiny here, show the rounding of pictures larger.
    rel = 1e-3 if method in ("ensemble", "kl target") else 1e-4
    for mine, other in zip(a, b, strict=True):
        for name, value in flat(mine).items():
            if name in summed:
                assert flat(other)[name] == pytest.approx(value, rel=1e-4 if controlled else 1e-5), name
            elif name.endswith(".accuracy"):
                # A pair whose log-ratio is within its rounding, below, counts as won or as lost: one of a step's eight,
                # two of all 32.
                assert flat(other)[name] == pytest.approx(value, abs=0.07 if name == ".accuracy" else 0.13), name
            else:
                # A log-ratio multiplies noises of norm 10 by the difference of two means over sigma, of which float32
                # knows some 3e-6, whatever is left of the sum. One process alone misses it by as much (2e-5) between
                # batches of one and of two.
                close = 5e-5 if "log_ratio" in name else 2e-5
                assert flat(other)[name] == pytest.approx(value, rel=rel, abs=close), name

    # The processes hold the same bits; and those are one process's up to rounding, compared with how far they moved.
    for update in (1, 2):
        mine, first_rank, *others = (
            parameters(*which, update) for which in ((one, 0), *((many_, rank) for rank in range(several)))
        )
        assert all(torch.equal(first_rank[name], other[name]) for name in mine for other in others)
        for kind in ("parameter/", "optimizer/exp_avg/"):
            names = [name for name in mine if name.startswith(kind)]
            moved = norm(mine[name] for name in names if ".lora_B." in name)  # which started at zero
            # A penalty's gradient goes with how far the policy has moved, so it repeats the rounding of that.
            assert norm(mine[name] - first_rank[name] for name in names) < (1e-4 if controlled else 3e-5) * moved


def test_without_the_reduction_the_processes_part_and_the_run_says_so(tiny_folder: Path, tmp_path: Path) -> None:
    """The negative control of the test above; other systems train like this without a word."""
    data = settings(tiny_folder, algorithm=METHODS["tailorpo"], **SHARED)
    ended = many.run(2, tmp_path, many.training, data, tmp_path / "run", prepare=many.without_reduction)
    mine, other = parameters(tmp_path, 0, 1), parameters(tmp_path, 1, 1)
    names = [name for name in mine if name.startswith("parameter/")]
    apart = norm(mine[name] - other[name] for name in names)
    assert apart > 0.1 * norm(mine[name] for name in names if ".lora_B." in name)
    assert [each.exit_code for each in ended] == [99, 99]
    assert "the processes hold different parameters after update 1" in ended[0].output
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_evaluation_is_shared_bit_for_bit(tiny_folder: Path, tmp_path: Path) -> None:
    data = {"prompts_seen": {"list": ["a cat", "a dog"]}, "prompts_unseen": {"list": ["a hen"]}, "seeds": 3}
    data |= {"batch_size": 2, "judge": {"name": "colourfulness"}}
    recipe = write_recipe(tmp_path, tiny_folder, updates=1, eval=data, optimizer={"lr": 0.1})
    assert tailorpo("train", recipe, "--out", tmp_path / "run").exit_code == 0
    found: list[tuple[Any, dict[str, bytes]]] = []
    for count in (1, 2):  # five batches: an odd one is left for the last round
        run = shutil.copytree(tmp_path / "run", tmp_path / f"run-{count}")
        shutil.rmtree(run / "samples")
        ended = many.run(count, tmp_path / str(count), many.command, "eval", str(run))
        assert [each.exit_code for each in ended] == [0] * count, ended
        assert "report: " in ended[0].output
        result = json.loads((run / "eval.json").read_text())
        del result["cost"]["seconds"]
        pictures = {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*.png"))}
        found.append((result, pictures))
    assert len(found[0][1]) == 2 * 9 + 1
    assert found[0] == found[1]


def test_a_whole_command_writes_once(tiny_folder: Path, tmp_path: Path) -> None:
    """Train, evaluate and report by two processes: one speaks, one writes, nothing is left over; the first update's
    gallery, half of which each process drew, has one process's bytes."""
    recipe = write_recipe(
        tmp_path, tiny_folder, updates=2, batch={"trajectories": 2, "micro": 1}, trackers=["tensorboard"]
    )
    pairs: list[dict[str, bytes]] = []
    for count in (1, 2):
        run = tmp_path / f"run-{count}"
        ended = many.run(count, tmp_path / str(count), many.command, "train", str(recipe), "--out", str(run))
        assert [each.exit_code for each in ended] == [0] * count, ended
        assert "update 2/2" in ended[0].output
        assert [each.output.strip() for each in ended[1:]] == [""] * (count - 1)
        folder = run / "samples" / "pairs" / "update-000001"
        pairs.append({path.name: path.read_bytes() for path in sorted(folder.iterdir())})
    assert pairs[0] == pairs[1]
    assert sum(name.startswith("trajectory-1") for name in pairs[1]) == 4
    one, two = (
        {str(path.relative_to(run)) for path in run.rglob("*") if "trackers" not in path.parts}
        for run in (tmp_path / "run-1", tmp_path / "run-2")
    )
    assert one == two
    assert len(list((tmp_path / "run-2").glob("trackers/**/events*"))) == len(
        list((tmp_path / "run-1").glob("trackers/**/events*"))
    )
