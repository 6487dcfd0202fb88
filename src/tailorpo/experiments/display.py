"""What a person sees while cells run: how many are done, what each running one is at, the time left.

On a terminal one live block, elsewhere a line when a cell begins and ends.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tailorpo.experiments.grid import Plan
from tailorpo.progress import duration


class CellDisplay:
    """A `runner.Watcher`; use it as a context manager.

    Args:
        console: where to print.
        waiting: the cells that will run.
        finished: how many are finished already.
    """

    def __init__(self, console: Console, waiting: list[Plan], *, finished: int) -> None:
        self._console = console
        self._begun = time.monotonic()
        self._work = sum(plan.work for plan in waiting)
        self._worked = 0.0
        self._parts: dict[str, float] = {}
        self._total, self._ended = finished + len(waiting), finished
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._all = self._bar.add_task("cells", total=self._total, completed=finished, left="")
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def started(self, plan: Plan) -> None:
        """A cell's process has begun."""
        self._tasks[plan.cell.id] = self._bar.add_task(f"  {plan.cell.id}", total=plan.run.updates, left="")
        self._line(f"begun: {plan.cell.id}")

    def progress(self, plan: Plan, updates: int) -> None:
        """A running cell has made so many updates."""
        self._bar.update(self._tasks[plan.cell.id], completed=updates)
        self._parts[plan.cell.id] = plan.work * updates / plan.run.updates
        self._bar.update(self._all, left=self._left())

    def finished(self, plan: Plan, failure: str | None) -> None:
        """A cell has ended."""
        self._bar.remove_task(self._tasks.pop(plan.cell.id))
        self._parts.pop(plan.cell.id, None)
        self._worked += plan.work
        self._ended += 1
        self._bar.update(self._all, completed=self._ended, left=self._left())
        if failure:
            self._console.print(f"failed: {plan.cell.id}: {failure}", markup=False, highlight=False, soft_wrap=True)
        else:
            self._line(f"done: {plan.cell.id}  ({self._ended} of {self._total})  {self._left()}")

    def _line(self, text: str) -> None:
        if not self._console.is_terminal:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _left(self) -> str:
        worked = self._worked + sum(self._parts.values())
        if not worked:
            return ""
        spent = time.monotonic() - self._begun
        return f"{duration(spent * (self._work - worked) / worked)} left"
