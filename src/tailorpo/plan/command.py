"""The `plan` command: which devices, and how the plan is shown."""

from __future__ import annotations

import json

import torch
import typer
from rich.console import Console

from tailorpo._distributed import pick_device
from tailorpo.errors import UserError
from tailorpo.plan import Estimate, Plan, make_plan, measure_here
from tailorpo.plan.devices import DEVICES
from tailorpo.plan.display import print_plan
from tailorpo.plan.estimate import to_dict
from tailorpo.plan.networks import ARCHITECTURES, Architecture
from tailorpo.run import Run
from tailorpo.settings import did_you_mean

_HERE = ("this", "cpu")


def show_plan(
    run: Run,
    *,
    device: str | None,
    price: float | None,
    efficiency: float | None,
    architecture: str | None,
    measure: bool,
    console: Console | None,
) -> None:
    """Make the plan and print it, as tables or (without a console) as JSON.

    Raises:
        UserError: there is no such device or architecture, or the plan cannot be made.
    """
    if architecture is not None and architecture not in ARCHITECTURES:
        hint = did_you_mean(architecture, ARCHITECTURES)
        raise UserError(f"--architecture {architecture}: known are {', '.join(ARCHITECTURES)}{hint}")
    names = [*DEVICES, *_HERE]
    if device is not None and device not in names:
        raise UserError(f"--device {device}: known are {', '.join(names)}{did_you_mean(device, names)}")
    cpu = device == "cpu" or (device == "this" and pick_device().type == "cpu")
    plan = make_plan(run, architecture=architecture, measure=measure, cpu=cpu)
    estimates = _estimates(plan, device, efficiency=efficiency, architecture=architecture, measure=measure)
    if console is None:
        typer.echo(json.dumps(to_dict(plan, estimates, price=price), indent=2))
    else:
        print_plan(plan, estimates, price=price, console=console)


def _estimates(
    plan: Plan, device: str | None, *, efficiency: float | None, architecture: Architecture | None, measure: bool
) -> list[Estimate]:
    if device in _HERE:
        here = torch.device("cpu") if device == "cpu" else pick_device()
        return [measure_here(plan, here, architecture=architecture, measure=measure)]
    chosen = DEVICES if device is None else {device: DEVICES[device]}
    return [plan.on(each, efficiency=efficiency) for each in chosen.values()]
