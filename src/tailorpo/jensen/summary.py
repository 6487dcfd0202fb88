"""The content of jensen.json from the measured rows.

    steps      of the score that training ranks by: the reward, or the weighted sum of several
    rewards    the same of every reward, with what its variance is made of and the verdict
    posterior  tr Cov[x_0 | x_{k+1}] of the unguided network, three ways

Of each step at least k, time, v, misrank, misrank_low, misrank_high, correlation and noise_weight, which is |d mean /
d output| / sigma: other parts read these by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tailorpo.jensen.bounds import lipschitz_bound, smooth_bound
from tailorpo.jensen.measure import WALK, Row
from tailorpo.jensen.ranking import (
    RESAMPLES,
    Array,
    Pairs,
    correlation,
    correlation_of_continuations,
    disagreement,
    gap,
    misranking,
    raw_misranking,
    share_of,
    signal,
)
from tailorpo.jensen.verdict import judge
from tailorpo.policy import Policy
from tailorpo.schedule import Schedule
from tailorpo.statistics import Interval, mean_interval, plain

SUM = "weighted sum"


def summarise(
    rows: Sequence[Row],
    *,
    weights: Mapping[str, float],
    steps: Sequence[int],
    states: int,
    plain_states: int,
    policy: Policy,
) -> dict[str, Any]:
    """Sum up the rows of the wanted states and steps; others, of larger measurements, are left alone.

    Args:
        rows: as `measure` wrote them.
        weights: of the rewards, by name.
        steps: wanted.
        states: wanted.
        plain_states: wanted.
        policy: for the schedule, and the weights of the steps.
    """
    schedule, kind = policy.schedule, policy.model.prediction_type
    wanted = {"pairs": states, "posterior": plain_states}
    rows = [row for row in rows if row["state"] < wanted[row["part"]] and row["k"] in (WALK, *steps)]
    rows = sorted(rows, key=lambda row: (row["k"], row["state"]))
    pairs = [row for row in rows if row["part"] == "pairs"]
    behind = [row for row in rows if row["part"] == "posterior"]
    # A reward of weight 0 is measured along and no part of what training ranks by.
    counted = [name for name, weight in weights.items() if weight]
    names = [*weights, *([SUM] if len(counted) > 1 else [])]
    score = SUM if len(counted) > 1 else (counted or list(weights))[0]
    rewards = {name: _reward(name, weights, pairs, behind, steps=steps, schedule=schedule) for name in names}
    for row in (row for reward in rewards.values() for row in reward["steps"]):
        row["noise_weight"] = plain(policy.sampler.noise_weight(schedule, row["k"], kind=kind))
    return {
        "score": score,
        "steps": rewards[score]["steps"],
        "rewards": rewards,
        "posterior": [
            _posterior([row for row in behind if row["k"] == k], k, schedule) for k in steps if _open(k, schedule)
        ]
        if behind
        else [],
    }


def pairs_of(rows: Sequence[Row], weights: Mapping[str, float]) -> Pairs:
    """The pairs of one step under a weighted sum of rewards."""

    def total(key: str) -> Array:
        parts = [weight * np.array([row["rewards"][name][key] for row in rows]) for name, weight in weights.items()]
        return np.sum(parts, axis=0)

    return Pairs(total("guess"), total("ahead"), total("ends"))


def _open(k: int, schedule: Schedule) -> bool:
    return k < schedule.steps - 1


def _reward(
    name: str,
    weights: Mapping[str, float],
    pairs: Sequence[Row],
    behind: Sequence[Row],
    *,
    steps: Sequence[int],
    schedule: Schedule,
) -> dict[str, Any]:
    own = weights if name == SUM else {name: 1.0}
    by_step = {k: pairs_of([row for row in pairs if row["k"] == k], own) for k in steps}
    final = np.array([sum(w * row["rewards"][n] for n, w in own.items()) for row in pairs if row["k"] == WALK])
    # The second-order gap and the bounds of a sum are not those of its parts; they are shown for single rewards.
    single = None if name == SUM else name
    found: list[dict[str, Any]] = [
        {
            "k": k,
            "time": int(schedule.time[k]),
            "scored_at": int(schedule.time[k + 1]) if _open(k, schedule) else None,
            **_step(by_step[k], finished=not _open(k, schedule)),
            "bounds": _bounds(single, behind, k) if single and behind and _open(k, schedule) else None,
        }
        for k in steps
    ]
    variance = float(final.var(ddof=1))
    values = np.array([float(row["v"]) for row in found])
    total = float(np.interp(np.arange(schedule.steps), np.array(steps), values).sum())
    for row in found:
        row["v_share"] = plain(row["v"] / total) if total > 0 else None
    result: dict[str, Any] = {
        "weight": None if name == SUM else weights[name],
        "mean": plain(float(final.mean())),
        "variance": plain(variance),
        "decided_by_denoising": plain(total),
        "interpolated": len(steps) < schedule.steps,
        "steps": found,
        "lookahead_gain": _paired(by_step, schedule),
    }
    return {**result, "verdict": judge(result, last=schedule.steps - 1)}


def _step(pairs: Pairs, *, finished: bool) -> dict[str, Any]:
    """One step's row; of finished pictures the step reward is the truth, so that nothing is left to count."""
    right = Interval(0.0, 0.0, 0.0)
    gaps, linked, ahead = gap(pairs), correlation(pairs, pairs.guess), correlation(pairs, pairs.ahead)
    one, all_ = (correlation_of_continuations(pairs, count) for count in (1, pairs.ends.shape[2]))
    return {
        "pairs": len(pairs.guess),
        **_interval("v", signal(pairs)),
        **_interval("misrank", right if finished else misranking(pairs, pairs.guess)),
        **_interval("misrank_raw", raw_misranking(pairs, pairs.guess)),
        **_interval("correlation", linked),
        "misrank_of_correlation": plain(share_of(linked.value)) if linked else None,
        "reliability": plain(pairs.reliability),
        **_interval("gap", gaps.mean),
        "gap_rms": plain(gaps.rms),
        "gap_difference": plain(gaps.difference),
        "signal": plain(gaps.signal),
        "spread": plain(gaps.spread),
        "lookahead": {
            **_interval("misrank", right if finished else misranking(pairs, pairs.ahead)),
            **_interval("correlation", ahead),
        },
        "correlation_of_one_continuation": plain(one),
        "correlation_of_all_continuations": plain(all_),
    }


