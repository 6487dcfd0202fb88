"""Several processes of one run, forked with everything imported and connected by gloo, as a launcher would start them.

What a test records or breaks in them is named by a function of this module that is called in every process first.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import tailorpo
from torch import Tensor
from torch.distributed.tensor import DTensor

from tailorpo import _distributed, _zero
from tailorpo import train as loop
from tailorpo._distributed import Processes, open_processes
from tailorpo.errors import DivergedError
from tailorpo.optimizer import Learner
from tailorpo.progress import Silent
from tailorpo.run import Run
from tailorpo.rundir import RunDirectory
from tailorpo.train import Session, train

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "DS_ACCELERATOR": "cpu"}
"""What `accelerate launch` sets for ZeRO stage 2."""
needs_deepspeed = pytest.mark.skipif(
    _zero.Zero({}).missing() is not None, reason="deepspeed is not installed (tailorpo[deepspeed])"
)


@dataclass(frozen=True)
class Ended:
    """How one process ended, and what it printed."""

    exit_code: int
    output: str


@cache
def context() -> Any:
    context = multiprocessing.get_context("forkserver")
    names = ("cli", "train", "evaluate", "report", "models.sd")
    context.set_forkserver_preload([*(f"tailorpo.{name}" for name in names), "accelerate", "peft", "safetensors.torch"])
    warm = context.Process(target=int)
    warm.start()
    warm.join()
    return context


def start(
    count: int,
    folder: Path,
    work: Callable[..., int],
    *arguments: Any,
    prepare: Callable[[], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """Start `count` processes that do `work(*arguments)` and print into the folder."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    started = []
    for rank in range(count):
        named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        named |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TAILORPO_DEVICE": "cpu", "RECORDS": folder}
        named["CUDA_VISIBLE_DEVICES"] = ""  # libraries look for a GPU, and the process was forked
        variables = {name: str(value) for name, value in named.items()} | dict(environment or {})
        process = context().Process(target=_run, args=(work, arguments, prepare, variables, folder / f"{rank}.txt"))
        process.start()
        started.append(process)
    return started


def end(started: list[Any], folder: Path, *, within: float = 120) -> list[Ended]:
    """Wait for the processes; one that is still there is killed, and that is a failure."""
    for process in started:
        process.join(within)
    hanging = [process for process in started if process.is_alive()]
    for process in hanging:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert not hanging, f"{len(hanging)} of {len(started)} processes hang"
    outputs = [folder / f"{rank}.txt" for rank in range(len(started))]
    return [
        Ended(process.exitcode, path.read_text() if path.exists() else "")
        for process, path in zip(started, outputs, strict=True)
    ]


def run(count: int, folder: Path, work: Callable[..., int], *arguments: Any, **options: Any) -> list[Ended]:
    """Start the processes and wait for them."""
    return end(start(count, folder, work, *arguments, **options), folder)


def _run(
    work: Callable[..., int],
    arguments: tuple[Any, ...],
    prepare: Callable[[], None] | None,
    variables: dict[str, str],
    output: Path,
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", **variables}
    sys.stdout = sys.stderr = output.open("w", buffering=1)
    try:
        if prepare:
            prepare()
        code = work(*arguments)
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    os._exit(code)


# What the processes do.


def command(*arguments: str) -> int:
    """A command of the command line."""
    result = tailorpo(*arguments)
    sys.stdout.write(result.output)
    return result.exit_code


def training(data: dict[str, Any], path: Path) -> int:
    """The training of a run alone, without an evaluation."""
    settings = Run.from_dict(data)
    with open_processes() as processes:
        directory = RunDirectory.create(path, settings) if processes.main else RunDirectory(path)
        train(settings, directory, reporter=Silent(), processes=processes)
    return 0


def going_on(run: Run, path: Path) -> int:
    """The rest of a training, with one process or many."""
    without_compiler()
    with open_processes() as processes:
        train(run, RunDirectory(path), reporter=Silent(), processes=processes)
    return 0


def diverging(data: dict[str, Any], path: Path) -> int:
    """A step of a divided optimizer with a loss of 0 whose gradient is too large in process 1 alone."""
    without_compiler()
    run = Run.from_dict(data)
    with open_processes() as processes:
        model = run.model.load(torch.device("cpu"), seed=0)
        learner = Learner(model.trainable(), run.optimizer, processes)
        before = learner.tensors()
        total = torch.stack([each.sum() for each in learner.parameters.values()]).sum()
        learner.backward((total - total.detach()) * (3e38 if processes.rank else 1.0))
        try:
            learner.step()
        except DivergedError as error:
            after = learner.tensors()
            same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
            said = str(error).removeprefix("training has diverged: ")
            sys.stdout.write(f"{'left as they were' if same else 'moved'}: {said}\n")
    return 0


# What they left, read by the tests.


def checkpoint(run: Path, update: int) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"update-{update:06d}" / "tensors.safetensors")


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


