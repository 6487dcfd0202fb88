"""From what both models drew to the content of eval.json: paired means, diversity, and their intervals.

Everything here is arithmetic on numbers and features that are there already; `evaluate.py` draws and writes. What each
number means: docs/evaluation.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tailorpo.meter import Meter, Metric
from tailorpo.statistics import (
    compare,
    paired_means,
    pairwise_distance,
    pairwise_rms,
    plain,
    vendi_score,
    within_spread,
)
from tailorpo.weighted_base import FEWEST, Held, curve, distances, held

if TYPE_CHECKING:
    from tailorpo.run import Run

SCHEMA = 1
CONFIDENCE, RESAMPLES = 0.95, 9999

Group = Literal["seen", "unseen"]
Side = Literal["base", "aligned"]
SIDES: tuple[Side, Side] = ("base", "aligned")


@dataclass
class Drawn:
    """What one model drew for one prompt: an entry per seed, in the order of the seeds."""

    scores: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    features: list[Tensor] = field(default_factory=list[Tensor])
    pixels: list[Tensor] = field(default_factory=list[Tensor])
    thumbnails: list[Image.Image] = field(default_factory=list[Image.Image])


def file_name(prompts: Sequence[tuple[Group, str]], index: int, seed: int) -> str:
    """Of a picture, the same for both models: its prompt's number, group and words, and its seed."""
    group, prompt = prompts[index]
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    return "-".join(part for part in (f"{index:03d}", group, words, f"seed{seed}.png") if part)


@dataclass(frozen=True)
class _Diversity:
    """A measure of the pictures of one prompt; with `good` only of those whose noises gave both models a good one."""

    metric: Metric
    of: Callable[[Drawn], float]
    good: bool = False


_DIVERSITY = {
    "distance": _Diversity(
        Metric("distance between pictures of a prompt", "diversity"),
        lambda cell: pairwise_distance(torch.stack(cell.features)),
    ),
    "distance_good": _Diversity(
        Metric("distance between good pictures of a prompt", "diversity"),
        lambda cell: pairwise_distance(torch.stack(cell.features)) if cell.features else math.nan,
        good=True,
    ),
    "vendi": _Diversity(
        Metric("different pictures of a prompt (Vendi score)", "diversity", "pictures"),
        lambda cell: vendi_score(torch.stack(cell.features)) if len(cell.features) > 1 else math.nan,
    ),
    "pixels": _Diversity(
        Metric("pixel distance between pictures of a prompt", "diversity"),
        lambda cell: pairwise_rms(torch.stack(cell.pixels)),
    ),
}


def _good_on_both_sides(base: Drawn, aligned: Drawn) -> dict[Side, Drawn]:
    """The features of the pictures whose noises gave a good one on either side."""
    both = zip(base.scores["good"], aligned.scores["good"], strict=True)
    seeds = [seed for seed, (first, second) in enumerate(both) if first == second == 1]
    return {
        side: Drawn(features=[cell.features[seed] for seed in seeds])
        for side, cell in zip(SIDES, (base, aligned), strict=True)
    }


