"""Experiments that train nothing, or one thing: a function that goes on where it was stopped, and its table and plot.

What it has measured so far is a file of JSON lines in its folder of runs, one line per unit (a state, a pair); a line
is written when its unit is finished. The first line holds the settings; under others the file is begun anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tailorpo._distributed import pick_device
from tailorpo.files import atomic_write, storage_errors
from tailorpo.policy import Policy
from tailorpo.run import Run
from tailorpo.train import Reporter


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a measurement starts from.

    Attributes:
        run: a recipe with its overrides; its model, sampler, prompts and seed count.
        sizes: how much is measured, by name.
        results: the folder of the results, for those that look at other experiments'.
    """

    run: Run
    sizes: Mapping[str, int]
    results: Path


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """An experiment that is not a grid.

    Attributes:
        name: what the command calls it.
        question: what is asked.
        paper: the table or figure of the paper that it repeats.
        statistic: what the table shows, in words.
        recipe: the run file it starts from, in recipes/.
        overrides: the settings it replaces.
        sizes: how much is measured; the command's options replace them.
        quick: the same for `--quick`.
        cost: guided network evaluations, by settings.
        measure: does it in a folder and returns what is worth keeping.
        table: that as Markdown.
        plot: that as a picture.
    """

    name: str
    question: str
    paper: str
    statistic: str
    recipe: str
    overrides: tuple[str, ...] = ()
    sizes: Mapping[str, int]
    quick: Mapping[str, int]
    cost: Callable[[Settings], int]
    measure: Callable[[Settings, Path, Reporter], dict[str, Any]]
    table: Callable[[dict[str, Any]], str]
    plot: Callable[[dict[str, Any], Path], None]


class Lines:
    """Units of a measurement that are finished, on disk.

    Args:
        path: of the file.
        settings: everything that the numbers depend on.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        head = json.dumps(settings, sort_keys=True)
        kept: list[str] = []
        if path.is_file():
            lines = path.read_text(encoding="utf-8").split("\n")
            # What follows the last line end was torn apart by a kill.
            kept = lines[1:-1] if lines[0] == head else []
        atomic_write(path, "\n".join([head, *kept]) + "\n")
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in kept]

    def add(self, row: dict[str, Any]) -> None:
        """One more, forced to the disk."""
        with storage_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)


def described(settings: Settings) -> dict[str, Any]:
    """The part of the settings that numbers measured on the untrained model depend on."""
    data = settings.run.to_dict()
    return {**{name: data[name] for name in ("seed", "model", "sampler", "prompts")}, **settings.sizes}


def base_policy(run: Run) -> Policy:
    """The untrained model under the run's sampler; its adapter, if it has one, changes nothing yet."""
    torch.set_num_threads(1)
    return Policy(run.model.load(pick_device(), seed=run.seed), run.sampler)
