"""The command that asks when the step reward is right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tailorpo.cli.support import Device, Overrides, Recipe, console, display, use_device


def jensen(
    recipe: Recipe,
    overrides: Overrides = None,
    states: Annotated[int, typer.Option(help="Pairs of siblings per step.")] = 64,
    continuations: Annotated[int, typer.Option(help="Of each sibling, with common noises.")] = 4,
    lookahead: Annotated[int, typer.Option(help="Deterministic steps of the lookahead.")] = 1,
    plain_states: Annotated[
        int, typer.Option(help="Trajectories without guidance, for variance and bounds; 0: leave them out.")
    ] = 24,
    probes: Annotated[int, typer.Option(help="Random vectors per state for the trace of the Jacobian.")] = 2,
    batch: Annotated[int, typer.Option(help="Latents at once.")] = 48,
    steps: Annotated[
        str | None, typer.Option(help="Numbers with commas, or `all`.", show_default="eight, evenly spaced")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Of a run: measure its base model.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="The folder.", show_default="RUN/jensen or runs/RECIPE-jensen")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it costs; measure nothing.")] = False,
    device: Device = None,
) -> None:
    """Measure at which steps the step reward ranks siblings rightly.

    Misranked pairs, the Jensen gap, what each step decides, the posterior's variance. What was measured is kept: a
    stopped measurement goes on, and more --states or other --steps add to it (docs/jensen.md).

    \b
    Examples:
      tailorpo jensen recipes/emoji_tailorpo.yaml
      tailorpo jensen recipes/emoji_tailorpo.yaml reward.name=colourfulness --states 200 --steps 4,8,12,16
      tailorpo jensen runs/short
    """
    from tailorpo.jensen.command import Job
    from tailorpo.jensen.settings import Sizes

    use_device(device)
    sizes = Sizes(
        states=states,
        continuations=continuations,
        lookahead=lookahead,
        plain_states=plain_states,
        probes=probes,
        batch=batch,
    )
    job = Job.make(recipe, overrides or (), sizes=sizes, steps=steps, base=base, out=out)
    screen = console()
    job.print_cost(screen)
    if not dry_run:
        with display(None) as reporter:
            content = job.measure(reporter)
        job.print_result(content, screen)
