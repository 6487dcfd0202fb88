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
    if not processes.in_step:
        return
    way = "FSDP" if processes.zero is None else "DeepSpeed"
    if batches % processes.count:
        raise UserError(
            f"with {way} every process has to make the same network calls, and {processes.count} processes cannot share"
            f" {batches} batches (batch.trajectories {trajectories} by batch.micro {micro}) equally: make"
            f" batch.trajectories a multiple of {processes.count * micro}, or start without {way}"
        )
    method, cut = run.algorithm, processes.sharding is not None
    lonely = [
        name
        for name, there in (
            ("sentinels", run.sentinels is not None),
            ("optimizer.name: adamw8bit", run.optimizer.name == "adamw8bit"),
            ("model.channels_last", not cut and run.model.channels_last),
            ("algorithm.kl_target", cut and isinstance(method, TailorPO) and method.kl_target is not None),
            ("algorithm.reference", cut and isinstance(method, TailorPO) and method.reference != "base"),
        )
        if there
    ]
    if lonely:
        raise UserError(
            f"{' and '.join(lonely)} cannot be had with {way} yet, where processes work in step on what each has a part"
            f" of; leave {'them' if len(lonely) > 1 else 'it'} out, or start without {way}"
        )
    if isinstance(run.algorithm, RewardBackprop) and run.algorithm.truncation == "random":
        raise UserError(
            f"with {way} every process has to make the same network calls, and algorithm.truncation: random makes"
            f" gradients of different depth; say fixed, or start without {way}"
        )
    named, clip = None if processes.zero is None else processes.zero.clipping, run.optimizer.grad_clip
    if named is not None and named != (clip or 0.0):
        raise UserError(
            f"accelerate's DeepSpeed configuration says gradient_clipping {named}, and the run file optimizer.grad_clip"
            f" {clip}: say auto there, or the same number"
        )
