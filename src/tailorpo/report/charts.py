"""Line charts as numbers: scales, ticks and SVG paths, which the page's template draws.

A chart has a faint line through the values of every update and a strong one through their centred moving average. Left
out: a plotting library. Its SVG is ten times larger, does not follow the page's colours, and needs a fixed theme.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 350, 10, 184
MAX_POINTS = 400
"""More updates than this are averaged in equal bins before drawing."""


@dataclass(frozen=True)
class Series:
    """A line to draw: a key of metrics.jsonl, what people read, and its colour class in the style sheet."""

    key: str
    label: str
    tone: str = "accent"


@dataclass(frozen=True)
class Line:
    """A drawn line; `raw` and `smooth` are SVG path data, `dot` the only point of a line that has no more."""

    label: str
    tone: str
    raw: str
    smooth: str
    dot: tuple[float, float] | None
    last: str


@dataclass(frozen=True)
class Tick:
    """A mark of an axis: where in the drawing, and its text."""

    at: float
    text: str


@dataclass(frozen=True)
class Chart:
    """Everything the template needs of one chart."""

    title: str
    note: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    rule: Tick | None
    window: int
    data: str


def line_chart(
    rows: Sequence[Mapping[str, Any]],
    series: Sequence[Series],
    *,
    title: str,
    note: str = "",
    rule: tuple[float, str] | None = None,
    always_rule: bool = False,
    smooth: bool = True,
) -> Chart | None:
    """The chart of some keys over "update"; None where no row has a finite number for any of them.

    Args:
        rows: of metrics.jsonl, by update.
        series: what to draw; those without any number are left out.
        title: of the chart.
        note: a line of explanation.
        rule: a horizontal reference line and its name; drawn if it lies within or near the values,
        always_rule: or wherever they lie.
        smooth: whether to add the moving average.
    """
    rows = _binned(rows, [item.key for item in series])
    updates = [float(row["update"]) for row in rows]
    columns = {item.key: [finite(row.get(item.key)) for row in rows] for item in series}
    drawn = [item for item in series if any(value is not None for value in columns[item.key])]
    values = [value for item in drawn for value in columns[item.key] if value is not None]
    if not values:
        return None
    low, high = min(values), max(values)
    if rule and (always_rule or low - 0.5 * (high - low) <= rule[0] <= high + 0.5 * (high - low)):
        low, high = min(low, rule[0]), max(high, rule[0])
    y_values = nice_ticks(low, high)
    low, high = y_values[0], y_values[-1]
    x_values = [value for value in nice_ticks(updates[0], updates[-1], count=5) if value == int(value)]
    window = _window(len(rows)) if smooth else 1

    def x(value: float) -> float:
        span = updates[-1] - updates[0]
        return LEFT + (RIGHT - LEFT) * ((value - updates[0]) / span if span else 0.5)

    def y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * ((value - low) / (high - low) if high > low else 0.5)

    def line(item: Series) -> Line:
        column = columns[item.key]
        known = [(update, value) for update, value in zip(updates, column, strict=True) if value is not None]
        averaged = moving_average(column, window)
        return Line(
            label=item.label,
            tone=item.tone,
            raw=_path(updates, column, x, y),
            smooth=_path(updates, averaged, x, y) if window > 1 else "",
            dot=(round(x(known[0][0]), 1), round(y(known[0][1]), 1)) if len(known) == 1 else None,
            last=short(next(value for value in reversed(averaged) if value is not None)),
        )

    data = {
        "x": updates,
        "left": LEFT,
        "right": RIGHT,
        "lines": [
            {"label": item.label, "values": [v if v is None else float(f"{v:.4g}") for v in columns[item.key]]}
            for item in drawn
        ],
    }
    return Chart(
        title=title,
        note=note,
        lines=tuple(line(item) for item in drawn),
        x_ticks=tuple(Tick(round(x(v), 1), f"{v:,.0f}") for v in x_values if updates[0] <= v <= updates[-1]),
        y_ticks=tuple(Tick(round(y(v), 1), tick_text(v, y_values)) for v in y_values),
        rule=Tick(round(y(rule[0]), 1), rule[1]) if rule and low <= rule[0] <= high else None,
        window=window,
        data=json.dumps(data, separators=(",", ":")),
    )


def short(value: float) -> str:
    """Three digits, without an exponent where people would not write one."""
    scale, suffix = (1e6, "M") if abs(value) >= 1e6 else (1e3, "k") if abs(value) >= 1e4 else (1.0, "")
    return f"{value / scale:.3g}".replace("-", "\u2212") + suffix


def finite(value: object) -> float | None:
    """A number of a metrics row, or None for what is missing, not a number, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def moving_average(values: Sequence[float | None], window: int) -> list[float | None]:
    """Centred mean over `window` neighbours, over those that are there: near the ends the window is cut off."""
    result: list[float | None] = []
    reach = window // 2
    for index, value in enumerate(values):
        near = [other for other in values[max(0, index - reach) : index + reach + 1] if other is not None]
        result.append(None if value is None else sum(near) / len(near))
    return result


def nice_ticks(low: float, high: float, *, count: int = 4) -> list[float]:
    """About `count` round numbers covering [low, high]; the outer ones may lie beyond it."""
    if not high - low > 1e-5 * max(abs(low), abs(high)):  # equal but for rounding
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((factor * power for factor in (1, 2, 2.5, 5) if factor * power >= raw * 0.999), 10 * power)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def tick_text(value: float, ticks: Sequence[float]) -> str:
    """A tick with as many decimals as its neighbours need, thousands as k and millions as M."""
    largest = max(abs(tick) for tick in ticks)
    scale, suffix = (1e6, "M") if largest >= 1e6 else (1e3, "k") if largest >= 1e4 else (1.0, "")
    slack = 1e-3 * (ticks[1] - ticks[0])
    for digits in range(5):
        if all(math.isclose(round(tick / scale, digits) * scale, tick, rel_tol=0, abs_tol=slack) for tick in ticks):
            return f"{value / scale:.{digits}f}{suffix if value else ''}".replace("-", "\u2212")
    apart = (digits for digits in range(2, 12) if len({f"{tick:.{digits}e}" for tick in ticks}) == len(ticks))
    return f"{value:.{next(apart, 12)}e}".replace("-", "\u2212")


def _window(count: int) -> int:
    """An odd number of updates to average over: about a tenth of the run, 1 (nothing) for very short ones."""
    return 1 if count < 8 else min(51, max(3, count // 10)) | 1


def _path(xs: Sequence[float], ys: Sequence[float | None], x: Any, y: Any) -> str:
    parts: list[str] = []
    pen = "M"
    for update, value in zip(xs, ys, strict=True):
        if value is None:
            pen = "M"
        else:
            parts.append(f"{pen}{x(update):.1f} {y(value):.1f}")
            pen = "L"
    return "".join(parts) if len(parts) > 1 else ""


def _binned(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[Mapping[str, Any]]:
    if len(rows) <= MAX_POINTS:
        return list(rows)
    size = -(-len(rows) // MAX_POINTS)
    binned: list[Mapping[str, Any]] = []
    for first in range(0, len(rows), size):
        group = rows[first : first + size]
        merged: dict[str, Any] = {"update": group[-1]["update"]}
        for key in keys:
            values = [value for row in group if (value := finite(row.get(key))) is not None]
            merged[key] = sum(values) / len(values) if values else None
        binned.append(merged)
    return binned
