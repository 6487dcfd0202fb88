"""The processes of a run and the device each computes on; the only place that imports accelerate.

The micro-batches of an update are shared among the processes, in order; before every optimizer step the gradients are
added up in float32:

    g = sum over processes of sum over their micro-batches of d loss / d parameters

The loss of a micro-batch is divided by the size of the whole batch already, so a sum is all there is to do, and N
processes take the step that one would take, up to the order of that sum. Trajectories, noise and prompts are addressed
by number, so what is drawn does not depend on who draws it.

The network is not wrapped: the reduction is one visible call (docs/decisions/0007-gradients-are-reduced-explicitly.md).
Where accelerate is configured with FSDP2 the network is cut into shards besides (`_sharding`), and what is trained in
shards has its gradients added up by torch. Where it is configured with DeepSpeed's ZeRO-2 the optimizer is divided
(`_zero`; docs/decisions/0008-fsdp2-shards-the-network.md). Left out, and refused: Megatron, which takes over the model.

Between the processes of one run objects travel as pickles, as accelerate sends them; nothing from outside does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from tailorpo.errors import ProcessError, TailorpoError, UserError

if TYPE_CHECKING:
    from tailorpo._sharding import Sharding
    from tailorpo._zero import Zero

DEVICE, TIMEOUT = "TAILORPO_DEVICE", "TAILORPO_TIMEOUT"
DEFAULT_TIMEOUT = 600
"""Seconds that a process waits for the others before it gives up; the environment variable changes it."""

BUFFER = 1 << 26
"""Most numbers that are added up at once: 256 MB, so that a whole network's gradients need little room on top."""

