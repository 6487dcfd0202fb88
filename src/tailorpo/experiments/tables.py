"""The tables of a grid as Markdown, from its results alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np

from tailorpo.experiments.alarms import alarm_table
from tailorpo.experiments.grid import Grid
from tailorpo.experiments.held import held_table
from tailorpo.experiments.statistics import Estimate, Matrix, improvement, iqm, mean

Cells = Sequence[dict[str, Any]]


def by_variant(grid: Grid, cells: Cells, reward: str) -> dict[str, list[dict[str, Any]]]:
    """The finished cells of one reward, in the order of the grid's variants."""
    found = {
        variant.name: [cell for cell in cells if cell["variant"] == variant.name and cell["reward"] == reward]
        for variant in grid.variants
    }
    return {name: sorted(rows, key=lambda cell: cell["seed"]) for name, rows in found.items() if rows}


def gains(cells: Cells, *, measure: str = "reward", group: str = "seen", side: str | None = None) -> Matrix | None:
    """Aligned minus base (or one side alone) of every seed and prompt, (S, P); None where it was not measured.

    Prompts that lack a number in any cell are left out of all.
    """
    rows: list[list[float]] = []
    for cell in cells:
        data = cell["evaluation"]
        if measure not in data["measures"]:
            return None
        sides = data["measures"][measure]
        values = sides[side] if side else [_minus(a, b) for a, b in zip(sides["aligned"], sides["base"], strict=True)]
        rows.append([_number(v) for v, own in zip(values, data["groups"], strict=True) if group in (own, "all")])
    matrix = np.array(rows, dtype=np.float64)
    matrix = matrix[:, np.isfinite(matrix).all(axis=0)]
    return matrix if matrix.size else None


def kept(cells: Cells, *, measure: str = "distance", group: str = "seen") -> float | None:
    """Diversity of the aligned models as a share of the base's."""
    aligned, base = (gains(cells, measure=measure, group=group, side=side) for side in ("aligned", "base"))
    return None if aligned is None or base is None or not base.mean() > 0 else float(aligned.mean() / base.mean())


def grid_tables(grid: Grid, content: dict[str, Any]) -> str:
    """Everything about a grid's results in Markdown: one table per reward, and comparisons with the reference."""
    cells: Cells = content["cells"]
    parts = [_provenance(grid, content)]
    for reward in grid.seeds:
        rows = by_variant(grid, cells, reward)
        if rows:
            parts.append(f"### {reward}\n\n{_reward_table(grid, rows)}")
            parts += [part for part in (_comparison(grid, rows), alarm_table(rows), held_table(rows)) if part]
    return "\n\n".join(parts) + "\n"


def variant_table(grid: Grid, content: dict[str, Any], names: Sequence[str], rewards: Sequence[str]) -> str | None:
    """The main numbers of some variants for other pages, a row for each and every reward; None where there are none."""
    head = ["", "trained on", "seeds", "its gain, seen prompts (IQM)", "judge, gain", "diversity kept", "KL, nats"]
    head += ["F", "B", "R"]
    lines = [_row(head), _row(["---"] * len(head))]
    for reward in rewards:
        rows = by_variant(grid, content["cells"], reward)
        for name, cells in rows.items():
            if name not in names:
                continue
            seen, diversity = gains(cells), kept(cells)
            spent = (fmean(cell[key] for cell in cells) for key in ("forwards", "backwards", "reward_queries"))
            lines.append(
                _row(
                    [
                        name,
                        f"`{reward}`",
                        str(len(cells)),
                        interval(None if seen is None else iqm(seen)),
                        interval(_mean(gains(cells, measure="judge"))),
                        "-" if diversity is None else f"{100 * diversity:.0f} %",
                        _kl(cells),
                        *(f"{number:,.0f}" for number in spent),
                    ]
                )
            )
    return None if len(lines) == 2 else "\n".join(lines)


def _hours(cells: Cells, processor: str) -> str:
    """What the runs took together on every kind of device."""
    minutes: dict[str, float] = {}
    for cell in cells:
        device = cell.get("device", "cpu")
        minutes[device] = minutes.get(device, 0.0) + cell["minutes"]
    places = {device: f"one {device} that runs shared" for device in minutes} | {"cpu": f"one core each ({processor})"}
    return " and ".join(
        f"{spent / 60:.1f} hours in all on {places[device]}" for device, spent in (minutes or {"cpu": 0.0}).items()
    )


