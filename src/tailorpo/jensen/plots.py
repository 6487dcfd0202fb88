"""A measurement as one picture, for documents: misranking, what each step decides, the gap, the posterior variance."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from tailorpo.experiments.plots import COLOURS, pyplot
from tailorpo.jensen.verdict import THRESHOLD


def picture(content: Mapping[str, Any]) -> bytes:
    """A WebP file.

    Raises:
        UserError: matplotlib is not installed.
    """
    plt = pyplot()
    figure, panels = plt.subplots(1, 4, figsize=(15, 3.4), layout="constrained")
    for index, (name, reward) in enumerate(content["rewards"].items()):
        colour, steps = COLOURS[index % len(COLOURS)], reward["steps"]
        shift = 0.12 * (index - (len(content["rewards"]) - 1) / 2)
        _misranking(panels[0], steps, name, colour=colour, shift=shift)
        shares = [100 * (row["v_share"] or 0.0) for row in steps]
        panels[1].plot([row["k"] for row in steps], shares, color=colour, marker="o", markersize=3, label=name)
        open_ = [row for row in steps if row["signal"] and row["scored_at"] is not None]
        for key, style, words in (("gap_rms", ":", "gap"), ("gap_difference", "-", "its difference")):
            ratios = [row[key] / row["signal"] for row in open_]
            panels[2].plot(
                [row["k"] for row in open_],
                ratios,
                style,
                color=colour,
                marker="o",
                markersize=3,
                label=f"{name}: {words}",
            )
    _posterior(panels[3], content["posterior"])
    panels[0].axhline(50, color="0.6", linewidth=0.8)
    panels[0].axhline(100 * THRESHOLD, color="0.6", linewidth=0.8, linestyle="--")
    panels[2].axhline(1, color="0.6", linewidth=0.8)
    panels[2].set_yscale("log")
    titles = (
        "pairs misranked, % (bars: 95 %)",
        "share of the variance that\nall steps decide, %",
        "in units of the siblings' Q difference",
        "tr Cov[x_0 | x], without guidance",
    )
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("step (noisy to clean)")
        panel.xaxis.get_major_locator().set_params(integer=True)
        if panel is not panels[2] and panel is not panels[3]:
            panel.set_ylim(bottom=0)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False, fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="webp", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def _misranking(panel: Any, steps: Sequence[Mapping[str, Any]], name: str, *, colour: str, shift: float) -> None:
    values = [100 * row["misrank"] for row in steps]
    below = [100 * (row["misrank"] - row["misrank_low"]) for row in steps]
    above = [100 * (row["misrank_high"] - row["misrank"]) for row in steps]
    xs = [row["k"] + shift for row in steps]
    panel.errorbar(xs, values, yerr=[below, above], color=colour, marker="o", markersize=3, label=name)


def _posterior(panel: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    labels = {"probes": "Jacobian probes", "denoising": "denoising loss", "increments": "increments of x0hat"}
    for index, (key, label) in enumerate(labels.items()):
        if rows:
            xs, ys = [row["k"] for row in rows], [row[key] for row in rows]
            panel.plot(xs, ys, color=COLOURS[3 + index], marker="o", markersize=3, label=label)
    if rows:
        panel.set_yscale("log")
