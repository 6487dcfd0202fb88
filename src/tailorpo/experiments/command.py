"""What `tailorpo experiment` prints and returns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tailorpo.errors import TailorpoError
from tailorpo.experiments.catalogue import GRIDS, MEASUREMENTS
from tailorpo.experiments.conduct import Conduct
from tailorpo.experiments.display import CellDisplay
from tailorpo.experiments.grid import Plan
from tailorpo.experiments.measurement import Measurement, Settings
from tailorpo.experiments.plots import pyplot
from tailorpo.experiments.runner import RATE, estimated_minutes, finished_cells, read_results
from tailorpo.progress import duration


def experiment_table() -> Table:
    """The experiments there are."""
    table = Table("name", "asks", "paper", box=None, pad_edge=False)
    for experiment in (*GRIDS, *MEASUREMENTS):
        table.add_row(experiment.name, experiment.question, experiment.paper)
    return table


def print_plan(conduct: Conduct, console: Console) -> None:
    """The cells, what each costs and which are finished."""
    plans = conduct.plans()
    results = read_results(conduct.places.json(conduct.grid.name))
    finished = finished_cells(plans, conduct.places, conduct.grid.name)
    table = Table("cell", "updates", "F", "B", "to measure, F", "minutes", "", box=None, pad_edge=False)
    for plan in plans:
        row = (plan.run.updates, plan.forwards, plan.backwards, plan.evaluation)
        minutes = f"{estimated_minutes([plan], results):.1f}"
        table.add_row(plan.cell.id, *(f"{n:,}" for n in row), minutes, "finished" * (plan.cell.id in finished))
    console.print(table)
    left = [plan for plan in plans if plan.cell.id not in finished]
    time = duration(60 * estimated_minutes(left, results))
    console.print(f"{len(finished)} of {len(plans)} finished; {time} left on one free core, one cell at a time")
    _notes(conduct, console)


def print_measurement(measurement: Measurement, settings: Settings, console: Console) -> None:
    """What a measurement costs."""
    forwards = measurement.cost(settings)
    sizes = ", ".join(f"{size} {name}" for name, size in settings.sizes.items())
    time = duration(forwards / RATE)
    console.print(f"{measurement.name}: {sizes}: {forwards:,} network evaluations, {time} on one free core")


def run(conduct: Conduct, *, jobs: int, console: Console, arguments: Sequence[str]) -> None:
    """Run what is not finished.

    Raises:
        TailorpoError: cells failed; the others are finished and written.
    """
    pyplot()  # that it is missing should be known before hours of training, not after
    plans = conduct.plans()
    finished = finished_cells(plans, conduct.places, conduct.grid.name)
    waiting: list[Plan] = [plan for plan in plans if plan.cell.id not in finished]
    _notes(conduct, console)
    with CellDisplay(console, waiting, finished=len(finished)) as display:
        failures = conduct.run(jobs=jobs, watcher=display, arguments=arguments)
    console.print(f"results: {conduct.places.results / conduct.grid.name}.json, .md and .webp", soft_wrap=True)
    if failures:
        lines = [f"  - {cell}: {failure}" for cell, failure in failures.items()]
        raise TailorpoError("\n".join([f"{len(failures)} of {len(waiting)} cells failed:", *lines]))


def _notes(conduct: Conduct, console: Console) -> None:
    for note in conduct.notes():
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