def _provenance(grid: Grid, content: dict[str, Any]) -> str:
    cells: Cells = content["cells"]
    counts = ", ".join(f"{reward}: {sum(cell['reward'] == reward for cell in cells)} runs" for reward in grid.seeds)
    own = [cell for cell in cells if "from" not in cell]
    shared = Counter(cell["from"] for cell in cells if "from" in cell)
    taken = "".join(f", {count} of them those of `{name}`" for name, count in sorted(shared.items()))
    lines = [
        f"Budget: {grid.budget:,} guided network evaluations of training per run. {counts}{taken};"
        f" {_hours(own, content['environment']['processor'])}.",
    ]
    tuned = content.get("tuned")
    if any(variant.tuned for variant in grid.variants):
        lines.append(
            "Settings: what tuning found best: "
            + "; ".join(f"{name}: {' '.join(overrides)}" for name, overrides in tuned.items())
            + "."
            if tuned
            else "Settings: those of the recipes; nothing had been tuned."
        )
    if content.get("overrides"):
        lines.append(f"Every run with {' '.join(content['overrides'])}.")
    return "\n".join(lines)


def _reward_table(grid: Grid, rows: dict[str, list[dict[str, Any]]]) -> str:
    head = ["", "seeds", "reward", "gain, seen prompts (IQM)", "gain, unseen (mean)", "judge, gain", "good pictures"]
    head += ["diversity kept", "KL, nats", "F", "B", "R", "min"]
    queries, per_query = _at_equal_queries(rows)
    head.insert(-4, f"gain at {queries:,} queries")
    lines = [_row(head), _row(["---"] * len(head))]
    every = [cell for cells in rows.values() for cell in cells]
    base = gains(_one_per_seed(every), side="base")
    if base is not None:
        good = gains(_one_per_seed(every), measure="good", side="base")
        cells = [
            "base",
            "",
            f"{base.mean():.3f}",
            "",
            "",
            "",
            "" if good is None else f"{100 * good.mean():.0f} %",
            "100 %",
        ]
        lines.append(_row([*cells, "0", "", "0", "0", "0", ""]))
    for name, cells in rows.items():
        seen, aligned = gains(cells), gains(cells, side="aligned")
        good, diversity = gains(cells, measure="good", side="aligned"), kept(cells)
        lines.append(
            _row(
                [
                    name,
                    str(len(cells)),
                    "-" if aligned is None else f"{aligned.mean():.3f}",
                    interval(None if seen is None else iqm(seen)),
                    interval(_mean(gains(cells, group="unseen"))),
                    interval(_mean(gains(cells, measure="judge"))),
                    "-" if good is None else f"{100 * good.mean():.0f} %",
                    "-" if diversity is None else f"{100 * diversity:.0f} %",
                    _kl(cells),
                    f"{per_query[name]:+.3f}",
                    *(
                        f"{fmean(cell[key] for cell in cells):,.0f}"
                        for key in ("forwards", "backwards", "reward_queries")
                    ),
                    f"{fmean(cell['minutes'] for cell in cells):.1f}",
                ]
            )
        )
    alone = {cell.get("device", "cpu") for cell in every} == {"cpu"}
    note = (
        "\n\nReward, gain and judge: means over 4 pictures a prompt, gains against the base model on the same noises;"
        " 95 % intervals over training seeds and prompts (over prompts alone where there is one seed). Gain at equal"
        " reward queries: of the learning curves, linear between their points. F: guided network evaluations of the"
        f" training; B: backward passes; R: reward queries; min: minutes{' on one core' if alone else ''}, with"
        " the evaluation."
    )
    pictures = every[0]["evaluation"]["pictures"]
    return "\n".join(lines) + note.replace("4 pictures", f"{pictures} pictures")


def _comparison(grid: Grid, rows: dict[str, list[dict[str, Any]]]) -> str | None:
    reference = rows.get(grid.reference or "")
    if reference is None or len(rows) < 2 or max(map(len, rows.values())) < 2:
        return None
    head = [f"{grid.reference} against", "difference of the gain", "P(improvement)", "seeds won", "judge, difference"]
    head += ["F to its final reward", "as a share of its F"]
    lines = [_row(head), _row(["---"] * len(head))]
    for name, cells in rows.items():
        if name == grid.reference:
            continue
        shared = sorted({cell["seed"] for cell in cells} & {cell["seed"] for cell in reference})
        if not shared:
            continue
        ours, theirs = ([cell for cell in each if cell["seed"] in shared] for each in (reference, cells))
        difference = _difference(ours, theirs, "reward")
        first, second = gains(ours), gains(theirs)
        if difference is None or first is None or second is None:
            continue
        lines.append(
            _row(
                [
                    name,
                    interval(mean(difference)),
                    interval(improvement(first, second), signed=False),
                    f"{int((difference.mean(1) > 0).sum())} of {len(shared)}",
                    interval(_mean(_difference(ours, theirs, "judge"))),
                    *_reached(ours, theirs),
                ]
            )
        )
    note = (
        f"\n\nThe last columns: after how many evaluations {grid.reference}'s learning curve reaches the value at which"
        " the other's ends; of the curves' means over seeds, in brackets the extremes of single seeds; linear between"
        " the curve's points."
    )
    return "\n".join(lines) + note


