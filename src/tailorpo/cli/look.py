"""Commands that show what a run would do, and those of the experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tailorpo.cli.support import Overrides, Recipe, console, display, run_file
from tailorpo.errors import UserError


def show(recipe: Recipe, overrides: Overrides = None) -> None:
    """Show settings, cost and code path of a recipe.

    Every setting is spelt out; files that are missing are named, with exit code 2.

    \b
    Examples:
      tailorpo show recipes/emoji_tailorpo_g.yaml
      tailorpo show recipes/emoji_tailorpo_g.yaml algorithm.update=buffered
    """
    from tailorpo.describe import cost_table, path_table
    from tailorpo.run import Run

    run = Run.load(run_file(recipe), overrides or (), files=False)
    screen = console()
    screen.print(run.to_yaml(), markup=False, highlight=False)
    screen.print(cost_table(run))
    screen.print(f"Processes: {run.batch.batches} at most can share an update (batch.trajectories / batch.micro)\n")
    screen.print(path_table(run))
    missing = run.missing()
    if missing:
        raise UserError(
            "\n".join(["the settings are sound, but to train this is missing:", *(f"  - {m}" for m in missing)])
        )


def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="h200, h100, a100, l40s, rtx4090, rtx3090, l4 or t4; this (measured now) or cpu (the same).",
            show_default="every GPU in the table",
        ),
    ] = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="Of an hour of --device, in any currency.", show_default=False)
    ] = None,
    efficiency: Annotated[
        float | None,
        typer.Option(min=0.001, max=1, help="Share of the peak that is reached.", show_default="0.25; 0.6 in float32"),
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="sd15, sd21 or sdxl, instead of what is in model.path.", show_default=False)
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Load rewards of unknown size and count them.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Predict operations, memory, hours and money of a recipe.

    Nothing is loaded but config.json files; the weights need not be there.

    \b
    Examples:
      tailorpo plan recipes/sd15_aesthetic_tailorpo_g.yaml
      tailorpo plan recipes/sd15_aesthetic_tailorpo_g.yaml model.dtype=bfloat16 --device h100 --price 2.50
      tailorpo plan recipes/emoji_tailorpo_g.yaml --device this
    """
    from tailorpo.plan.command import show_plan
    from tailorpo.run import Run

    if price is not None and device is None:
        raise UserError("--price is of one device; say which with --device")
    show_plan(
        Run.load(run_file(recipe), overrides or (), files=False),
        device=device,
        price=price,
        efficiency=efficiency,
        architecture=architecture,
        measure=measure,
        console=None if json_ else console(),
    )


def rewards() -> None:
    """List the rewards.

    With whether gradients pass through them, which TailorPO-G needs, what they need and where to get it.
    """
    from tailorpo.rewards import describe_rewards

    words = {True: "yes", False: "no", None: "as it says"}
    table = Table("name", "gradient", "what it rewards", "needs", "unit", box=None, pad_edge=False)
    for reward in describe_rewards():
        cells = (reward.name, words[reward.differentiable], reward.summary, reward.needs, reward.units)
        table.add_row(*map(escape, cells))
    screen = console()
    screen.print(table)
    screen.print("Nothing is downloaded for you. To fill the folder (here DIR) that is a reward's `path`:")
    for reward in describe_rewards():
        for each in reward.downloads:
            note = f"  # {reward.name}: {each.size}; licence: {each.licence}"
            screen.print(note, each.command("DIR"), sep="\n  ", markup=False, highlight=False, soft_wrap=True)


def models() -> None:
    """List the models."""
    from tailorpo.describe import model_table

    console().print(model_table())


def experiment(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Which; --list shows them.")] = None,
    overrides: Overrides = None,
    list_: Annotated[bool, typer.Option("--list", help="List the experiments.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cells and what they cost; run nothing.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time; each is a process with one thread.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="One update of every variant, as a smoke test.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Only these cells, e.g. 'tailorpo*'; may be repeated.")
    ] = None,
    recipes: Annotated[Path, typer.Option(help="The folder of the recipes.")] = Path("recipes"),
    results: Annotated[
        Path | None,
        typer.Option(
            help="The folder of the results.",
            show_default="benchmarks/results/experiments; below --work with --quick or overrides",
        ),
    ] = None,
    work: Annotated[Path, typer.Option(help="The folder of the runs.")] = Path("runs/experiments"),
    states: Annotated[int | None, typer.Option(min=2, help="step-reward: states per step.")] = None,
    continuations: Annotated[int | None, typer.Option(min=2, help="step-reward: of each sibling.")] = None,
    pairs: Annotated[
        int | None,
        typer.Option(min=1, help="gradient-direction: pairs of trajectories. pair-worth: trajectories."),
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--docs", help="Put the results into this page or folder.", show_default=False)
    ] = None,
    cell: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run one of the paper's experiments.

    Finished cells are skipped; one that was stopped goes on from its checkpoint.

    \b
    Examples:
      tailorpo experiment --list
      tailorpo experiment methods --dry-run        the cells, what they cost, what is finished
      tailorpo experiment methods --jobs 2         run them, two at a time
      tailorpo experiment methods --only 'tailorpo-g.*'
      tailorpo experiment --docs docs              tables and plots into its pages
    """
    from tailorpo.experiments import command, conduct
    from tailorpo.experiments.grid import Grid
    from tailorpo.experiments.grid import quick as quick_
    from tailorpo.experiments.runner import Places

    committed = Path("benchmarks/results/experiments")
    if page is not None:
        from tailorpo.experiments.docs import include

        missing = include(page, results or committed)
        typer.echo(f"{page} is up to date; not measured yet: {', '.join(missing) or 'nothing'}")
        return
    if list_ or name is None:
        console().print(command.experiment_table())
        return
    found, settings = conduct.find(name), tuple(overrides or ())
    own = work / "quick" if quick else work
    # What was not run as the catalogue says stays out of the committed results.
    sizes = {"states": states, "continuations": continuations, "pairs": pairs}
    changed = quick or settings or any(sizes.values())
    written = results or (own / "results" if changed else committed)
    places = Places(written, own)
    if not isinstance(found, Grid):
        start = conduct.settings_of(
            found, recipes=recipes, overrides=settings, sizes=sizes, results=written, smoke=quick
        )
        command.print_measurement(found, start, console())
        if not dry_run:
            with display(None) as reporter:
                conduct.run_measurement(found, start, places, reporter=reporter)
            typer.echo(f"results: {written / name}.json, .md and .webp")
        return
    if any(sizes.values()):
        raise UserError(f"{name} is a grid of training runs; --states, --continuations and --pairs are not for it")
    grid = conduct.Conduct(
        grid=quick_(found) if quick else found,
        places=places,
        recipes=recipes,
        overrides=settings,
        only=tuple(only or ()),
    )
    if cell is not None:
        with display(None) as reporter:
            grid.run_one(cell, reporter=reporter)
    elif dry_run:
        command.print_plan(grid, console())
    else:
        folders = ["--recipes", str(recipes), "--results", str(written), "--work", str(work)]
        arguments = [*settings, *folders, *(["--quick"] if quick else [])]
        command.run(grid, jobs=jobs, console=console(), arguments=arguments)
