"""What a person sees while a run goes: what is happening, the reward so far, the time left.

On a terminal one live block; elsewhere (a log file, a pipe) one plain line per update, so that nothing but text arrives
there. Both are a `train.Reporter`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from tailorpo.sentinels.series import summary

_BARS = "".join(chr(0x2580 + eighths) for eighths in range(1, 9))


def sparkline(values: list[float], *, width: int = 40) -> str:
    """Numbers as a row of `width` bars at most, each the mean of its share of the values."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [round(index * len(values) / count) for index in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    span = high - low or 1.0
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1))] for value in means)


def duration(seconds: float) -> str:
    """7 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _number(metrics: Mapping[str, Any], name: str, pattern: str) -> str:
    value = metrics.get(name)
    return format(value, pattern) if isinstance(value, int | float) else "-"


class Silent:
    """Nothing: for a process that is not the one to speak."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing: there is nothing to close."""

    def phase(self, text: str) -> None:
        """Nothing."""

    def step(self, done: int, total: int) -> None:
        """Nothing."""

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


class Plain:
    """One line per update and per phase, for log files and pipes."""

    def __init__(self, console: Console | None = None, *, total: int = 0) -> None:
        self._console, self._total = console or Console(), total

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing: there is nothing to close."""

    def phase(self, text: str) -> None:
        """What begins now."""
        self._line(text)

    def step(self, done: int, total: int) -> None:
        """Nothing: a log file needs no bar."""

    def update(self, metrics: Mapping[str, Any]) -> None:
        """One update is done."""
        total = f"/{self._total}" if self._total else ""
        self._line(
            f"update {metrics.get('update')}{total}  reward {_number(metrics, 'reward_mean', '.3f')}  "
            f"loss {_number(metrics, 'loss', '.4f')}  accuracy {_number(metrics, 'accuracy', '.2f')}  "
            f"KL {_number(metrics, 'kl', '.3g')}  {_number(metrics, 'seconds', '.1f')} s"
        )
        if "sentinel" in metrics:
            self._line(f"sentinels: {summary(metrics['sentinel'])}")

    def note(self, text: str) -> None:
        """Something a person should know."""
        self._line(f"note: {text}")

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class Rich:
    """A live block: the phase, a bar with the time left, and the reward's course."""

    def __init__(self, console: Console, *, total: int = 0) -> None:
        self._console, self._total = console, total
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            expand=True,
        )
        self._task: TaskID = self._bar.add_task("starting", total=None, left="")
        self._rewards: list[float] = []
        self._last: Mapping[str, Any] = {}
        self._durations: list[float] = []
        self._sentinel: Mapping[str, Any] = {}
        self._phase = "starting"
        self._began = time.monotonic()
        self._done = 0
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=8, transient=False)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def phase(self, text: str) -> None:
        """What begins now; the bar starts again."""
        self._phase, self._began = text, time.monotonic()
        self._bar.reset(self._task, description=escape(text), total=None, left="")

    def step(self, done: int, total: int) -> None:
        """The part of this phase, or of this update, that is done."""
        if self._training():
            part = self._done + done / max(total, 1)
            self._bar.update(self._task, total=self._total, completed=int(part), left=self._left(part))
        else:
            spent = time.monotonic() - self._began
            left = f"{duration(spent / done * (total - done))} left" if done else ""
            self._bar.update(self._task, total=total, completed=done, left=left)

    def update(self, metrics: Mapping[str, Any]) -> None:
        """One update is done."""
        self._last = metrics
        self._sentinel = metrics.get("sentinel", self._sentinel)
        self._done = int(metrics["update"])
        if isinstance(metrics.get("reward_mean"), int | float):
            self._rewards.append(float(metrics["reward_mean"]))
        if isinstance(metrics.get("seconds"), int | float):
            self._durations.append(float(metrics["seconds"]))
        left = self._left(self._done)
        self._bar.update(self._task, total=self._total, completed=self._done, left=left)

    def note(self, text: str) -> None:
        """Something a person should know, above the block."""
        self._console.print(Text(f"note: {text}", style="yellow"))

    def _training(self) -> bool:
        return self._total > 0 and self._phase.lower().startswith("train")

    def _left(self, part: float) -> str:
        recent = self._durations[-20:]
        return f"{duration(sum(recent) / len(recent) * (self._total - part))} left" if recent else ""

    def _render(self) -> Group:
        lines: list[Any] = [self._bar]
        if self._rewards:
            first, last = self._rewards[0], self._rewards[-1]
            lines.append(
                Text.assemble(
                    ("reward ", "dim"),
                    (sparkline(self._rewards), "green"),
                    f"  {first:.3f} -> ",
                    (f"{last:.3f}", "bold"),
                )
            )
            names = (("loss", "loss", ".4f"), ("accuracy", "accuracy", ".0%"), ("KL", "kl", ".3g"))
            text = "   ".join(f"{label} {_number(self._last, name, pattern)}" for label, name, pattern in names)
            lines.append(Text(text, style="dim"))
        if self._sentinel:
            style = {"ok": "green", "warning": "yellow"}.get(self._sentinel["state"], "bold red")
            lines.append(Text(f"sentinels: {summary(self._sentinel)}", style=style))
        return Group(*lines)


def display(console: Console, *, total: int = 0) -> Rich | Plain:
    """The display that fits where the output goes. Use it as a context manager.

    Args:
        total: updates of the run.
    """
    return Rich(console, total=total) if console.is_terminal else Plain(console, total=total)