# What is recorded or broken in them.


def record() -> None:
    """Write what every process draws, and the parameters it comes to, into the folder $RECORDS."""
    _distributed.BUFFER = 1000  # more than one buffer for the tiny model's adapter
    folder, rank = Path(os.environ["RECORDS"]), os.environ["RANK"]
    final_reward, save = Session.final_reward, loop.save
    drawn: dict[str, Tensor] = {}

    def drawing(session: Session, trajectories: Any) -> Tensor:
        for key, prompt, latents in zip(trajectories.keys, trajectories.prompts, trajectories.latents, strict=True):
            drawn[f"{key[1]} {prompt}"] = latents.clone()
        save_file(drawn, folder / f"drawn-{rank}.safetensors")
        return final_reward(session, trajectories)

    def saving(session: Session, update: int) -> None:
        save_file(session.learner.tensors(), folder / f"parameters-{rank}-{update}.safetensors")
        save(session, update)

    Session.final_reward, loop.save = drawing, saving


def record_shards() -> None:
    """The same of networks in shards: at every checkpoint, how many bytes this process holds of how many."""
    folder, rank, save = Path(os.environ["RECORDS"]), os.environ["RANK"], loop.save

    def saving(session: Session, update: int) -> None:
        networks = session.policy.model.networks()
        held = [p.to_local() if isinstance(p, DTensor) else p for net in networks for p in net.parameters()]
        sizes = (
            sum(p.untyped_storage().nbytes() for p in held),
            sum(p.nbytes for n in networks for p in n.parameters()),
        )
        (folder / f"bytes-{rank}-{update}.txt").write_text(" ".join(map(str, sizes)))
        save(session, update)

    loop.save = saving


def without_compiler() -> None:
    """Where deepspeed is used, it does not compile the exchange within one machine's memory, which takes a minute; it
    exchanges by gloo."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") and os.environ["WORLD_SIZE"] != "1":
        deepspeed: Any = import_module("deepspeed")
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def record_state() -> None:
    """At every checkpoint, how many numbers of the optimizer's moments this process holds."""
    without_compiler()
    _zero.BUCKET = 1 << 14  # more than one exchange for a whole tiny network, and parameters that fill more than one
    folder, rank, save = Path(os.environ["RECORDS"]), os.environ["RANK"], loop.save

    def saving(session: Session, update: int) -> None:
        states = session.learner._adamw.state.values()
        held = sum(
            each.untyped_storage().nbytes() // 4 for state in states for each in state.values() if each.numel() > 1
        )
        (folder / f"state-{rank}.txt").write_text(str(held))
        save(session, update)

    loop.save = saving


def without_sums() -> None:
    """deepspeed keeps each process's own gradient, as if it forgot to add up."""
    without_compiler()
    stage: Any = import_module("deepspeed.runtime.zero.stage_1_and_2")
    stage.DeepSpeedZeroOptimizer.average_tensor = lambda self, tensor, dtype: None


def without_reduction() -> None:
    """Every process steps with its own gradient, as in code that forgets to synchronise."""
    record()
    Processes.reduce_gradients = lambda self, parameters, loss: loss


# Rewards that end in the process and at the call that $STRIKE names: "kill 1 3" is the third call in process 1.

_calls = 0


def striking(images: Tensor, prompts: Any) -> Tensor:
    global _calls
    _calls += 1
    kind, rank, call = os.environ["STRIKE"].split()
    if (os.environ["RANK"], str(_calls)) == (rank, call):
        if kind == "raise":
            raise RuntimeError("the reward server is out")
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[kind])
    return images.mean((1, 2, 3))


class Striking:
    """The same, for guidance."""

    differentiable = True

    def __call__(self, images: Tensor, prompts: Any) -> Tensor:
        return striking(images, prompts)


def missing_in_process_1() -> Any:
    if os.environ["RANK"] == "1":
        raise FileNotFoundError("weights.safetensors")
    return Striking()
