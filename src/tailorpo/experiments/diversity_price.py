"""How much diversity does a gain of the judge cost, even if nothing else is lost?

The base model weighted by the judge (`weighted_base.py` has the equations), from many pictures of every prompt, and the
trained models of other experiments beside it, each at its own gain on its own prompts. For gains beyond the end of the
curve its last value stands, which is more than the weighted base would keep.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tailorpo.errors import UserError
from tailorpo.experiments.measurement import Lines, Settings, base_policy, described
from tailorpo.experiments.plots import COLOURS, pyplot
from tailorpo.experiments.runner import read_results
from tailorpo.experiments.tables import gains, kept
from tailorpo.meter import Meter
from tailorpo.noise import Noise
from tailorpo.prompts import load_prompts
from tailorpo.rewards import load_scorer
from tailorpo.rollout import sample_images
from tailorpo.statistics import student_interval
from tailorpo.train import Reporter
from tailorpo.weighted_base import STRENGTHS, Array, curve, distances, frontier, price

COMPARED = ("beyond", "hacking", "alarm", "early-alarm")
"""Experiments whose trained models are held against the curve."""
RESAMPLES = 2000


def cost(settings: Settings) -> int:
    """Guided network evaluations of drawing the base's pictures."""
    run = settings.run
    return len(load_prompts(run.prompts)) * settings.sizes["pictures"] * run.sampler.steps


def measure(settings: Settings, folder: Path, reporter: Reporter) -> dict[str, Any]:
    """Draw the base's pictures prompt after prompt, and hold the results of other experiments against them.

    Raises:
        UserError: there is no judge.
    """
    run, pictures = settings.run, settings.sizes["pictures"]
    policy, noise, prompts = base_policy(run), Noise(run.seed), load_prompts(run.prompts)
    if run.eval.judge is None:
        raise UserError("diversity-price weights pictures by the held-out judge, and there is none: set eval.judge")
    device = policy.model.device
    meter = Meter(load_scorer(run.reward, device), run.eval.judge.load(device), held_out=True, device=device)
    lines = Lines(folder / "prompts.jsonl", {**described(settings), "judge": run.to_dict()["eval"]["judge"]})
    done = {row["prompt"] for row in lines.rows}
    reporter.phase("the base model's pictures")
    for number, prompt in enumerate(prompts):
        if prompt not in done:
            keys = [("price", prompt, index) for index in range(pictures)]
            with torch.no_grad(), policy.model.reference():
                images = sample_images(
                    policy, [prompt] * pictures, noise=noise, keys=keys, batch_size=run.eval.batch_size
                )
            scores = meter.scores(images, [prompt] * pictures)["judge"].double().numpy()
            found = curve(scores, distances(meter.features(images)))
            lines.add({"prompt": prompt, "curve": [[float(f"{value:.6g}") for value in row] for row in found]})
        reporter.step(number + 1, len(prompts))
    curves = {row["prompt"]: np.array(row["curve"]) for row in lines.rows}
    return {
        "sizes": dict(settings.sizes),
        "prompts": len(prompts),
        "judge": run.eval.judge.name,
        "curve": _curve(curves, prompts),
        "rows": list(trained(curves, settings.results, run.to_dict()["sampler"])),
    }


def _curve(curves: dict[str, Array], prompts: Sequence[str]) -> list[list[float]]:
    """By strength: it, the judge's gain, the share kept with its 95 % interval, and the effective pictures."""
    rng = np.random.default_rng(0)
    chosen: list[list[int]] = rng.integers(len(prompts), size=(RESAMPLES, len(prompts))).tolist()
    every = np.stack([curves[prompt] for prompt in prompts])
    drawn = [frontier(every[row]) for row in chosen]
    gain, share, effective = frontier(every)
    others = np.stack([np.interp(gain, xs, ys) for xs, ys, _ in drawn])
    low, high = np.quantile(others, (0.025, 0.975), axis=0)
    rows = np.stack([np.array(STRENGTHS[: len(gain)]), gain, share, low, high, effective], axis=1)
    return [[float(f"{value:.5g}") for value in row] for row in rows]


