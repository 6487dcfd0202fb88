"""A plan as tables for people."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from tailorpo.plan.estimate import HEADROOM, Estimate, Plan, Work

_WHAT = {
    "forward": "network with classifier-free guidance, one latent",
    "reference forward": "the same, adapter off",
    "backward": "back to the adapter, for the loss",
    "input gradient": "back to a latent, for reward guidance",
    "text": "text encoder, one prompt; once",
    "decode": "VAE decoder, one picture",
    "decode gradient": "back through the decoder",
    "draft decode": "tiny VAE, one picture on the way",
    "draft decode gradient": "back through the tiny VAE",
    "reward": "one picture",
    "reward gradient": "back through the reward",
    "judge": "one picture",
}


def print_plan(plan: Plan, estimates: list[Estimate], *, price: float | None, console: Console) -> None:
    """Work, memory, time, and what stands behind them."""
    run = plan.run
    console.print(
        f"{plan.network}, {plan.picture} x {plan.picture} pixels, {run.model.dtype}; {run.algorithm.name}, "
        f"{run.updates:,} updates of {run.batch.trajectories} trajectories, {run.batch.micro} at once",
        highlight=False,
    )
    console.print(_work_table(plan))
    console.print(_memory_table(plan))
    console.print(_device_table(plan, estimates, price=price))
    shares = next((each.efficiency for each in estimates if each.efficiency), None)
    lines = list(plan.assumptions)
    if shares:
        lines.append(
            f"a device reaches {shares['bfloat16']:.0%} of its peak in half precision and {shares['float32']:.0%} in "
            "float32; --efficiency says otherwise, --device this measures (docs/plan.md)"
        )
    lines.append(f"fits: the total is at most {HEADROOM:.0%} of the device's memory")
    for title, notes in (("Assumed", lines), ("Not counted", plan.not_counted)):
        console.print(f"\n{title}", style="bold")
        for note in notes:
            console.print(f"  - {note}", highlight=False, markup=False)


def _work_table(plan: Plan) -> Table:
    table = _table("Operations (multiply-add = 2)")
    whole = plan.operations("training") + plan.operations("evaluation") + plan.operations("once")
    batch = plan.run.batch.trajectories
    table.add_column("")
    for name in ("per trajectory", "each", "per update", "run", "share"):
        table.add_column(name, justify="right")
    table.add_column("")
    for phase, title in (("training", ""), ("evaluation", "evaluation: "), ("once", "")):
        for work in plan.work:
            if work.phase == phase and work.count:
                run = _in_run(plan, work)
                training = phase == "training"
                table.add_row(
                    f"{title}{work.kind}",
                    f"{work.count:g}" if training else "",
                    operations(work.operations),
                    operations(work.total * batch) if training else "",
                    operations(run),
                    f"{run / whole:.1%}",
                    _WHAT[work.kind],
                )
    per_update = sum(work.total for work in plan.work if work.phase == "training") * batch
    table.add_row("all", "", "", operations(per_update), operations(whole), "", "", style="bold")
    return table


def _in_run(plan: Plan, work: Work) -> float:
    return work.total * (plan.trajectories if work.phase == "training" else 1)


def _memory_table(plan: Plan) -> Table:
    table = _table("Memory at its peak")
    table.add_column("")
    table.add_column("", justify="right")
    for name, size in plan.memory.items():
        table.add_row(name, size_text(size))
    table.add_row("total", size_text(plan.peak_bytes), style="bold")
    for name, size in plan.moments.items():
        table.add_row(f"  activations of {name}", size_text(size), style="dim")
    return table


def _device_table(plan: Plan, estimates: list[Estimate], *, price: float | None) -> Table:
    table = _table("Time")
    for name in ("device", "training", "evaluation", "total", *(["cost"] if price is not None else []), "fits"):
        table.add_column(name, justify="left" if name == "device" else "right")
    for each in estimates:
        fits = {True: "yes", False: "no", None: "?"}[each.fits]
        name = f"{each.device.name} (measured)" if each.device.measured else each.device.name
        if each.problem:
            table.add_row(name, each.problem, "", "", *([""] if price is not None else []), fits)
            continue
        money = [] if price is None else [f"{each.total * price:,.2f}"]
        hours = (each.hours["training"], each.hours["evaluation"] + each.hours["once"], each.total)
        table.add_row(name, *(duration(3600 * one) for one in hours), *money, fits)
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)


def operations(number: float) -> str:
    """1.61e12 as "1.61 T"."""
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if number < 1000 or unit == "E":
            break
        number /= 1000
    return f"{number:.3g} {unit}".rstrip() if number < 100 else f"{number:,.0f} {unit}".rstrip()


def size_text(size: float) -> str:
    """Bytes as "2.13 GB"."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 96 * 3600 else f"{seconds / 86400:,.1f} days"