def curve(cells: Cells, axis: str) -> tuple[Matrix, Matrix]:
    """The learning curves of the seeds, (S, points): what was spent, and the mean reward of plain samples."""
    spent, reward = (np.array([[point[key] for point in cell["curve"]] for cell in cells]) for key in (axis, "reward"))
    return spent.astype(np.float64), reward.astype(np.float64)


def first_crossing(spent: Matrix, reward: Matrix, level: float) -> float | None:
    """What had been spent when a curve, linear between its points, first reached a level; None if it never did."""
    if reward[0] >= level:
        return float(spent[0])
    for i in range(1, len(reward)):
        if reward[i] >= level:
            share = (level - reward[i - 1]) / (reward[i] - reward[i - 1])
            return float(spent[i - 1] + share * (spent[i] - spent[i - 1]))
    return None


def _reached(ours: Cells, theirs: Cells) -> list[str]:
    """After how many evaluations our curve reaches the end of theirs, and as a share of what they had spent."""
    spent, reward = curve(ours, "forwards")
    other_spent, other_reward = curve(theirs, "forwards")
    level = float(other_reward[:, -1].mean())
    at = first_crossing(spent.mean(0), reward.mean(0), level)
    if level <= other_reward[:, 0].mean():
        return ["it ends below the base", "-"]
    if at is None:
        return ["not reached", "-"]
    single = [first_crossing(s, r, float(end)) for s, r, end in zip(spent, reward, other_reward[:, -1], strict=True)]
    shares = [None if s is None else s / t for s, t in zip(single, other_spent[:, -1], strict=True)]
    known = [share for share in shares if share is not None]
    missed = f", {len(shares) - len(known)} of {len(shares)} seeds never" if len(known) < len(shares) else ""
    spread = f" ({min(known):.2f} to {max(known):.2f}{missed})" if known else ""
    return [f"{at:,.0f}", f"{at / float(other_spent[:, -1].mean()):.2f}{spread}"]


def _at_equal_queries(rows: dict[str, list[dict[str, Any]]]) -> tuple[int, dict[str, float]]:
    """The reward queries that every method has made, and the mean gain of each learning curve there."""
    curves = {name: curve(cells, "reward_queries") for name, cells in rows.items()}
    queries = min(float(spent[:, -1].min()) for spent, _ in curves.values())
    found: dict[str, float] = {}
    for name, (spent, reward) in curves.items():
        there: list[Any] = [np.interp(queries, s, r) for s, r in zip(spent, reward, strict=True)]
        found[name] = fmean(there) - float(reward[:, 0].mean())
    return int(queries), found


def _difference(ours: Cells, theirs: Cells, measure: str) -> Matrix | None:
    """Paired by seed and prompt, on the same noises."""
    first, second = (gains(each, measure=measure, side="aligned") for each in (ours, theirs))
    return None if first is None or second is None or first.shape != second.shape else first - second


def _kl(cells: Cells) -> str:
    values = [cell["kl"] for cell in cells if cell["kl"] is not None]
    return f"{fmean(values):,.1f}" if values else "-"


def _one_per_seed(cells: Cells) -> list[dict[str, Any]]:
    return list({cell["seed"]: cell for cell in cells}.values())


def _mean(values: Matrix | None) -> Estimate | None:
    return None if values is None else mean(values)


def interval(estimate: Estimate | None, *, signed: bool = True) -> str:
    """+0.31 [+0.22, +0.40]."""
    if estimate is None:
        return "-"
    form = "+.3f" if signed else ".2f"
    text = format(estimate.value, form)
    return text if estimate.low is None else f"{text} [{format(estimate.low, form)}, {format(estimate.high, form)}]"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _number(value: float | None) -> float:
    return np.nan if value is None else value
