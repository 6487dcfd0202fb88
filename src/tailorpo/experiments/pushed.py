"""What happens when a reward is pushed until it breaks? (the paper's Figure 11)

One long training run with JPEG compressibility, whose optimum is an empty picture, evaluated again and again on the
same prompts and noises: the trained reward, the judge that training never sees, diversity within a prompt, and the
exact KL of a trajectory, with the pictures of a few prompts at every evaluation. It goes on where it was stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tailorpo.evaluate import evaluate
from tailorpo.experiments.cell import marks, per_prompt, sampler_kl
from tailorpo.experiments.measurement import Settings
from tailorpo.experiments.plots import COLOURS, pyplot
from tailorpo.experiments.statistics import Estimate, mean
from tailorpo.experiments.tables import gains, interval
from tailorpo.noise import Noise
from tailorpo.prompts import load_prompts
from tailorpo.rundir import RUN, RunDirectory
from tailorpo.statistics import plain
from tailorpo.train import Reporter, train

POINTS, SHOWN = "points.json", 6
"""How many prompts are shown."""


def cost(settings: Settings) -> int:
    """Guided network evaluations of the training and of all evaluations."""
    run, sizes = settings.run, settings.sizes
    steps, algorithm = run.sampler.steps, run.algorithm
    spent = algorithm.cost(steps, algorithm.trained_steps(steps, noise=Noise(run.seed), update=0))
    prompts = len(load_prompts(run.prompts))
    training = sizes["updates"] * run.batch.trajectories * (spent.forwards + 2 * spent.backwards)
    return training + sizes["points"] * steps * prompts * (2 * run.eval.seeds + 2)


def measure(settings: Settings, folder: Path, reporter: Reporter) -> dict[str, Any]:
    """Train from evaluation to evaluation."""
    torch.set_num_threads(1)
    run = replace(settings.run, updates=settings.sizes["updates"])
    place = folder / "run"
    if (place / RUN).is_file() and RunDirectory.open(place).run != run:
        shutil.rmtree(place)
    directory = RunDirectory.open(place) if (place / RUN).is_file() else RunDirectory.create(place, run)
    points: list[dict[str, Any]] = directory.read_json(POINTS) if (place / POINTS).is_file() else []
    with directory.lock():
        for mark in marks(run.updates, settings.sizes["points"]):
            if mark in {point["update"] for point in points}:
                continue
            model = train(replace(run, updates=mark), directory, reporter=reporter)
            evaluation = evaluate(run, directory, model, reporter=reporter)
            row = directory.metrics()[-1]
            kept = directory.path / "kept" / f"{mark:06d}"
            kept.mkdir(parents=True, exist_ok=True)
            for side in ("base", "aligned"):
                _strip(evaluation, directory.path, side).save(kept / f"{side}.png")
            points.append(
                {
                    "update": mark,
                    "forwards": row["forwards"],
                    "reward_queries": row["reward_queries"],
                    "kl": sampler_kl(run, model),
                    "evaluation": per_prompt(evaluation),
                }
            )
            directory.write_json(POINTS, points)
    return {
        "sizes": dict(settings.sizes),
        "reward": run.reward[0].reward.name,
        "overrides": run.to_dict()["algorithm"],
        "pictures": str(place / "kept"),
        "points": [_numbers(point) for point in points],
    }


def _strip(evaluation: dict[str, Any], folder: Path, side: str) -> Image.Image:
    """The first pictures of a few prompts, side by side."""
    rows = evaluation["prompts"][:: max(1, len(evaluation["prompts"]) // SHOWN)][:SHOWN]
    pictures = [Image.open(folder / row["pictures"][0][side]).convert("RGB") for row in rows]
    strip = Image.new("RGB", (sum(picture.width + 2 for picture in pictures), pictures[0].height + 2), "white")
    for index, picture in enumerate(pictures):
        strip.paste(picture, (index * (picture.width + 2), 0))
    return strip


MEASURES = {
    "reward": "trained reward",
    "judge": "judge",
    "distance": "diversity (distance within a prompt)",
    "good": "share of good pictures",
}


def _numbers(point: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {key: point[key] for key in ("update", "forwards", "reward_queries", "kl")}
    for name in MEASURES:
        gain, base = (gains([point], measure=name, group="all", side=side) for side in (None, "base"))
        if gain is not None and base is not None:
            change = mean(gain)
            found[name] = [plain(float(base.mean())), plain(change.value), plain(change.low), plain(change.high)]
    return found


def table(content: dict[str, Any]) -> str:
    """One row per evaluation."""
    names = [name for name in MEASURES if all(name in point for point in content["points"])]
    head = ["update", "F", *(f"{MEASURES[name]}, change" for name in names), "KL, nats"]
    first = content["points"][0]
    start = ["0", "0", *(f"base {first[name][0]:.3f}" for name in names), "0"]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), start)]
    for point in content["points"]:
        changes = [interval(Estimate(*point[name][1:], seeds=1)) for name in names]
        cells = [str(point["update"]), f"{point['forwards']:,}", *changes, f"{point['kl']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    note = "One training run; intervals: 95 % over prompts, against the base model on the same noises."
    return "\n".join([f"Trained on {content['reward']}. {note}", "", *lines]) + "\n"


def plot(content: dict[str, Any], path: Path) -> None:
    """The measures against the evaluations, and the pictures of base and aligned model below each other."""
    plt = pyplot()
    points = content["points"]
    names = [name for name in MEASURES if all(name in point for point in points)]
    strips = _pictures(content)
    figure = plt.figure(figsize=(12, 2.8 + 0.75 * len(strips)), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.8, max(0.1, 0.75 * len(strips))])
    panels = top.subplots(1, len(names) + 1)
    xs = [0, *(point["forwards"] / 1000 for point in points)]
    for panel, name, colour in zip(panels, names, COLOURS, strict=False):
        base = points[0][name][0]
        panel.plot(xs, [base, *(base + point[name][1] for point in points)], color=colour, marker="o", markersize=3)
        lows, highs = ([base, *(base + _known(point[name], at) for point in points)] for at in (2, 3))
        panel.fill_between(xs, lows, highs, color=colour, alpha=0.2)
        panel.set_title(MEASURES[name], fontsize=8)
    panels[-1].plot(xs, [0, *(point["kl"] for point in points)], color="black", marker="o", markersize=3)
    panels[-1].set_title("KL of a trajectory, nats", fontsize=8)
    for panel in panels:
        panel.set_xlabel("guided evaluations, thousands", fontsize=7)
        panel.tick_params(labelsize=7)
    rows = bottom.subplots(max(1, len(strips)), 1, squeeze=False)[:, 0]
    for axis in rows:
        axis.set_axis_off()
    for axis, (label, strip) in zip(rows, strips.items(), strict=False):
        axis.imshow(strip)
        axis.text(-0.01, 0.5, label, transform=axis.transAxes, ha="right", va="center", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _known(values: Sequence[float | None], at: int) -> float:
    """An end of an interval; where there is none, its middle."""
    end, middle = values[at], values[1]
    return end if end is not None else middle if middle is not None else 0.0


def _pictures(content: dict[str, Any]) -> dict[str, Image.Image]:
    """The base's strip and four of the aligned model's, if they are still there."""
    folder = Path(content["pictures"])
    updates = [point["update"] for point in content["points"]]
    chosen = sorted({updates[round(i * (len(updates) - 1) / 3)] for i in range(4)})
    files = {"base": folder / f"{updates[0]:06d}" / "base.png"}
    files |= {f"update {update}": folder / f"{update:06d}" / "aligned.png" for update in chosen}
    return {label: Image.open(file).convert("RGB") for label, file in files.items() if file.is_file()}
