"""What the report shows of the sentinels: the state, the curves, and the judge against the KL with its peak."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tailorpo.progress import duration
from tailorpo.report.charts import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Chart,
    Series,
    Tick,
    finite,
    line_chart,
    nice_ticks,
    tick_text,
)
from tailorpo.sentinels.rules import LOW_LEVEL
from tailorpo.sentinels.series import looks

HEADLINES = {
    "ok": ("good", "The last look found nothing."),
    "warning": ("caution", "The last look is a warning."),
    "hacking": ("bad", "The last look is an alarm: the rewards are being fooled, or variety has collapsed."),
}


@dataclass(frozen=True)
class PeakChart:
    """The judge over the root of the KL, look by look; everything is in the drawing's units.

    Attributes:
        path: SVG path data through the looks in their order, from the base model on.
        dots: (x, y, state, text) of each look.
        peak: (x, y, text) of the look with the best judge.
    """

    path: str
    dots: tuple[tuple[float, float, str, str], ...]
    peak: tuple[float, float, str]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def sentinel_section(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What the template needs; None for a run without looks."""
    seen = looks(rows)
    if not seen:
        return None
    tone, headline = HEADLINES[seen[-1]["state"]]
    before = [None, *seen[:-1]]
    return {
        "tone": tone,
        "headline": headline,
        "said": [look for look, last in zip(seen, before, strict=True) if look["reasons"] and _news(look, last)],
        "count": len(seen),
        "charts": _charts(seen),
        "peak": peak_chart(seen),
    }


def _news(look: Mapping[str, Any], before: Mapping[str, Any] | None) -> bool:
    """Whether it says something else than the look before."""
    keys = ("state", "findings", "action")
    return before is None or [look.get(key) for key in keys] != [before.get(key) for key in keys]


def sentinel_cost(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What the looks took, as the report's table of costs has it; without the base's, which no row holds."""
    seen = looks(rows)
    if not seen:
        return []
    forwards = sum(look["cost"]["forwards"] for look in seen)
    pictures = sum(look["cost"]["pictures"] for look in seen)
    seconds = sum(look["seconds"] for look in seen)
    text = f"{forwards:,} network evaluations, {pictures:,} pictures, {duration(seconds)}, not counted above"
    return [(f"sentinels ({len(seen)} looks)", text)]


def _charts(seen: Sequence[Mapping[str, Any]]) -> list[Chart]:
    rows = [{"update": look["update"], "kl": look["kl"], **_changes(look["measures"])} for look in seen]
    start = {name: 1.0 if name in ("distance", "vendi") else 0.0 for name in rows[0] if name != "update"}
    rows.insert(0, {"update": 0, **start})  # the base is what everything is compared with
    tones = ("accent", "good", "bad", "muted")
    drift = [Series(f"drift:{name}", label, tone) for (name, label), tone in zip(LOW_LEVEL.items(), tones, strict=True)]
    zero = (0.0, "base")
    charts = [
        line_chart(rows, [Series("reward", "reward")], title="Trained reward, change", rule=zero, smooth=False),
        line_chart(rows, [Series("judge", "judge")], title="Held-out judge, change", rule=zero, smooth=False),
        line_chart(
            rows,
            [Series("distance", "distance"), Series("vendi", "Vendi score", "muted")],
            title="Diversity, share of the base's",
            rule=(1.0, "base"),
            smooth=False,
        ),
        line_chart(rows, [Series("kl", "KL")], title="KL to the base model", note="nats, all steps", smooth=False),
        line_chart(
            rows,
            drift,
            title="Low-level statistics, drift",
            note="in spreads of the base model's pictures of one prompt",
            rule=zero,
            smooth=False,
        ),
        line_chart(
            rows,
            [Series("disagreement", "disagreement")],
            title="Disagreement of the rewards, change",
            note="share of sibling pictures that two rewards order differently",
            rule=zero,
            smooth=False,
        ),
    ]
    return [chart for chart in charts if chart]


def _changes(measures: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, measure in measures.items():
        change, spread = finite(measure.get("ratio", measure.get("difference"))), finite(measure.get("spread"))
        found[name] = change
        if name in LOW_LEVEL:
            found[f"drift:{name}"] = change / spread if change is not None and spread else None
    return found


def peak_chart(seen: Sequence[Mapping[str, Any]]) -> PeakChart | None:
    """The judge's change against the root of the KL, which a reward's gain is about proportional to; None without a
    judge."""
    points = [
        (math.sqrt(max(0.0, look["kl"])), change, look["state"], f"update {look['update']}")
        for look in seen
        if (change := finite(look["measures"].get("judge", {}).get("difference"))) is not None
    ]
    if not points:
        return None
    points.insert(0, (0.0, 0.0, "ok", "base"))
    y_values = nice_ticks(min(point[1] for point in points), max(point[1] for point in points))
    right = max(point[0] for point in points) or 1.0
    low, high = y_values[0], y_values[-1]

    def x(root: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * root / right, 1)

    def y(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low), 1)

    dots = tuple((x(root), y(value), state, text) for root, value, state, text in points)
    best = max(range(len(points)), key=lambda index: points[index][1])
    # Round numbers of nats, at places that are even in their root.
    nats = [value**2 for value in nice_ticks(0.0, right, count=4) if value <= right]
    return PeakChart(
        path="M" + "L".join(f"{dot[0]} {dot[1]}" for dot in dots),
        dots=dots,
        peak=(dots[best][0], dots[best][1], points[best][3]),
        x_ticks=tuple(
            Tick(x(math.sqrt(value)), f"{value:,.3g}" if value < 1000 else f"{value:,.0f}") for value in nats
        ),
        y_ticks=tuple(Tick(y(value), tick_text(value, y_values)) for value in y_values),
    )
