"""What the commands share: errors as messages, the display, and training with all that follows it."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar, cast

import typer
from rich.console import Console

from tailorpo.errors import TailorpoError, UserError

if TYPE_CHECKING:
    from tailorpo._distributed import Processes
    from tailorpo.run import Run
    from tailorpo.rundir import RunDirectory
    from tailorpo.train import Reporter

_P = ParamSpec("_P")
_T = TypeVar("_T")

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="A run file (YAML), or the folder of a run.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to replace, e.g. optimizer.lr=3e-4.")
]
Folder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]
Device = Annotated[
    str | None, typer.Option(help="cuda, cuda:1, mps or cpu; the best there is if not given.", show_default=False)
]


def polite(command: Callable[_P, None]) -> Callable[_P, None]:
    """Turn the errors that tailorpo raises on purpose into a message and an exit code."""

    @wraps(command)
    def run_politely(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except TailorpoError as error:
            rank = int(os.environ.get("RANK") or 0)
            say(f"error in process {rank}: {error}" if rank else f"error: {error}")
            raise typer.Exit(2 if isinstance(error, UserError) else 1) from None
        except KeyboardInterrupt:
            say("stopped")
            raise typer.Exit(130) from None

    return run_politely


def told(processes: Processes, begin: Callable[[], _T]) -> _T:
    """What the main process finds on its disk, told to all."""
    with processes.together():
        found = begin() if processes.main else None
    return cast("_T", processes.broadcast(found))


@contextmanager
def at_work(run: Run, directory: RunDirectory, processes: Processes) -> Generator[Reporter]:
    """The directory kept from others, and the display, where there is one."""
    from tailorpo._distributed import unused_settings
    from tailorpo.progress import Silent

    with ExitStack() as stack:
        with processes.together():
            if processes.main:
                stack.enter_context(directory.lock())
        reporter = stack.enter_context(display(run)) if processes.main else Silent()
        unused = unused_settings()
        if unused:
            reporter.note(unused)
        yield reporter


def train_and_report(run: Run, directory: RunDirectory, processes: Processes) -> None:
    """Train to the end, evaluate, report; say how to go on if it is stopped."""
    from tailorpo.train import train as train_

    if processes.main:
        typer.echo(f"run: {directory.path}")
    try:
        with at_work(run, directory, processes) as reporter:
            model = train_(run, directory, reporter=reporter, processes=processes)
            results = evaluate_and_report(run, directory, model, reporter=reporter, processes=processes)
    except KeyboardInterrupt:
        if processes.main:
            say(f"stopped; go on with `tailorpo resume {directory.path}`")
        raise typer.Exit(130) from None
    if processes.main:
        print_results(results)
        typer.echo(f"report: {(directory.path / 'report.html').resolve()}")


def evaluate_and_report(
    run: Run, directory: RunDirectory, model: Any, *, reporter: Reporter, processes: Processes
) -> dict[str, Any]:
    from tailorpo.evaluate import evaluate
    from tailorpo.report import write_report

    results = evaluate(run, directory, model, reporter=reporter, processes=processes)
    if processes.main:
        reporter.phase("writing the report")
        write_report(directory)
    return results


def print_results(results: dict[str, Any]) -> None:
    from tailorpo.describe import result_table

    console().print(result_table(results))


@contextmanager
def display(run: Run | None) -> Generator[Reporter]:
    from tailorpo.progress import display

    with display(console(), total=run.updates if run else 0) as reporter:
        yield reporter


def console() -> Console:
    """Where results go. A pipe gets lines as long as they are, not folded at 80 characters."""
    return Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160)


def say(text: str) -> None:
    typer.echo(text, err=True)


def use_device(device: str | None) -> None:
    if device is not None:
        os.environ["TAILORPO_DEVICE"] = device


def run_file(recipe: Path) -> Path:
    return recipe / "run.yaml" if (recipe / "run.yaml").is_file() else recipe


def default_folder(recipe: Path) -> Path:
    name = recipe.name if recipe.is_dir() else recipe.stem
    stem = f"{re.sub(r'[^A-Za-z0-9._-]', '-', name)}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, number = Path("runs") / stem, 1
    while folder.exists():
        number += 1
        folder = Path("runs") / f"{stem}-{number}"
    return folder
