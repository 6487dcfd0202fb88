"""What an experiment is, as data, and how a grid becomes cells, each of them one training run.

A grid's cell is (variant, reward, seed); a variant is a recipe and the settings it replaces. Every cell of a grid gets
the same budget of guided network evaluations: its number of updates is chosen so that they come nearest to it. Two
cells with the same seed and sampler are evaluated on the same prompts, initial latents and noises.

Backward passes are counted and shown, but are not part of the budget, as in the papers' comparisons by evaluations.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast

from tailorpo.errors import UserError
from tailorpo.noise import Noise
from tailorpo.prompts import load_prompts
from tailorpo.rewards import describe_rewards
from tailorpo.run import Run
from tailorpo.settings import plain


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of an experiment's table.

    Attributes:
        name: what tables and plots call it.
        recipe: the run file it starts from, in recipes/.
        overrides: the settings it replaces, each `key.sub=value`; `<reward>` stands for the cell's reward.
        rewards: the grid's rewards it is for; all of them if empty.
        tuned: the name under which tuning has a winner for it; the variant's own overrides come after the winner's.
        proxy: (reward, its stand-in): trains on the stand-in while the reward measures; there for that reward only.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()
    rewards: tuple[str, ...] = ()
    tuned: str | None = None
    proxy: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Grid:
    """An experiment made of training runs.

    Attributes:
        name: what the command calls it.
        question: what is asked.
        paper: the table or figure of the paper that it repeats.
        statistic: what the table shows, in words.
        variants: its rows.
        seeds: reward -> training seeds.
        budget: guided network evaluations of one cell's training.
        overrides: settings that every cell replaces.
        reference: the variant that the others are compared with; None for no such table.
        points: evaluations on the way, for learning curves.
    """

    name: str
    question: str
    paper: str
    statistic: str
    variants: tuple[Variant, ...]
    seeds: dict[str, tuple[int, ...]]
    budget: int
    overrides: tuple[str, ...] = ()
    reference: str | None
    points: int = 3


@dataclass(frozen=True)
class Cell:
    """One training run of a grid."""

    variant: Variant
    reward: str
    seed: int

    @property
    def id(self) -> str:
        """A name that can be a folder's."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.variant.name.lower()).strip("-")
        return f"{slug}.{self.reward}.{self.seed}"


