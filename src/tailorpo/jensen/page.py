"""jensen.html: the measurement as one self-contained page, in the style of a run's report and without its script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import tailorpo.report
from tailorpo.jensen.tables import grids
from tailorpo.jensen.verdict import THRESHOLD
from tailorpo.report.charts import Chart, Series, line_chart


def render(content: Mapping[str, Any]) -> str:
    """The page of a jensen.json."""
    pages = Environment(
        loader=PackageLoader("tailorpo", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = (Path(tailorpo.report.__file__).parent / "style.css").read_text(encoding="utf-8")
    return pages.get_template("jensen.html.j2").render(
        content=content,
        score=content["rewards"][content["score"]],
        charts={name: _charts(reward) for name, reward in content["rewards"].items()},
        posterior=_chart(
            content["posterior"],
            [
                Series("probes", "Jacobian probes"),
                Series("denoising", "denoising loss", "good"),
                Series("increments", "increments", "bad"),
            ],
            title="Posterior variance",
            note="tr Cov[x_0 | x] of the unguided network",
        ),
        grids=grids(content),
        style=Markup(style),
    )


def _charts(reward: Mapping[str, Any]) -> list[Chart]:
    steps: Sequence[Mapping[str, Any]] = reward["steps"]
    rows = [
        {
            **row,
            "percent": 100 * row["misrank"],
            "low": 100 * row["misrank_low"],
            "high": 100 * row["misrank_high"],
            "share": None if row["v_share"] is None else 100 * row["v_share"],
        }
        for row in steps
    ]
    found = [
        _chart(
            rows,
            [Series("percent", "misranked"), Series("low", "95 % from", "muted"), Series("high", "to", "muted")],
            title="Pairs misranked, %",
            rule=(100 * THRESHOLD, "reliable below"),
        ),
        _chart(
            rows,
            [Series("share", "V / sum of V")],
            title="What the step decides, %",
            note="share of the variance of the final reward that all steps decide",
        ),
        _chart(
            [row for row in rows if row["scored_at"] is not None],
            [
                Series("gap_rms", "gap", "muted"),
                Series("gap_difference", "its difference", "bad"),
                Series("signal", "Q difference", "good"),
            ],
            title="Gap and signal",
            note="root mean squares; a ranking turns where the gap's difference exceeds that of Q",
        ),
    ]
    return [chart for chart in found if chart]


def _chart(
    rows: Sequence[Mapping[str, Any]],
    series: Sequence[Series],
    *,
    title: str,
    note: str = "",
    rule: tuple[float, str] | None = None,
) -> Chart | None:
    """By step: what a run's charts call an update."""
    by_step = [{**row, "update": row["k"]} for row in rows]
    if not by_step:
        return None
    return line_chart(by_step, series, title=title, note=note, rule=rule, always_rule=rule is not None, smooth=False)
