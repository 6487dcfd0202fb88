"""What a run keeps: checkpoints, the weights that are exported, and what its sentinels go back to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tailorpo._sharding import in_shards
from tailorpo.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_latest_checkpoint,
    remove_checkpoints,
    save_checkpoint,
)
from tailorpo.errors import ProcessError
from tailorpo.sentinels.watch import Ended
from tailorpo.trained import export

if TYPE_CHECKING:
    from tailorpo.train import Session


def save(session: Session, update: int) -> None:
    """Write a checkpoint after `update` updates, and what was trained in diffusers' format.

    Raises:
        ProcessError: the processes have not come to the same parameters.
    """
    # What is in shards there is once; the rest must be the same everywhere.
    copies = {name: each for name, each in session.learner.parameters.items() if not in_shards(each)}
    if len(set(session.processes.gather(_digest(copies)))) > 1:
        raise ProcessError(
            f"the processes hold different parameters after update {update}, so nothing was saved of it; do they"
            " run on unequal devices or versions? Go on from the last checkpoint with `tailorpo resume`"
        )
    tensors = _write(session, session.directory.checkpoints, update)
    if session.processes.main:
        export(session.policy.model, session.run, session.directory, updates=update, tensors=tensors)


def _write(session: Session, folder: Path, update: int) -> dict[str, Tensor]:
    """A checkpoint into `folder`, by the main process; returns the tensors in it there."""
    if session.gaps is not None:
        session.gaps.settle(session.processes.gather)
    state: dict[str, Any] = {
        "steps": session.learner.steps,
        "evaluations": session.processes.total(session.policy.evaluations),
        "measuring": session.processes.total(session.policy.measuring),
        "reward_queries": session.processes.total(session.score.queries),
        "memory": session.memory,
    }
    if session.scales is not None:
        session.scales.settle(session.processes.gather)
        state["gap_scales"] = session.scales.running
    if session.watch is not None:
        state["sentinels"] = session.watch.state
    tensors: dict[str, Tensor] = {}
    if session.processes.main or session.processes.in_step:
        with session.processes.computing():
            tensors = session.learner.tensors(keep=session.processes.main)
    if session.processes.main:
        tensors |= session.policy.moving.tensors() if session.policy.moving else {}
        save_checkpoint(folder, update=update, tensors=tensors, state=state)
    return tensors


def begin_watch(session: Session) -> None:
    """Let the sentinels see the base model, the first time a run gets here."""
    if session.watch is not None and session.watch.memory.base is None:
        session.reporter.phase("sentinels: the base model")
        session.watch.begin(session.reporter.step)
        _keep(session, 0)


def look(session: Session, update: int, metrics: dict[str, Any]) -> Ended | None:
    """Let the sentinels look after `update` updates, if it is time, and put what they say into the update's row;
    returns how they end the training, if they do."""
    watch = session.watch
    if watch is None or not watch.due(update):
        return None
    metrics["sentinel"] = watch.look(update, session.memory, session.reporter.step)
    _keep(session, update)
    return watch.memory.ended


def _keep(session: Session, update: int) -> None:
    """Keep what a rollback would go back to, where pruning does not reach it."""
    if session.watch is not None and session.watch.config.on_alarm == "rollback" and session.watch.is_best:
        _write(session, session.directory.best, update)


def end(session: Session, ended: Ended) -> None:
    """The last checkpoint of a training that the sentinels end, and the weights that are kept."""
    kept = ended["update"]
    if "restored" in ended:
        kept, folder = ended["restored"], session.directory.best
        with session.processes.together():
            best = load_checkpoint(folder, kept) if session.processes.main else None
        best = session.processes.broadcast(best)
        assert best is not None
        _take(session, best)
        assert session.watch is not None
        session.watch.memory.ended = ended
        if session.processes.main:
            remove_checkpoints(session.directory.checkpoints, after=kept)
    save(session, kept)


def restore(session: Session) -> int:
    """Load the latest sound checkpoint, if there is one, and return how many updates it has behind it.

    The main process reads it and tells the others, which may be on machines that do not see the file.
    """
    with session.processes.together():
        folder, note = session.directory.path / "checkpoints", session.reporter.note
        checkpoint = load_latest_checkpoint(folder, note=note) if session.processes.main else None
    checkpoint = session.processes.broadcast(checkpoint)
    if checkpoint is None:
        return 0
    _take(session, checkpoint)
    if session.processes.main:
        # A kill between a checkpoint and its export leaves the export of the checkpoint before.
        export(
            session.policy.model, session.run, session.directory, updates=checkpoint.update, tensors=checkpoint.tensors
        )
    return checkpoint.update


def _take(session: Session, checkpoint: Checkpoint) -> None:
    """Go on from what a checkpoint holds."""
    session.learner.load_tensors(checkpoint.tensors, steps=int(checkpoint.state["steps"]))
    session.memory.clear()  # and not another dictionary: `gaps` lives in this one
    session.memory.update(checkpoint.state["memory"])
    if session.policy.moving:
        session.policy.moving.load_tensors(checkpoint.tensors)
    if session.scales is not None:
        session.scales.running = dict(checkpoint.state["gap_scales"])
    if session.watch is not None and "sentinels" in checkpoint.state:
        session.watch.state = checkpoint.state["sentinels"]
    # What was counted so far goes on one account; sums over the processes stay right.
    session.policy.evaluations = int(checkpoint.state["evaluations"]) if session.processes.main else 0
    session.policy.measuring = int(checkpoint.state["measuring"]) if session.processes.main else 0
    session.score.queries = int(checkpoint.state["reward_queries"]) if session.processes.main else 0


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode() + tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
