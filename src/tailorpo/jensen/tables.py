"""The tables of a measurement: the same cells for the terminal, for Markdown and for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table.

    Attributes:
        title: above it.
        note: what its columns mean.
        head: of the columns.
        rows: as many cells each.
    """

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def grids(content: Mapping[str, Any]) -> list[Grid]:
    """All tables of a jensen.json."""
    found: list[Grid] = []
    for name, reward in content["rewards"].items():
        found.append(_ranking(name, reward))
    for name, reward in content["rewards"].items():
        rows = [row for row in reward["steps"] if row["bounds"]]
        if rows:
            found.append(_bounds(name, rows))
    if content["posterior"]:
        found.append(_posterior(content["posterior"]))
    return found


def _ranking(name: str, reward: Mapping[str, Any]) -> Grid:
    verdict = reward["verdict"]
    words = {k: word for word in ("reliable", "unreliable", "undecided") for k in verdict[word]}
    return Grid(
        title=f"{name}: does the step reward order siblings as their future does?",
        note="misranked: share of pairs, without the noise of the truth [95 % interval]; V: variance of the final"
        " reward that the step decides, and its share of what all steps decide; gap: root mean square of Q - r(x0hat)"
        " over siblings, of its difference between them, and of Q_1 - Q_2, in the reward's unit",
        head=(
            *("step", "scored at t", "misranked", "correlation", "V", "share", "gap", "its difference"),
            *("Q difference", "lookahead misranks", "rankings"),
        ),
        rows=[
            (
                str(row["k"]),
                "end" if row["scored_at"] is None else str(row["scored_at"]),
                _share(row, "misrank"),
                _value(row, "correlation"),
                _number(row["v"]),
                "-" if row["v_share"] is None else f"{100 * row['v_share']:.1f} %",
                _number(row["gap_rms"]),
                _number(row["gap_difference"]),
                _number(row["signal"]),
                _share(row["lookahead"], "misrank"),
                words[row["k"]],
            )
            for row in reward["steps"]
        ],
    )


def _bounds(name: str, rows: Sequence[Mapping[str, Any]]) -> Grid:
    return Grid(
        title=f"{name}: the Jensen gap and its bounds, without guidance",
        note="gap: mean of r(x_0) - r(x0hat) over trajectories; second order: mean of tr(H Cov) / 2; directional:"
        " standard deviation of the linearised reward; the bounds are means over states with constants measured at"
        " x0hat, so estimates of size and no guarantee; - where the reward has no gradient",
        head=("step", "scored at t", "mean gap", "second order", "directional", "Lipschitz", "smooth"),
        rows=[
            (
                str(row["k"]),
                str(row["scored_at"]),
                _value(row["bounds"], "gap", signed=True),
                _number(row["bounds"]["second"], signed=True),
                *(_number(row["bounds"][key]) for key in ("directional", "lipschitz", "smooth")),
            )
            for row in rows
        ],
    )


def _posterior(rows: Sequence[Mapping[str, Any]]) -> Grid:
    return Grid(
        title="Posterior variance tr Cov[x_0 | x], without guidance",
        note="means over states [95 % interval], in squared units of the latent",
        head=("step", "scored at t", "Jacobian probes", "denoising loss", "increments of x0hat"),
        rows=[
            (
                str(row["k"]),
                str(row["scored_at"]),
                *(_value(row, key) for key in ("probes", "denoising", "increments")),
            )
            for row in rows
        ],
    )


def rich_table(grid: Grid) -> Table:
    """For the terminal."""
    table = Table(*grid.head, box=None, pad_edge=False, title=grid.title, title_justify="left")
    for row in grid.rows:
        table.add_row(*row)
    return table


def markdown(content: Mapping[str, Any]) -> str:
    """The whole measurement as Markdown."""
    parts = [f"# {content['title']}", "", _setting(content), ""]
    for name, reward in content["rewards"].items():
        verdict = reward["verdict"]
        parts += [f"**{name}: {verdict['headline']}.** {' '.join(verdict['sentences'])}", ""]
    for grid in grids(content):
        parts += [f"## {grid.title}", "", f"{grid.note[0].upper()}{grid.note[1:]}.", ""]
        parts += [f"| {' | '.join(grid.head)} |", f"|{' --- |' * len(grid.head)}"]
        parts += [f"| {' | '.join(row)} |" for row in grid.rows] + [""]
    return "\n".join(parts)


def _setting(content: Mapping[str, Any]) -> str:
    sizes, sampler = content["sizes"], content["sampler"]
    return (
        f"{sizes['states']} pairs of siblings a step, {sizes['continuations']} continuations of each with common"
        f" noises, lookahead {sizes['lookahead']}; {sampler['steps']} steps, eta {sampler['eta']:g},"
        f" guidance scale {sampler['guidance_scale']:g}; seed {content['seed']}; {content['weights']}. Without"
        f" guidance: {sizes['plain_states']} trajectories, {sizes['probes']} probes."
    )


def _share(row: Mapping[str, Any], key: str) -> str:
    return f"{100 * row[key]:.1f} % [{100 * row[f'{key}_low']:.0f}, {100 * row[f'{key}_high']:.0f}]"


def _value(row: Mapping[str, Any], key: str, *, signed: bool = False) -> str:
    low, high = row[f"{key}_low"], row[f"{key}_high"]
    text = _number(row[key], signed=signed)
    return text if low is None else f"{text} [{_number(low, signed=signed)}, {_number(high, signed=signed)}]"


def _number(value: float | None, *, signed: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value:+.3g}" if signed else f"{value:.3g}"