S = TypeVar("S", bound=Sequence[Any])
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes that work on a run, seen from one of them. Alone, every method returns what it was given.

    Every method but `share` has to be called by all processes, in the same order.
    """

    rank: int = 0
    count: int = 1
    sharding: Sharding | None = None
    """How networks are cut into shards; None where every process holds them whole."""
    zero: Zero | None = None
    """How the optimizer's state is divided; None where every process holds all of it."""

    @property
    def in_step(self) -> bool:
        """Whether all processes have to make the same backwards, because these add up gradients among them."""
        return self.sharding is not None or self.zero is not None

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, items: S) -> S:
        """The part of a sequence that is this process's: all parts in order of rank are the whole, their lengths
        differ by one at most."""
        return cast(S, items[self.rank * len(items) // self.count : (self.rank + 1) * len(items) // self.count])

    def gather(self, value: T) -> list[T]:
        """Every process's value, in order of rank. Tensors in it have to be on the CPU.

        Raises:
            ProcessError: another process is gone.
        """
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        with _connection():
            return cast(list[T], gather_object([value]))

    def total(self, value: int) -> int:
        """The sum of every process's number."""
        return sum(self.gather(value))

    def broadcast(self, value: T) -> T:
        """The main process's value, whatever the others pass.

        Raises:
            ProcessError: another process is gone.
        """
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list  # pyright: ignore[reportUnknownVariableType]

        values = [value]
        with _connection():
            broadcast_object_list(values)
        return values[0]

    def shard(self, networks: Sequence[nn.Module]) -> str | None:
        """Cut networks into shards, in place, if that is what accelerate is configured for, and say so.

        Raises:
            UserError: they cannot be.
        """
        if self.sharding is None:
            return None
        from tailorpo._sharding import held_bytes

        before = sum(map(held_bytes, networks))
        self.sharding.shard(networks, self.count)
        held = sum(map(held_bytes, networks))
        return f"in shards: each process holds {held / 2**20:,.1f} of the denoising network's {before / 2**20:,.1f} MiB"

    @contextmanager
    def computing(self) -> Generator[None]:
        """Around network calls: where they exchange something, the end of another process shows there first.

        Raises:
            ProcessError: another process is gone.
        """
        try:
            yield
        except RuntimeError as error:
            # gloo's errors have no class of their own.
            of_others = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
            if not self.in_step or not of_others:
                raise
            raise _gone(error) from error

    def reduce_gradients(self, parameters: Sequence[nn.Parameter], loss: float) -> float:
        """Replace every gradient by its sum over the processes, and return that of the loss.

        Parameters in shards are left alone, and those of a divided optimizer have no gradient here: the backward has
        added it up. For the others float32 buffers
        make the way, an adapter's gradients in one. Ahead of them go the loss and how many processes have a gradient of
        each parameter; where none has, it stays None and the optimizer leaves the parameter alone.

        Raises:
            ProcessError: another process is gone.
        """
        return loss if self.count == 1 else _add_up(parameters, loss)

    @contextmanager
    def together(self) -> Generator[None]:
        """Go on if all processes have done what is in the block, which must not communicate; otherwise the main process
        raises the first one's error and the others end quietly, so that people read one message and not N."""
        mistake: TailorpoError | None = None
        try:
            yield
        except TailorpoError as error:
            if self.count == 1:
                raise
            mistake = error
        told = self.gather(None if mistake is None else (isinstance(mistake, UserError), str(mistake)))
        failed = [(rank, each) for rank, each in enumerate(told) if each is not None]
        if not failed:
            return
        if not self.main:
            raise SystemExit(0)
        if mistake is not None:
            raise mistake
        rank, (by_user, text) = failed[0]
        raise (UserError if by_user else TailorpoError)(f"{process_name(rank, self.count)}: {text}")


ALONE = Processes()


@contextmanager
def open_processes() -> Generator[Processes]:
    """The processes that `accelerate launch` or `torchrun` has started, connected; without a launcher this one alone.

    Raises:
        UserError: accelerate is configured for something that is not supported, or the processes cannot be connected.
    """
    for name in ("MEGATRON_LM", "PARALLELISM_CONFIG"):
        if _flag(f"ACCELERATE_USE_{name}"):
            raise UserError(
                f"accelerate is configured with {name}, which tailorpo does not support. Choose in `accelerate config`"
                " multi-GPU, where every process holds all, FSDP version 2, where it holds a part of the model, of the"
                " gradients and of the optimizer's state, or DeepSpeed's ZeRO stage 2, a part of the last two"
            )
    if _flag("ACCELERATE_USE_DEEPSPEED") and _flag("ACCELERATE_USE_FSDP"):
        raise UserError("accelerate is configured with DeepSpeed and with FSDP; choose one of them")
    zero = _zero() if _flag("ACCELERATE_USE_DEEPSPEED") else None
    sharding = _sharding() if _flag("ACCELERATE_USE_FSDP") else None
    if launched() == 1:
        yield ALONE
        return
    if zero is not None and (missing := zero.missing()):
        raise UserError(missing)
    from accelerate import PartialState

    try:
        seconds = float(os.environ.get(TIMEOUT) or DEFAULT_TIMEOUT)
        state: Any = PartialState(cpu=pick_device().type == "cpu", timeout=timedelta(seconds=seconds))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the {launched()} processes cannot be connected: {error}") from error
    yield Processes(int(state.process_index), int(state.num_processes), sharding, zero)
    # Not after an error: others may wait for this process, and learn from its end that it will not come.
    state.destroy_process_group()


def launched() -> int:
    """How many processes a launcher has started for this run, as it says in the environment."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def process_name(rank: int | None = None, count: int | None = None) -> str:
    """How messages call a process, this one if no other is named; nothing where there is only one."""
    rank, count = int(os.environ.get("RANK") or 0) if rank is None else rank, count or launched()
    return f"process {rank} of {count}" if count > 1 else ""


def unused_settings() -> str | None:
    """What accelerate was configured with and tailorpo decides otherwise, in words."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision in ("", "no"):
        return None
    return f"accelerate's mixed_precision {precision} has no effect; model.dtype in the run file decides"


def pick_device() -> torch.device:
    """The device named by the environment variable TAILORPO_DEVICE, otherwise the best there is: cuda, mps, cpu. Of
    several processes on a machine each takes the CUDA device of its own number.

    Raises:
        UserError: the named one does not exist here.
    """
    name = os.environ.get(DEVICE) or ("cpu" if _flag("ACCELERATE_USE_CPU") else _best())
    device = find_device(name)
    if launched() == 1 or device.type == "cpu":
        return device
    if device.type != "cuda" or ":" in name:
        raise UserError(f"device {name!r} cannot be shared by {launched()} processes; use cuda or cpu")
    return find_device(f"cuda:{os.environ.get('LOCAL_RANK') or 0}")


def find_device(name: str) -> torch.device:
    """The device of the given name, for this process alone or shared.

    Raises:
        UserError: it does not exist here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is not one that torch knows; use cuda, cuda:1, mps or cpu") from error
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(device.type, False):
        raise UserError(f"device {name!r} is not available here; use {_best()}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r}: there are only {torch.cuda.device_count()} CUDA devices, counted from 0")
    return device


def _best() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def _flag(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def _sum(value: Tensor) -> Tensor:
    from accelerate.utils import reduce  # pyright: ignore[reportUnknownVariableType]

    with _connection():
        return cast(Tensor, reduce(value, reduction="sum"))


def _add_up(parameters: Sequence[nn.Parameter], loss: float) -> float:
    """See `Processes.reduce_gradients`."""
    from tailorpo._sharding import in_shards

    device = parameters[0].device
    parameters = [parameter for parameter in parameters if not in_shards(parameter)]
    present = torch.tensor([loss, *(float(p.grad is not None) for p in parameters)], device=device)
    total, *holders = cast(list[float], _sum(present).tolist())
    held = [parameter for parameter, count in zip(parameters, holders, strict=True) if count]
    for group in _groups(held):
        flat = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in group]
        sums = cast(tuple[Tensor, ...], _sum(torch.cat(flat)).split([p.numel() for p in group]))
        for parameter, gradient in zip(group, sums, strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
    return total


def _groups(parameters: Sequence[nn.Parameter]) -> Generator[list[nn.Parameter]]:
    """Parameters in order, as many at a time as fit into one buffer, and at least one."""
    group: list[nn.Parameter] = []
    for parameter in parameters:
        if group and sum(p.numel() for p in group) + parameter.numel() > BUFFER:
            yield group
            group = []
        group.append(parameter)
    if group:
        yield group


@contextmanager
def _connection() -> Generator[None]:
    """Turn what the backends raise when another process is gone into words."""
    try:
        yield
    except RuntimeError as error:
        raise _gone(error) from error


def _gone(error: RuntimeError) -> ProcessError:
    return ProcessError(
        "another process of this run has failed, was stopped or did not answer in time; its own message, if it"
        " left one, says why. What was saved is kept: go on with `tailorpo resume`"
        f" ({str(error).splitlines()[0][:200]})"
    )


def _sharding() -> Sharding:
    """What accelerate's configuration says of FSDP.

    Raises:
        UserError: it asks for something that tailorpo does not do.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import (
        fsdp2_prepare_auto_wrap_policy,  # pyright: ignore[reportUnknownVariableType]
    )
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    from tailorpo._sharding import Sharding

    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            "accelerate is configured with FSDP 1, and tailorpo supports version 2: set fsdp_version: 2 in accelerate's"
            " configuration, or launch with `--use_fsdp --fsdp_version 2`"
        )
    for setting, instead in (
        ("OFFLOAD_PARAMS", "which has not been tried here"),
        ("ACTIVATION_CHECKPOINTING", "which model.gradient_checkpointing in the run file does"),
    ):
        if _flag(f"FSDP_{setting}"):
            raise UserError(f"accelerate's fsdp_{setting.lower()} is on, {instead}; turn it off")
    plugin: Any = FullyShardedDataParallelPlugin()
    if plugin.auto_wrap_policy is None:
        plugin.auto_wrap_policy = transformer_auto_wrap_policy  # by the blocks that the network itself names

    def blocks(network: nn.Module) -> Callable[[nn.Module], bool]:
        try:
            policy = fsdp2_prepare_auto_wrap_policy(plugin, network)
        except ValueError as error:
            raise UserError(f"accelerate's fsdp_transformer_layer_cls_to_wrap: {error}") from error
        return policy or (lambda module: False)

    return Sharding(blocks, bool(plugin.reshard_after_forward))


def _zero() -> Zero:
    """What accelerate's configuration says of DeepSpeed; raises a UserError where tailorpo does not do that."""
    from accelerate.utils import DeepSpeedPlugin

    from tailorpo._zero import Zero

    try:
        plugin: Any = DeepSpeedPlugin()
    except (OSError, ValueError) as error:
        raise UserError(f"accelerate's DeepSpeed configuration cannot be read: {error}") from error
    return Zero.read(plugin.deepspeed_config)


class AccelerateTrackers:
    """accelerate's trackers (TensorBoard, W&B, ...) behind two calls."""

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> None:
        from accelerate import Accelerator

        self._accelerator = Accelerator(log_with=list(names), project_dir=folder, cpu=pick_device().type == "cpu")
        self._accelerator.init_trackers("tailorpo", config=dict(config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers of one update."""
        self._accelerator.log(dict(values), step=step)

    def close(self) -> None:
        """Wait until everything is sent."""
        # Not end_training: it would cut the connection between the processes, which go on to evaluate.
        for tracker in cast(list[Any], self._accelerator.trackers):
            tracker.finish()
