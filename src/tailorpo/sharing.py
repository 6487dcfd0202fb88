"""What several processes cannot share, in words."""

from __future__ import annotations

from tailorpo._distributed import Processes
from tailorpo.algorithms.reward_backprop import RewardBackprop
from tailorpo.algorithms.tailorpo import TailorPO
from tailorpo.errors import UserError
from tailorpo.run import Run


def check_shares(run: Run, processes: Processes) -> None:
    """Refuse a run that the processes cannot share.

    Raises:
        UserError: says how many there are, and what to change.
    """
    trajectories, micro, batches = run.batch.trajectories, run.batch.micro, run.batch.batches
    if batches < processes.count:
        raise UserError(
            f"{processes.count} processes share the batches of an update, and there are {batches}: batch.trajectories"
            f" {trajectories} by batch.micro {micro}. Start fewer processes, take more trajectories, or a smaller"
            f" batch.micro (at most {max(trajectories // processes.count, 1)})"
        )
    if processes.sharding is None:
        return
    if batches % processes.count:
        raise UserError(
            f"with FSDP every process has to make the same network calls, and {processes.count} processes cannot share"
            f" {batches} batches (batch.trajectories {trajectories} by batch.micro {micro}) equally: make"
            f" batch.trajectories a multiple of {processes.count * micro}, or start without FSDP"
        )
    method = run.algorithm
    lonely = [
        name
        for name, there in (
            ("sentinels", run.sentinels is not None),
            ("optimizer.name: adamw8bit", run.optimizer.name == "adamw8bit"),
            ("algorithm.kl_target", isinstance(method, TailorPO) and method.kl_target is not None),
            ("algorithm.reference", isinstance(method, TailorPO) and method.reference != "base"),
        )
        if there
    ]
    if lonely:
        raise UserError(
            f"with FSDP every process has to make the same network calls on parameters in shards, which"
            f" {' and '.join(lonely)} cannot yet; leave {'them' if len(lonely) > 1 else 'it'} out, or start without"
            " FSDP"
        )
    if isinstance(run.algorithm, RewardBackprop) and run.algorithm.truncation == "random":
        raise UserError(
            "with FSDP every process has to make the same network calls, and algorithm.truncation: random makes"
            " gradients of different depth; say fixed, or start without FSDP"
        )
