"""Tables that the commands print: what a run costs, the files it runs through, the models there are, the result."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from tailorpo.algorithms.base import Cost
from tailorpo.algorithms.diffusion_dpo import DiffusionDPO
from tailorpo.algorithms.spo import SPO
from tailorpo.algorithms.tailorpo import TailorPO
from tailorpo.models.source import BUNDLED, assets
from tailorpo.noise import Noise
from tailorpo.run import Run
from tailorpo.sentinels.series import looks

# One training step from the loop inwards; what the run's own sections add is found from their classes.
_LOOP = (
    "train",
    "rollout",
    "control",
    "metrics",
    "optimizer",
    "policy",
    "gaussian_step",
    "objectives",
    "step_rewards",
    "schedule",
    "prediction",
    "noise",
    "algorithms.base",
    "models",
    "models.latent",
    "models.trained",
    "rewards.scorer",
)


def trajectory_cost(run: Run, *, update: int = 0) -> tuple[tuple[int, ...], Cost]:
    """The trained steps of an update, and what one trajectory of it costs."""
    trained = run.algorithm.trained_steps(run.sampler.steps, noise=Noise(run.seed), update=update)
    return trained, run.algorithm.cost(run.sampler.steps, trained)


def cost_table(run: Run) -> Table:
    """Network evaluations of one trajectory, one update and the whole run."""
    trained, cost = trajectory_cost(run)
    # Without guidance a forward is worth as much less as fewer latents go through the network.
    worth = 1 if cost.guided else run.sampler.evaluations_per_forward
    rows = (
        ("guided forwards", cost.forwards // worth, "one latent through the network, with classifier-free guidance"),
        ("backwards", cost.backwards // worth, "for the loss"),
        ("input gradients", cost.input_gradients, "back to a latent, for reward guidance"),
        ("reward queries", cost.reward_queries, "pictures decoded and scored"),
    )
    steps = ", ".join(map(str, trained))
    redrawn = isinstance(run.algorithm, TailorPO) and run.algorithm.offset == "random"
    drawn = " (drawn anew for every update; here the first)" if redrawn else ""
    offline = isinstance(run.algorithm, DiffusionDPO)
    when = "a random time for each pair" if offline else f"trained steps {steps} of 0 to {run.sampler.steps - 1}{drawn}"
    table, unit = _table(f"Cost; {when}"), "pair" if offline else "trajectory"
    table.add_column("")
    plural = "pairs" if offline else "trajectories"
    for name in (unit, f"update ({run.batch.trajectories} {plural})", f"run ({run.updates} updates)"):
        table.add_column(name, justify="right")
    table.add_column("")
    for name, number, meaning in rows:
        update = number * run.batch.trajectories
        table.add_row(name, f"{number:,}", f"{update:,}", f"{update * run.updates:,}", meaning)
    return table


def path_table(run: Run) -> Table:
    """The source files that one training step of this run passes through, whole, with their lines; without what serves
    several processes and the report's pictures."""
    guidance = run.algorithm.guidance if isinstance(run.algorithm, TailorPO) else None
    sections = [run.algorithm, run.sampler, guidance, *(entry.reward for entry in run.reward)]
    names = [*(f"tailorpo.{name}" for name in _LOOP), f"tailorpo.models.{run.model.family}"]
    if isinstance(run.algorithm, TailorPO | SPO):
        names.append("tailorpo.algorithms.pairs")
    if isinstance(run.algorithm, TailorPO):
        names += [f"tailorpo.algorithms.{name}" for name in ("guided", "kl_step", "labels", "ranking")]
        if run.algorithm.objective == "plackett_luce":
            names.append("tailorpo.algorithms.groups")
    names += [type(section).__module__ for section in sections if section is not None]
    files = sorted({Path(str(sys.modules[name].__file__)) for name in _imported(names)})
    root = Path(__file__).parent.parent
    lines = [len(file.read_text(encoding="utf-8").splitlines()) for file in files]
    table = _table(f"The files of one step: {len(files)}, {sum(lines):,} lines with docstrings and all that is off")
    table.add_column("file")
    table.add_column("lines", justify="right")
    for file, count in zip(files, lines, strict=True):
        table.add_row(str(file.relative_to(root)), f"{count:,}")
    return table


def _imported(names: Iterable[str]) -> Iterable[str]:
    from importlib import import_module

    for name in names:
        import_module(name)
        yield name


def model_table() -> Table:
    """The bundled models and the families whose folders can be used."""
    table = _table("Models")
    for name in ("model.family", "model.path", "what it is", "size"):
        table.add_column(name)
    for name in BUNDLED:
        size = sum(file.stat().st_size for file in assets(name).rglob("*") if file.is_file())
        what = "bundled: a small Stable Diffusion that draws emoji (docs/miniature.md)"
        table.add_row("sd", name, what, f"{size / 1e6:.1f} MB")
    names = {"sd": ("Stable Diffusion 1.x or 2.x", "2 to 5 GB"), "sdxl": ("Stable Diffusion XL base", "7 to 14 GB")}
    for family, (name, size) in names.items():
        table.add_row(family, "a folder", f"{name} in diffusers' format", size)
        table.add_row(family, "a file.safetensors", f"{name} in one file, in the original layout", size)
        table.add_row(family, "a hub id", f"{name} in the hub's local cache; fetched only with model.download", size)
    return table


def result_table(results: dict[str, Any]) -> Table:
    """The evaluation: base, aligned, and the paired difference with its interval."""
    table = _table("Evaluation")
    for name in ("prompts", "metric"):
        table.add_column(name)
    for name in ("base", "aligned", "difference", f"{results['settings']['confidence']:.0%} interval"):
        table.add_column(name, justify="right")
    for group, content in results["groups"].items():
        if group == "all":
            continue
        for index, (name, row) in enumerate(content["metrics"].items()):
            if row is None:
                continue
            metric = results["metrics"][name]
            note = {"trained": " (trained)", "judge": " (held out)"}.get(metric["role"], "")
            numbers = [_signed(row["low"]), _signed(row["high"])]
            interval = "-" if row["low"] is None else f"{numbers[0]} to {numbers[1]}"
            table.add_row(
                f"{group} ({content['prompts']})" if index == 0 else "",
                f"{metric['label']}{note}",
                f"{row['base']:.3f}",
                f"{row['aligned']:.3f}",
                _signed(row["difference"]),
                interval,
            )
    return table


def sentinel_table(rows: Sequence[Mapping[str, Any]]) -> Table | None:
    """What the sentinels saw, a line per look; None if there was none."""
    seen = looks(rows)
    if not seen:
        return None
    table = _table("Sentinels")
    for name in ("update", "state", "reward", "judge", "diversity", "KL", "why"):
        table.add_column(name, justify="left" if name in ("state", "why") else "right")
    for look in seen:
        measures = look["measures"]
        kept = measures.get("distance", {}).get("ratio")
        table.add_row(
            str(look["update"]),
            look["state"],
            _signed(measures["reward"].get("difference")),
            _signed(measures.get("judge", {}).get("difference")),
            "-" if kept is None else f"{kept:.0%}",
            f"{look['kl']:.3g}",
            "; ".join(look["reasons"]),
        )
    return table


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
