"""What `tailorpo jensen` does: from a recipe or a run to jensen.json, .md, .html and (with matplotlib) .webp."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from tailorpo._distributed import find_device, pick_device
from tailorpo.checkpoint import latest_update
from tailorpo.environment import environment
from tailorpo.errors import UserError
from tailorpo.experiments.measurement import Lines
from tailorpo.files import atomic_write, storage_errors
from tailorpo.jensen.measure import Subject, measure, measured_steps
from tailorpo.jensen.page import render
from tailorpo.jensen.plots import picture
from tailorpo.jensen.settings import Cost, Sizes, chosen_steps, cost
from tailorpo.jensen.summary import summarise
from tailorpo.jensen.tables import grids, markdown, rich_table
from tailorpo.policy import Policy
from tailorpo.prompts import load_prompts
from tailorpo.rewards import Scorer, load_scorer
from tailorpo.run import Run
from tailorpo.rundir import RUN, RunDirectory
from tailorpo.train import Reporter
from tailorpo.trained import load_trained, trained_folder

ROWS = "rows.jsonl"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One measurement with everything decided.

    Attributes:
        run: the settings.
        directory: of a run whose trained weights are measured; None for the base model.
        sizes: how much.
        steps: which.
        out: the folder of the results.
        title: what the results are called.
    """

    run: Run
    directory: RunDirectory | None
    sizes: Sizes
    steps: tuple[int, ...]
    out: Path
    title: str

    @classmethod
    def make(
        cls,
        source: Path,
        overrides: Sequence[str],
        *,
        sizes: Sizes,
        steps: str | None,
        base: bool,
        out: Path | None,
    ) -> Job:
        """From what was asked for.

        Raises:
            UserError: a mistake in it, or a run that cannot be measured.
        """
        is_run = (source / RUN).is_file()
        # Pairs of Diffusion-DPO and the like are of no matter here; model and rewards say themselves what they miss.
        run = Run.load(source / RUN if is_run else source, overrides, files=False)
        if run.ensemble is not None:
            raise UserError(
                "an ensemble ranks pictures by comparison and gives one alone no value, so there is no step reward to"
                " measure; add ensemble=null to measure its members and their weighted sum"
            )
        if run.sampler.eta == 0:
            raise UserError("sampler.eta is 0: steps without noise have no siblings to rank; use eta > 0")
        directory = RunDirectory.open(source) if is_run and not base else None
        name = source.resolve().name if is_run else source.stem
        folder = source / ("jensen-base" if base else "jensen") if is_run else Path("runs") / f"{name}-jensen"
        return cls(
            run=run,
            directory=directory,
            sizes=sizes,
            steps=chosen_steps(steps, steps=run.sampler.steps),
            out=out or folder,
            title=name,
        )

    @property
    def cost(self) -> Cost:
        """Of the whole, whatever of it is measured already."""
        differentiable = sum(bool(entry.reward.differentiable) for entry in self.run.reward)
        return cost(self.sizes, self.steps, sampler=self.run.sampler, differentiable=differentiable)

    def measure(self, reporter: Reporter) -> dict[str, Any]:
        """Measure what is missing and write the results; returns the content of jensen.json.

        Raises:
            UserError: no trained weights, a model or a reward that cannot be loaded.
            StorageError: the disk refused.
        """
        reporter.phase("loading the model and the rewards")
        subject = self._subject()
        steps = measured_steps(subject.policy, self.steps)
        if not steps:
            raise UserError("none of the --steps adds noise, so there are no siblings to rank; name earlier ones")
        with storage_errors(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        lines = Lines(self.out / ROWS, self._identity())
        if lines.rows:
            reporter.note(f"going on from {len(lines.rows):,} rows in {self.out / ROWS}")
        measure(subject, self.sizes, steps, lines=lines, reporter=reporter)
        reporter.phase("intervals, tables, page")
        weights = {name: entry.weight for name, entry in zip(subject.rewards, self.run.reward, strict=True)}
        content = {
            "schema": 1,
            "title": self.title,
            "weights": self._weights(),
            "seed": self.run.seed,
            "sampler": asdict(self.run.sampler),
            "sizes": asdict(self.sizes),
            "cost": asdict(self.cost),
            **summarise(
                lines.rows,
                weights=weights,
                steps=steps,
                states=self.sizes.states,
                plain_states=self.sizes.plain_states,
                policy=subject.policy,
            ),
            "environment": environment(subject.policy.model.device),
        }
        self._write(content)
        return content

    def print_cost(self, console: Console) -> None:
        """What it takes, before it begins."""
        found = self.cost
        plain = found.plain_forwards // self.run.sampler.evaluations_per_forward
        console.print(
            f"{self.title}, {self._weights()}: steps {', '.join(map(str, self.steps))};"
            f" {self.sizes.states} pairs, {self.sizes.continuations} continuations each\n"
            f"cost: {found.forwards + plain:,} F (guided network evaluations), {found.backwards:,} B,"
            f" {found.pictures:,} pictures scored, {found.reward_gradients:,} reward gradients",
            highlight=False,
            markup=False,
        )

    def print_result(self, content: dict[str, Any], console: Console) -> None:
        """Tables and verdict."""
        for grid in grids(content):
            console.print(rich_table(grid))
            console.print()
        for name, reward in content["rewards"].items():
            verdict = reward["verdict"]
            console.print(f"{name}: {verdict['headline']}.", style="bold", markup=False, highlight=False)
            for sentence in verdict["sentences"]:
                console.print(f"  {sentence}", markup=False, highlight=False)
        console.print(f"page: {(self.out / 'jensen.html').resolve()}", markup=False, highlight=False)

    def _subject(self) -> Subject:
        run, device = self.run, pick_device()
        # The base model needs no adapter, and full fine-tuning no copy of itself.
        config = run.model if self.directory else replace(run.model, lora=None, full=False)
        trained = trained_folder(config, self.directory) if self.directory else None
        model = config.load(device, seed=run.seed)
        if trained:
            load_trained(model, config, trained)
        scorer = load_scorer(run.reward, device)
        devices = [find_device(entry.device) if entry.device else device for entry in run.reward]
        rewards = {
            name: Scorer([(reward, 1.0)], on_invalid="stop", devices=[own])
            for name, (reward, _), own in zip(scorer.names, scorer.members, devices, strict=True)
        }
        return Subject(
            policy=Policy(model, run.sampler),
            prompts=load_prompts(run.prompts),
            rewards=rewards,
            differentiable=[name for name, reward in rewards.items() if reward.differentiable],
            seed=run.seed,
        )

    def _weights(self) -> str:
        if self.directory is None:
            return "base model"
        return f"trained for {latest_update(self.directory.checkpoints)} updates"

    def _identity(self) -> dict[str, Any]:
        """Everything that a row depends on; numbers of states and steps are not part of it."""
        data, sizes = self.run.to_dict(), self.sizes
        return {
            **{name: data[name] for name in ("seed", "model", "sampler", "prompts", "reward")},
            "weights": self._weights(),
            "continuations": sizes.continuations,
            "lookahead": sizes.lookahead,
            "probes": sizes.probes,
        }

    def _write(self, content: dict[str, Any]) -> None:
        atomic_write(self.out / "jensen.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
        atomic_write(self.out / "jensen.md", markdown(content))
        atomic_write(self.out / "jensen.html", render(content))
        with suppress(UserError):  # without matplotlib the page has the charts all the same
            atomic_write(self.out / "jensen.webp", picture(content))