def evaluation_result(
    run: Run, prompts: Sequence[tuple[Group, str]], drawn: dict[Side, list[Drawn]], meter: Meter
) -> dict[str, Any]:
    """The content of eval.json, without what only the caller knows.

    Args:
        run: its seed and settings.
        prompts: every one with its group.
        drawn: by model, an entry per prompt.
        meter: that measured them.
    """
    values: dict[str, dict[Side, list[float]]] = {}
    for name in drawn["base"][0].scores:
        means = [paired_means(*(drawn[side][index].scores[name] for side in SIDES)) for index in range(len(prompts))]
        values[name] = {"base": [pair[0] for pair in means], "aligned": [pair[1] for pair in means]}
    for name, diversity in _DIVERSITY.items():
        if not diversity.good:
            values[name] = {side: [diversity.of(cell) for cell in drawn[side]] for side in SIDES}
        elif "good" in drawn["base"][0].scores:
            pairs = [_good_on_both_sides(*cells) for cells in zip(*(drawn[side] for side in SIDES), strict=True)]
            values[name] = {side: [diversity.of(pair[side]) for pair in pairs] for side in SIDES}
    spread = {name: within_spread([cell.scores[name] for cell in drawn["base"]]) for name in drawn["base"][0].scores}
    groups = {"seen": ["seen"], "unseen": ["unseen"], "all": ["seen", "unseen"]}
    members = {
        name: [index for index, (group, _) in enumerate(prompts) if group in wanted] for name, wanted in groups.items()
    }
    return {
        "schema": SCHEMA,
        "settings": {
            "seed": run.seed,
            "seeds": run.eval.seeds,
            "sampler": asdict(run.sampler),
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
            "embedding": meter.embedding,
            "judge": meter.judge.name if meter.judge else None,
            "judge_held_out": meter.held_out,
            "good_threshold": meter.good_threshold,
        },
        "metrics": {
            name: {
                **asdict(_DIVERSITY[name].metric if name in _DIVERSITY else meter.metric(name)),
                "spread": plain(spread.get(name)),
            }
            for name in values
        },
        "groups": {
            name: {
                "prompts": len(indices),
                "pictures": len(indices) * run.eval.seeds,
                "metrics": {metric: _compared(values[metric], indices, seed=run.seed) for metric in values},
                "weighted_base": _weighted_base(drawn["base"], values, indices) if meter.held_out else None,
            }
            for name, indices in members.items()
            if indices
        },
        "prompts": [
            {
                "prompt": prompt,
                "group": group,
                "metrics": {
                    name: {side: plain(sides[side][index]) for side in SIDES} for name, sides in values.items()
                },
                "pictures": [
                    {
                        "seed": seed,
                        **{side: f"samples/eval/{side}/{file_name(prompts, index, seed)}" for side in SIDES},
                        "scores": {
                            name: {side: plain(drawn[side][index].scores[name][seed]) for side in SIDES}
                            for name in drawn["base"][index].scores
                        },
                    }
                    for seed in range(run.eval.seeds)
                ],
            }
            for index, (group, prompt) in enumerate(prompts)
        ],
    }


def _compared(values: dict[Side, list[float]], indices: Sequence[int], *, seed: int) -> dict[str, Any] | None:
    base, aligned = ([values[side][index] for index in indices] for side in SIDES)
    return compare(base, aligned, confidence=CONFIDENCE, resamples=RESAMPLES, seed=seed)


def _weighted_base(
    base: list[Drawn], values: dict[str, dict[Side, list[float]]], indices: Sequence[int]
) -> dict[str, Any] | None:
    """What the base keeps of its diversity when its pictures are weighted until the judge is as good; None without a
    gain's number or enough pictures on every prompt."""
    scores = [torch.tensor(base[index].scores["judge"]).double() for index in indices]
    spread = within_spread([cell.scores["judge"] for cell in base])
    known = [values["judge"][side][index] for side in SIDES for index in indices]
    if min(len(row) for row in scores) < FEWEST or not spread > 0:
        return None
    # A picture that the judge could not score has no weight, and a prompt without a gain no place on the curve.
    if not all(row.isfinite().all() for row in scores) or not all(map(math.isfinite, known)):
        return None
    curves = [
        curve(row.numpy(), distances(torch.stack(base[index].features)), spread=spread)
        for row, index in zip(scores, indices, strict=True)
    ]
    judge, distance = (
        [(values[name]["base"][i], values[name]["aligned"][i]) for i in indices] for name in ("judge", "distance")
    )
    found = held(
        np.stack(curves),
        [after - before for before, after in judge],
        [before for before, _ in distance],
        [after for _, after in distance],
        confidence=CONFIDENCE,
    )
    return None if found is None else _plain(found)


def _plain(found: Held) -> dict[str, Any]:
    return {
        "share": plain(found.share.value),
        "low": plain(found.share.low),
        "high": plain(found.share.high),
        "of_it": plain(found.of_it.value),
        "of_it_low": plain(found.of_it.low),
        "of_it_high": plain(found.of_it.high),
        "effective": plain(found.effective),
        "beyond": found.beyond,
    }
