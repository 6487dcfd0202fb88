"""From the name of an experiment to its results file, table and plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tailorpo.environment import environment
from tailorpo.errors import UserError
from tailorpo.experiments.catalogue import GRIDS, MEASUREMENTS
from tailorpo.experiments.cell import run_cell
from tailorpo.experiments.grid import QUICK, Grid, Plan, missing_recipes, plans
from tailorpo.experiments.measurement import Measurement, Settings
from tailorpo.experiments.plots import plot_grid
from tailorpo.experiments.runner import (
    Places,
    Watcher,
    cell_command,
    finished_cells,
    read_results,
    run_cells,
    write_results,
)
from tailorpo.experiments.tables import grid_tables
from tailorpo.experiments.tuning import Winners, confirmed, finalists, winners
from tailorpo.files import atomic_write
from tailorpo.run import Run
from tailorpo.settings import did_you_mean
from tailorpo.train import Reporter

TUNE, REFINE = (next(grid for grid in GRIDS if grid.name == name) for name in ("tune", "refine"))
CONFIRM = "confirm"


@dataclass(frozen=True, kw_only=True)
class Conduct:
    """One grid with everything decided: what `tailorpo experiment` was asked for.

    Attributes:
        grid: the experiment.
        places: where its files go.
        recipes: the folder of the recipes.
        overrides: settings replaced in every cell.
        only: patterns (as of the shell) of the cells that are wanted; all if empty.
    """

    grid: Grid
    places: Places
    recipes: Path = Path("recipes")
    overrides: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    @property
    def tuned(self) -> Winners:
        """What tuning found, as far as its results are there; its own later stages depart from the earlier ones."""
        tune, refine, confirm = (read_results(self.places.json(name)) for name in (TUNE.name, REFINE.name, CONFIRM))
        if self.grid.name == REFINE.name:
            return winners(TUNE, tune)
        if self.grid.name == CONFIRM:
            return finalists(TUNE, tune, REFINE, refine)
        return confirmed(TUNE, tune, REFINE, refine, confirm=confirm)

    def plans(self) -> list[Plan]:
        """The cells that are wanted.

        Raises:
            UserError: there is none, or no recipe.
        """
        if not self.recipes.is_dir():
            raise UserError(
                f"there is no folder {self.recipes}: experiments start from the recipes of the repository; run the"
                " command in a checkout or name the folder with --recipes"
            )
        wanted = plans(
            self.grid,
            recipes=self.recipes,
            overrides=self.overrides,
            winners=self.tuned,
            wanted=lambda cell: not self.only or any(fnmatchcase(cell.id, pattern) for pattern in self.only),
        )
        if not wanted:
            raise UserError(
                f"no cell of {self.grid.name} matches {' '.join(self.only)}; `tailorpo experiment {self.grid.name}"
                " --dry-run` shows them"
            )
        return wanted

    def notes(self) -> list[str]:
        """What a person should know before reading the result."""
        found = [
            f"{recipe} is not there; its variants are left out" for recipe in missing_recipes(self.grid, self.recipes)
        ]
        if any(variant.tuned for variant in self.grid.variants) and not self.tuned:
            found.append("`tune` has no result here: every method runs with the settings of its recipe")
        return found

    def head(self) -> dict[str, Any]:
        """What the results file says before its cells."""
        tuned = {name: list(overrides) for name, overrides in self.tuned.items()}
        uses = any(variant.tuned for variant in self.grid.variants)
        return {
            "question": self.grid.question,
            "paper": self.grid.paper,
            "statistic": self.grid.statistic,
            "budget": self.grid.budget,
            "overrides": list(self.overrides),
            "tuned": tuned if uses else None,
        }

    def run(self, *, jobs: int, watcher: Watcher, arguments: Sequence[str]) -> dict[str, str]:
        """Run what is not finished, write the results after every cell, and return the failures by cell.

        Args:
            arguments: of the command that was asked for, for the processes of the cells.
        """
        wanted = self.plans()
        finished = finished_cells(wanted, self.places, self.grid.name)

        def gather(_: Plan | None = None) -> None:
            self.gather(wanted)

        failures = run_cells(
            [plan for plan in wanted if plan.cell.id not in finished],
            folder=self.places.work / self.grid.name,
            command=cell_command(self.grid.name, arguments),
            jobs=jobs,
            watcher=watcher,
            done=gather,
        )
        gather()
        return failures

    def gather(self, wanted: Sequence[Plan]) -> None:
        """Write results, table and plot from the cells that are finished."""
        content = write_results(wanted, self.places, self.grid.name, head=self.head(), keep=bool(self.only))
        if content["cells"]:
            write_views(self.grid, content, self.places.results)

    def run_one(self, cell: str, *, reporter: Reporter) -> None:
        """Run one cell in this process.

        Raises:
            UserError: there is no such cell.
        """
        (plan,) = replace(self, only=(cell,)).plans()
        folder = self.places.work / self.grid.name / cell
        folder.parent.mkdir(parents=True, exist_ok=True)
        run_cell(plan, folder, reporter=reporter)


def write_views(grid: Grid, content: dict[str, Any], folder: Path) -> None:
    """The table and the plot of a results file's content."""
    atomic_write(folder / f"{grid.name}.md", grid_tables(grid, content))
    plot_grid(grid, content, folder / f"{grid.name}.webp")


def settings_of(
    measurement: Measurement,
    *,
    recipes: Path,
    overrides: Sequence[str],
    sizes: Mapping[str, int | None],
    results: Path,
    smoke: bool,
) -> Settings:
    """What a measurement starts from; sizes that are None are its own.

    Raises:
        UserError: a size that it does not have, or a mistake in a setting.
    """
    given = {name: size for name, size in sizes.items() if size is not None}
    unknown = [name for name in given if name not in measurement.sizes]
    if unknown:
        raise UserError(f"{measurement.name} has no {', '.join(unknown)}; it has {', '.join(measurement.sizes)}")
    own = measurement.quick if smoke else measurement.sizes
    small = QUICK if smoke else ()
    run = Run.load(recipes / measurement.recipe, [*measurement.overrides, *small, *overrides])
    return Settings(run=run, sizes={**own, **given}, results=results)


def run_measurement(measurement: Measurement, settings: Settings, places: Places, *, reporter: Reporter) -> None:
    """Measure what is not measured yet, and write results, table and plot."""
    folder = places.work / measurement.name
    folder.mkdir(parents=True, exist_ok=True)
    found = measurement.measure(settings, folder, reporter)
    content = {
        "experiment": measurement.name,
        "question": measurement.question,
        "paper": measurement.paper,
        "statistic": measurement.statistic,
        "environment": environment(),
        **found,
    }
    places.results.mkdir(parents=True, exist_ok=True)
    atomic_write(places.json(measurement.name), json.dumps(content, indent=1, allow_nan=False) + "\n")
    atomic_write(places.results / f"{measurement.name}.md", measurement.table(content))
    measurement.plot(content, places.results / f"{measurement.name}.webp")


def find(name: str) -> Grid | Measurement:
    """The experiment of a name.

    Raises:
        UserError: there is none.
    """
    known = (*GRIDS, *MEASUREMENTS)
    for experiment in known:
        if experiment.name == name:
            return experiment
    names = [experiment.name for experiment in known]
    raise UserError(f"there is no experiment {name!r}{did_you_mean(name, names)}; there are {', '.join(names)}")