@dataclass(frozen=True)
class Plan:
    """A cell with everything that it takes.

    Attributes:
        cell: which.
        run: the run file, with the number of updates that fits the budget.
        measured: the run file that says how it is evaluated, the same for all cells of one reward and seed.
        overrides: what it replaces in the recipe.
        forwards: guided network evaluations of the training, planned.
        backwards: backward passes of the loss.
        input_gradients: backward passes to the latents.
        evaluation: guided network evaluations of measuring: the curve, the KL, and base and aligned at the end.
        points: evaluations on the way.
    """

    cell: Cell
    run: Run
    measured: Run
    overrides: tuple[str, ...]
    forwards: int
    backwards: int
    input_gradients: int
    evaluation: int
    points: int

    @property
    def digest(self) -> str:
        """Changes when any setting does: a result with another one is out of date.

        A setting at its default counts as not there, so that one that is added later makes no result out of date.
        """
        evaluation = {name: _without_defaults(getattr(self.measured, name)) for name in EVALUATION}
        text = json.dumps([_without_defaults(self.run), evaluation, self.points], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def work(self) -> int:
        """All of it in units of a forward; a backward pass counts as two."""
        return self.forwards + 2 * self.backwards + 4 * self.input_gradients + self.evaluation


EVALUATION = ("seed", "reward", "prompts", "sampler", "eval")
"""The sections of a run that say how it is evaluated."""

MEASURED = "emoji_tailorpo.yaml"
"""The recipe whose evaluation every cell gets, with the grid's overrides."""

QUICK = ("batch.trajectories=2", "batch.micro=2", "eval.seeds=2", "eval.prompts_seen={list: [a cat, a dog]}")
"""What `--quick` replaces: enough to see that everything fits together, and nothing to draw a conclusion from."""


def quick(grid: Grid) -> Grid:
    """A smoke version: one update, one reward, one seed."""
    reward, seeds = next(iter(grid.seeds.items()))
    return replace(grid, seeds={reward: seeds[:1]}, budget=1, points=1, overrides=(*grid.overrides, *QUICK))


def plans(
    grid: Grid,
    *,
    recipes: Path,
    overrides: Sequence[str] = (),
    winners: dict[str, tuple[str, ...]] | None = None,
    wanted: Callable[[Cell], bool] = lambda cell: True,
) -> list[Plan]:
    """Every cell of a grid, rewards outermost, then seeds, then variants, so that a part of it is comparable.

    A variant whose method needs a gradient is left out where the reward has none.

    Args:
        recipes: the folder of the recipes.
        overrides: settings replaced in every cell, after the grid's own.
        winners: what tuning found, by `Variant.tuned`.
        wanted: which cells; the recipes of the others are not read.

    Raises:
        UserError: there is no such folder, a setting is wrong, or the variants do not share one sampler.
    """
    found: list[Plan] = []
    for reward, seeds in grid.seeds.items():
        for seed in seeds:
            for variant in grid.variants:
                cell = Cell(variant, reward, seed)
                if wanted(cell) and _possible(variant, reward, recipes, overrides):
                    tuned = (winners or {}).get(variant.tuned or "", ())
                    trained = variant.proxy[1] if variant.proxy else reward
                    common = (*grid.overrides, *overrides, f"seed={seed}")
                    own = (setting.replace("<reward>", reward) for setting in variant.overrides)
                    settings = (f"reward={{name: {trained}}}", *tuned, *own, *common)
                    measured = Run.load(recipes / MEASURED, [f"reward={{name: {reward}}}", *common])
                    found.append(_plan(grid, cell, recipes / variant.recipe, settings, measured=measured))
    samplers = {run.sampler for plan in found for run in (plan.run, plan.measured)}
    if len(samplers) > 1:
        raise UserError(
            f"experiment {grid.name}: its variants are evaluated under different samplers, so they cannot be compared:"
            f" {', '.join(sorted(map(str, samplers)))}"
        )
    return found


def missing_recipes(grid: Grid, recipes: Path) -> list[str]:
    """Recipes that the grid names and that are not there."""
    return sorted({variant.recipe for variant in grid.variants if not (recipes / variant.recipe).is_file()})


def _possible(variant: Variant, reward: str, recipes: Path, overrides: Sequence[str]) -> bool:
    """Whether the variant's recipe exists and its method can work with the reward."""
    if (variant.proxy and variant.proxy[0] != reward) or (variant.rewards and reward not in variant.rewards):
        return False
    if not (recipes / variant.recipe).is_file():
        return False
    # Under a reward that has a gradient, since only then any method loads.
    trained = variant.proxy[1] if variant.proxy else "brightness"
    own = (setting.replace("<reward>", "colourfulness") for setting in variant.overrides)
    run = Run.load(recipes / variant.recipe, [f"reward={{name: {trained}}}", *own, *overrides])
    differentiable = {info.name: info.differentiable for info in describe_rewards()}
    return not run.algorithm.needs_gradient or differentiable.get(reward) is not False


def _plan(grid: Grid, cell: Cell, recipe: Path, settings: tuple[str, ...], *, measured: Run) -> Plan:
    run = Run.load(recipe, settings)
    algorithm, steps, batch = run.algorithm, run.sampler.steps, run.batch.trajectories
    cost = algorithm.cost(steps, algorithm.trained_steps(steps, noise=Noise(run.seed), update=0))
    updates = max(1, round(grid.budget / (cost.forwards * batch)))
    run = replace(run, updates=updates)
    trajectories = updates * batch
    seen, every = _evaluated_prompts(measured)
    chains = seen * (grid.points + 2) + 2 * every * measured.eval.seeds
    return Plan(
        cell,
        run,
        measured,
        (*settings, f"updates={updates}"),
        forwards=cost.forwards * trajectories,
        backwards=cost.backwards * trajectories,
        input_gradients=cost.input_gradients * trajectories,
        evaluation=chains * steps,
        points=grid.points,
    )


def _evaluated_prompts(run: Run) -> tuple[int, int]:
    """How many prompts an evaluation has: the seen ones, and all."""
    seen = len(load_prompts(run.eval.prompts_seen or run.prompts))
    unseen = len(load_prompts(run.eval.prompts_unseen)) if run.eval.prompts_unseen else 0
    return seen, seen + unseen


def _without_defaults(value: Any) -> Any:
    """A dataclass tree as plain data with the names of its classes, without what is at its default."""
    if is_dataclass(value) and not isinstance(value, type):
        changed = {
            item.name: _without_defaults(getattr(value, item.name))
            for item in fields(value)
            if getattr(value, item.name) != _default(item)
        }
        return {"class": type(value).__name__, **changed}
    if isinstance(value, tuple | list):
        return [_without_defaults(each) for each in cast(Sequence[Any], value)]
    return plain(value)


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def settings_of(run: Run) -> dict[str, Any]:
    """The sections of a run that say how it learns."""
    data = run.to_dict()
    return {name: data[name] for name in ("algorithm", "optimizer", "batch", "sampler", "model")}
