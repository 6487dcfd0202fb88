"""Runs the cells of a grid in processes of their own, and gathers what they leave.

A cell is a process `tailorpo experiment NAME --cell ID` with one thread, so that its crash is a message and the others
go on, and so that as many run side by side as there are cores for. What is finished is skipped: cells whose result,
under the same settings, stands in the results file or in their folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tailorpo._distributed import pick_device
from tailorpo.environment import environment
from tailorpo.errors import UserError
from tailorpo.experiments.cell import RESULT
from tailorpo.experiments.grid import Plan
from tailorpo.files import atomic_write
from tailorpo.rundir import METRICS

RATE = 200.0
"""Guided network evaluations of the bundled miniature per second on one free core; only for estimates."""
LOG = "log.txt"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


class Watcher(Protocol):
    """Hears how the cells go; the progress display is one."""

    def started(self, plan: Plan) -> None:
        """A cell's process has begun."""
        ...

    def progress(self, plan: Plan, updates: int) -> None:
        """A running cell has made so many updates."""
        ...

    def finished(self, plan: Plan, failure: str | None) -> None:
        """A cell has ended; `failure` says how, if it left no result."""
        ...


@dataclass(frozen=True)
class Places:
    """Where an experiment's files are.

    Attributes:
        results: the folder of NAME.json, NAME.md and NAME.webp.
        work: the folder of the cells' runs.
    """

    results: Path
    work: Path

    def json(self, name: str) -> Path:
        """The results of an experiment."""
        return self.results / f"{name}.json"


def read_results(path: Path) -> dict[str, Any]:
    """The content of a results file, or an empty one.

    Raises:
        UserError: it is not JSON.
    """
    if not path.is_file():
        return {"cells": []}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON; restore it or delete it to measure again") from error


def finished_cells(plans: Sequence[Plan], places: Places, name: str) -> dict[str, dict[str, Any]]:
    """Results by cell that stand and are up to date, from the results files and from the cells' folders.

    A cell that another experiment has measured under the same settings is taken from there, and says so (`from`).
    """
    known = _by_digest(places, name)
    found: dict[str, dict[str, Any]] = {}
    for plan in plans:
        path = places.work / name / plan.cell.id / RESULT
        own = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if own is not None and own["digest"] == plan.digest:
            found[plan.cell.id] = own
        elif plan.digest in known:
            found[plan.cell.id] = {**known[plan.digest], "id": plan.cell.id, "variant": plan.cell.variant.name}
    return found


def _by_digest(places: Places, name: str) -> dict[str, dict[str, Any]]:
    """Every committed cell; an experiment's own go before those of the others."""
    own = {cell["digest"]: cell for cell in read_results(places.json(name))["cells"]}
    others: dict[str, dict[str, Any]] = {}
    for path in sorted(places.results.glob("*.json")):
        if path != places.json(name):
            cells = read_results(path).get("cells", ())
            others |= {cell["digest"]: {**cell, "from": path.stem} for cell in cells if "from" not in cell}
    return {**others, **own}


def write_results(
    plans: Sequence[Plan], places: Places, name: str, *, head: dict[str, Any], keep: bool
) -> dict[str, Any]:
    """Gather every finished cell into the results file, one line each, and return its content. What they were computed
    on stays as it was where none is new.

    Args:
        head: what stands before the cells.
        keep: keep committed cells that are not among the plans or out of date (only a part of the grid was asked for).
    """
    finished, old = finished_cells(plans, places, name), read_results(places.json(name))
    cells = [finished[plan.cell.id] for plan in plans if plan.cell.id in finished]
    measured_here = [cell for cell in cells if cell not in old["cells"]]
    where = environment(pick_device()) if measured_here or "environment" not in old else old["environment"]
    if keep:
        planned = {plan.cell.id for plan in plans}
        cells += [cell for cell in old["cells"] if cell["id"] not in planned]
    content = {"experiment": name, **head, "environment": where, "cells": cells}
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items() if key != "cells"]
    rows = ",\n".join(f"  {json.dumps(cell)}" for cell in cells)
    places.results.mkdir(parents=True, exist_ok=True)
    atomic_write(places.json(name), "{\n" + ",\n".join(lines) + f',\n "cells": [\n{rows}\n ]\n}}\n')
    return content


@dataclass
class _Running:
    plan: Plan
    process: subprocess.Popen[bytes]
    folder: Path
    begun: float = field(default_factory=time.monotonic)

    def updates(self) -> int:
        """How many updates it has made, by the lines of its metrics."""
        path = self.folder / METRICS
        return path.read_bytes().count(b"\n") if path.is_file() else 0


def cell_command(name: str, arguments: Sequence[str]) -> Callable[[Plan], list[str]]:
    """How a cell is started: this very command, for one cell."""
    return lambda plan: [sys.executable, "-m", "tailorpo", "experiment", name, *arguments, "--cell", plan.cell.id]


def run_cells(
    plans: Sequence[Plan],
    *,
    folder: Path,
    command: Callable[[Plan], list[str]],
    jobs: int,
    watcher: Watcher,
    done: Callable[[Plan], None],
    poll: float = 0.5,
) -> dict[str, str]:
    """Run the cells, `jobs` at a time and in their order, and return what went wrong, by cell.

    Args:
        folder: of the experiment's cells.
        command: the command line of a cell.
        done: called after each cell that left a result.
        poll: seconds between looks at the processes.

    An interruption stops the running cells too; they go on from their checkpoints the next time.
    """
    waiting, running, failures = list(plans), list[_Running](), dict[str, str]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(waiting.pop(0), folder, command))
                watcher.started(running[-1].plan)
            time.sleep(poll)
            for each in list(running):
                watcher.progress(each.plan, each.updates())
                if each.process.poll() is None:
                    continue
                running.remove(each)
                failure = _failure(each)
                if failure:
                    failures[each.plan.cell.id] = failure
                else:
                    done(each.plan)
                watcher.finished(each.plan, failure)
    finally:
        for each in running:
            each.process.terminate()
        for each in running:
            each.process.wait()
    return failures


def _start(plan: Plan, folder: Path, command: Callable[[Plan], list[str]]) -> _Running:
    place = folder / plan.cell.id
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    # The log lies beside the run: a run begun anew deletes its folder.
    with (logs / f"{plan.cell.id}.{LOG}").open("wb") as log:
        process = subprocess.Popen(
            command(plan), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **ONE_THREAD}
        )
    return _Running(plan, process, place)


def _failure(each: _Running) -> str | None:
    """How a process that has ended failed, or None if its result is there and its own."""
    path = each.folder / RESULT
    code = each.process.returncode
    if code == 0 and path.is_file() and json.loads(path.read_text(encoding="utf-8"))["digest"] == each.plan.digest:
        return None
    log = each.folder.parent / "logs" / f"{each.plan.cell.id}.{LOG}"
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{how}; {log} ends with: {' | '.join(lines[-3:]) or 'nothing'}"


def estimated_minutes(plans: Sequence[Plan], results: dict[str, Any]) -> float:
    """Minutes on one free core: at the rate of the results there are, else at the bundled miniature's."""
    measured = {cell["id"]: cell["minutes"] for cell in results["cells"] if "minutes" in cell}
    known = [(plan.work, measured[plan.cell.id]) for plan in plans if plan.cell.id in measured]
    rate = sum(work for work, _ in known) / sum(minutes for _, minutes in known) if known else 60 * RATE
    return sum(plan.work for plan in plans) / rate