def _bounds(name: str, behind: Sequence[Row], k: int) -> dict[str, Any] | None:
    """Of the unguided network: the mean gap and its bounds, means over states. The mean of r(x_0) - r(x0hat(x)) over
    trajectories is that of the gap, so that no continuation is needed."""
    final = {row["state"]: row["rewards"][name] for row in behind if row["k"] == WALK}
    rows = [row for row in behind if row["k"] == k]
    found = _interval("gap", _mean([final[row["state"]] - row["guess"][name] for row in rows]))
    if name not in rows[0]["local"]:
        return {**found, "second": None, "smooth": None, "lipschitz": None, "directional": None}
    local = {key: torch.tensor([row["local"][name][key] for row in rows]) for key in rows[0]["local"][name]}
    trace = torch.tensor([row["trace"] for row in rows]).mean(1).clamp(min=0)
    return {
        **found,
        "second": plain(float(local["second"].mean())),
        "smooth": plain(float(smooth_bound(local["curvature"], trace).mean())),
        "lipschitz": plain(float(lipschitz_bound(local["slope"], trace).mean())),
        # Of the reward linearised at x0hat, whose slope along w . x is 1.
        "directional": plain(float(lipschitz_bound(1.0, local["directional"]).mean())),
    }


def _posterior(rows: Sequence[Row], k: int, schedule: Schedule) -> dict[str, Any]:
    return {
        "k": k,
        "scored_at": int(schedule.time[k + 1]),
        "states": len(rows),
        **_interval("probes", _mean([sum(row["trace"]) / len(row["trace"]) for row in rows])),
        **_interval("denoising", _mean([row["denoising"] for row in rows])),
        **_interval("increments", _mean([row["increments"] for row in rows])),
    }


def _paired(by_step: Mapping[int, Pairs], schedule: Schedule) -> dict[str, Any] | None:
    """Pairs that the step reward misranks and the lookahead does not, less the reverse, as a share: averaged over the
    steps of a state first, since its steps are not independent."""
    wrong = [
        (_wrong(pairs, pairs.guess) - _wrong(pairs, pairs.ahead)) for k, pairs in by_step.items() if _open(k, schedule)
    ]
    if not wrong:
        return None
    return _interval("share", _mean([float(value) for value in np.mean(wrong, axis=0)]))


def _wrong(pairs: Pairs, guess: Array) -> Array:
    return disagreement(guess[:, 0] - guess[:, 1], pairs.true_difference)


def _mean(values: Sequence[float]) -> Interval:
    return mean_interval(values, resamples=RESAMPLES)


def _interval(name: str, found: Interval | None) -> dict[str, float | None]:
    if found is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {name: plain(found.value), f"{name}_low": plain(found.low), f"{name}_high": plain(found.high)}