def trained(curves: dict[str, Array], results: Path, sampler: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every variant of the compared experiments whose judge has gained on average, on its own prompts."""
    for name in COMPARED:
        cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for cell in read_results(results / f"{name}.json")["cells"]:
            seen = _seen(cell)
            if cell["settings"]["sampler"] == sampler and seen and set(seen) <= set(curves):
                cells.setdefault((cell["reward"], cell["variant"]), []).append(cell)
        for (reward, variant), runs in sorted(cells.items()):
            found = [
                each for run in sorted(runs, key=lambda cell: cell["seed"]) if (each := _held_against(run, curves))
            ]
            if found and np.mean([each["gain"] for each in found]) > 0:
                yield {"experiment": name, "reward": reward, "variant": variant, "seeds": found}


def _seen(cell: dict[str, Any]) -> list[str]:
    data = cell["evaluation"]
    return [prompt for prompt, group in zip(data["prompts"], data["groups"], strict=True) if group == "seen"]


def _held_against(cell: dict[str, Any], curves: dict[str, Array]) -> dict[str, float] | None:
    """One run's gain and kept share, and what the weighted base keeps at that gain; None without a judge."""
    gain, share = gains([cell], measure="judge"), kept([cell])
    if gain is None or share is None:
        return None
    own = np.stack([curves[prompt] for prompt in _seen(cell)])
    return {
        "seed": cell["seed"],
        "gain": float(f"{gain.mean():.5g}"),
        "kept": float(f"{share:.5g}"),
        "price": float(f"{price(own, float(gain.mean())):.5g}"),
    }


def table(content: dict[str, Any]) -> str:
    """The curve, and the trained models against it."""
    head = ["lambda", "gain of the judge", "distance kept", "effective pictures"]
    lines = [_row(head), _row(["---"] * len(head))]
    for strength, gain, share, low, high, effective in content["curve"]:
        kept_share = f"{100 * share:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
        lines.append(_row([f"{strength:g}", f"{gain:+.3f}", kept_share, f"{effective:.1f}"]))
    intro = (
        f"The base model's pictures weighted by its judge: {content['sizes']['pictures']} of each of"
        f" {content['prompts']} prompts; 95 % intervals over prompts."
    )
    if not content["rows"]:
        return "\n".join([intro, "", *lines]) + "\n"
    head = ["experiment", "trained on", "", "seeds", "judge, gain", "diversity kept", "the weighted base keeps"]
    head.append("of that, mean [interval over seeds]")
    rows = [_row(head), _row(["---"] * len(head))]
    for row in content["rows"]:
        means = [float(np.mean([seed[name] for seed in row["seeds"]])) for name in ("gain", "kept", "price")]
        rows.append(
            _row(
                [
                    row["experiment"],
                    row["reward"],
                    row["variant"],
                    str(len(row["seeds"])),
                    f"{means[0]:+.3f}",
                    *(f"{100 * mean:.0f} %" for mean in means[1:]),
                    _share(row["seeds"]),
                ]
            )
        )
    note = (
        "Seen prompts, two pictures each. Diversity kept: distance between pictures of a prompt, of the base's on the"
        " same noises. The weighted base keeps: the curve over the same prompts at each seed's own gain of the judge."
        " Variants whose judge gained nothing on average are left out."
    )
    return "\n".join([intro, "", *lines, "", *rows, "", note]) + "\n"


def _share(seeds: Sequence[dict[str, float]]) -> str:
    share = student_interval([seed["kept"] / seed["price"] for seed in seeds], confidence=0.95)
    ends = "" if share.low is None or share.high is None else f" [{100 * share.low:.0f}, {100 * share.high:.0f}]"
    return f"{100 * share.value:.0f}{ends} %"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plot(content: dict[str, Any], path: Path) -> None:
    """Share of the diversity against the gain of the judge: the curve, and every seed of the trained models."""
    plt = pyplot()
    _, gain, share, low, high, _ = np.array(content["curve"]).T
    figure, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    axis.plot(gain, share, color="black", linewidth=2, label="the base's pictures, weighted by the judge")
    axis.fill_between(gain, low, high, color="black", alpha=0.12, linewidth=0)
    axis.plot(gain, 0.9 * share, color="black", linewidth=0.8, linestyle=":", label="nine tenths of that")
    for name, colour in zip(COMPARED, COLOURS, strict=False):
        seeds = [seed for row in content["rows"] if row["experiment"] == name for seed in row["seeds"]]
        if seeds:
            xs, ys = ([seed[key] for seed in seeds] for key in ("gain", "kept"))
            axis.plot(xs, ys, "o", color=colour, markersize=4, alpha=0.8, label=f"{name}, one run each")
    axis.axhline(1.0, color="0.7", linewidth=0.8)
    axis.set_xlabel("gain of the judge, seen prompts")
    axis.set_ylabel("distance between pictures of a prompt,\nshare of the base's")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=8, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
