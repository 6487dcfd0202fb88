"""Commands that train, measure and report a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tailorpo.cli.support import (
    Device,
    Folder,
    Overrides,
    Recipe,
    at_work,
    default_folder,
    evaluate_and_report,
    print_results,
    run_file,
    told,
    train_and_report,
    use_device,
)
from tailorpo.errors import UserError

if TYPE_CHECKING:
    from tailorpo.run import Run
    from tailorpo.rundir import RunDirectory


def train(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The run's folder, if not runs/<recipe>-<date>-<time>.", show_default=False),
    ] = None,
    device: Device = None,
) -> None:
    """Train, evaluate and write the report.

    \b
    Examples:
      tailorpo train recipes/emoji_tailorpo_g.yaml
      tailorpo train recipes/emoji_tailorpo_g.yaml updates=20 seed=1 --out runs/short
      tailorpo train recipes/emoji_tailorpo.yaml reward.name=colourfulness algorithm.guidance=null

    Stopped or killed, a run goes on with `tailorpo resume RUN` and ends with the same bits. Several processes share a
    run when `accelerate launch -m tailorpo train ...` or torchrun starts them (docs/scaling.md).
    """
    from tailorpo._distributed import open_processes
    from tailorpo.run import Run
    from tailorpo.rundir import RunDirectory

    def begin() -> tuple[Run, RunDirectory]:
        run = Run.load(run_file(recipe), overrides or ())
        return run, RunDirectory.create(out or default_folder(recipe), run)

    use_device(device)
    with open_processes() as processes:
        run, directory = told(processes, begin)
        try:
            train_and_report(run, directory, processes)
        except UserError:
            # It could not even begin: the mistake is mended and the same command typed again.
            if processes.main and not directory.metrics():
                shutil.rmtree(directory.path)
            raise


def resume(
    folder: Folder,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="updates, checkpoint_every, eval or trackers.")
    ] = None,
    device: Device = None,
) -> None:
    """Go on with a stopped run, or extend one.

    \b
    Examples:
      tailorpo resume runs/short
      tailorpo resume runs/short updates=200       train on to 200 updates
    """
    from tailorpo._distributed import open_processes
    from tailorpo.checkpoint import latest_update
    from tailorpo.rundir import RunDirectory

    def begin() -> tuple[Run, RunDirectory] | None:
        directory = RunDirectory.open(folder)
        begun = directory.run
        run = begun.resumed(overrides or ())
        done = latest_update(directory.checkpoints)
        if run.updates < done:
            raise UserError(f"{folder} has made {done} updates already; updates={run.updates} would go back")
        if run == begun and run.updates == done and (directory.path / "report.html").exists():
            typer.echo(
                f"All {done} updates are done; extend the run with `tailorpo resume {folder} updates={2 * done}`."
            )
            typer.echo(f"report: {directory.path / 'report.html'}")
            return None
        if run != begun:
            directory.write_run(run)
        return run, directory

    use_device(device)
    with open_processes() as processes:
        begun = told(processes, begin)
        if begun is not None:
            train_and_report(*begun, processes)


def evaluate(
    folder: Folder,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings of eval to replace for this time.")
    ] = None,
    device: Device = None,
) -> None:
    """Compare base and aligned model again.

    Both draw the same prompts from the same seeds; the report is written anew.

    \b
    Examples:
      tailorpo eval runs/short
      tailorpo eval runs/short eval.seeds=16 eval.prompts_unseen.name=animals_unseen
    """
    from tailorpo._distributed import open_processes, pick_device
    from tailorpo.rundir import RunDirectory
    from tailorpo.trained import load_trained, trained_folder

    def begin() -> tuple[Run, RunDirectory]:
        directory = RunDirectory.open(folder)
        return directory.run.resumed(overrides or ()), directory

    use_device(device)
    with open_processes() as processes:
        run, directory = told(processes, begin)
        with at_work(run, directory, processes) as reporter:
            reporter.phase("loading the model")
            with processes.together():
                model = run.model.load(pick_device(), seed=run.seed)
                load_trained(model, run.model, trained_folder(run.model, directory))
            results = evaluate_and_report(run, directory, model, reporter=reporter, processes=processes)
        if processes.main:
            print_results(results)
            typer.echo(f"report: {directory.path / 'report.html'}")


def report(folder: Folder) -> None:
    """Write report.html from a run's files.

    \b
    Example:
      tailorpo report runs/short
    """
    from tailorpo.report import write_report
    from tailorpo.rundir import RunDirectory

    typer.echo(f"report: {write_report(RunDirectory.open(folder))}")
