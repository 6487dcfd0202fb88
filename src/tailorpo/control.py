"""What changes about an algorithm from update to update: beta by the pairs so far, and the controller of a KL target.

`adapted` puts the numbers of an update in place before it, `observe` looks at its figures after it. Everything between
is in `Session.memory`: it goes with checkpoints, is equal in all processes, and depends on neither the size of a micro
batch nor on who drew what.

**beta: auto.** With soft labels sigmoid(gap / tau) and a locally linear reward step t of the policy comes to rest at

    KL_t = s_t^2 / (4 (beta tau)^2),        s_t: root mean square of the gap between siblings

so a trajectory has kl_target nats at beta = sqrt(sum_t s_t^2 / (4 kl_target)) / tau. s_t is seen at the trained steps;
an untrained step takes that of the nearest. Under normalised step weights beta is divided by the step's weight w_t, so
w_t s_t takes the place of s_t. Before the first gaps are seen their sum of squares is taken to be tau^2.

**kl_target, soft labels.** The controller moves beta (KL ~ beta^-2):

    log beta += (g / 2) clip(log(KL / kl_target), -1/2, 1/2)       where |log(KL / kl_target)| > deadband

**kl_target, hard labels.** beta is no knob: the loss has no fixed point and beta sets a speed. With lambda KL_t added
there is one, and the controller moves lambda, which acts on the last two steps, too, where most nats are:

    log lambda = log lambda_0 + I + p clip(e + d de, a, b),     e = log(KL / kl_target),     I += i clip(e, -1, 1)

with de the change of e in the last update. The proportional part makes the penalty steeper than linear around the
target, which holds the KL while I is on its way. The part in de looks d updates ahead: Adam's momentum carries a policy
on for some ten updates after lambda has changed, and without it the KL swings.

KL is that of a trajectory's steps to the base model, averaged over the last updates. On the way up to the target,
while it grows fast enough to arrive soon, the integral waits, or it would take the start for a loss that is too tight.

The clipped step is that of Ziegler et al. 2019 (arXiv 1909.08593), in logarithms. Left out: beta from the margins of a
batch (beta-DPO) or of a pair (epsilon-DPO), which follow the quality of the data and not the KL; and a beta of each
step's own, which changes the objective, since the KL of a trajectory is a plain sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from tailorpo.algorithms.base import Algorithm
from tailorpo.algorithms.d3po import D3PO
from tailorpo.algorithms.spo import SPO
from tailorpo.algorithms.tailorpo import TailorPO
from tailorpo.policy import Policy

Memory = dict[str, list[float]]
GAIN, CLIP, DEADBAND = 0.2, 0.5, 0.1
"""For beta: g, and the largest and the smallest |log(KL / target)| that are answered."""
PROPORTIONAL, AHEAD, LOOSEST, TIGHTEST, LARGEST_CHANGE = 1.5, 2.0, -1.0, 2.0, 0.3
"""For the penalty: p, d, a, b, and the largest |de| that is believed."""
START = 0.4
"""For the penalty: lambda_0 in units of beta / sqrt(kl_target), at which guided pairs on the miniature come near."""
INTEGRAL_GAIN, INTEGRAL_CLIP = 0.1, 1.0
"""For the penalty: i, and the largest |e| that its integral answers to."""
KL_DECAY, GAP_DECAY = 0.5, 0.8
"""Shares of the past in the averages of KL and of squared gaps at an update."""
ARRIVAL = 5.0
"""Below the target a KL that grows fast enough to be there within so many updates is on its way."""
FACTOR, KL, CHANGE, INTEGRAL, GAPS = "beta_factor", "kl_mean", "kl_change", "kl_integral", "gap_squares"


def adapted(algorithm: Algorithm, memory: Memory) -> Algorithm:
    """The algorithm with the numbers of the coming update.

    `memory["beta_factor"]` multiplies beta, whoever has put it there; a KL target falls with it, as the KL at a larger
    beta would. Everything else is TailorPO's own.
    """
    factor, integral = _one(memory, FACTOR, 1.0), _one(memory, INTEGRAL, 0.0)
    if isinstance(algorithm, D3PO | SPO):
        return algorithm if factor == 1 else replace(algorithm, beta=algorithm.beta * factor)
    if not isinstance(algorithm, TailorPO):
        return algorithm
    beta, target = starting_beta(algorithm, memory) * factor, algorithm.kl_target
    if target is None:
        return algorithm if beta == algorithm.beta else replace(algorithm, beta=beta)
    if algorithm.controlled == "beta":
        return replace(algorithm, beta=beta * math.exp(integral))
    start = algorithm.kl_penalty or START * beta / math.sqrt(target)
    ahead = _error(memory[KL][0], target / factor**2) + AHEAD * _one(memory, CHANGE, 0.0) if KL in memory else 0.0
    steep = PROPORTIONAL * min(max(ahead, LOOSEST), TIGHTEST)
    return replace(algorithm, beta=beta, kl_penalty=start * math.exp(integral + steep))


def starting_beta(algorithm: TailorPO, memory: Memory) -> float:
    """beta before the controller and factors: the field's number, or that of the gaps so far."""
    if algorithm.beta != "auto":
        return algorithm.beta
    assert isinstance(algorithm.tau, int | float)  # checked with the run
    assert algorithm.kl_target is not None
    squares = _one(memory, GAPS, algorithm.tau**2)
    # Without any gap, as under a constant reward, beta would be 0.
    return max(math.sqrt(squares / (4 * algorithm.kl_target)) / algorithm.tau, 1e-6)


def observe(algorithm: Algorithm, memory: Memory, figures: Mapping[str, Any], policy: Policy) -> dict[str, float]:
    """Look at the figures of an update, and return what there is to log of the numbers it was trained with.

    Args:
        algorithm: as the run file has it.
        memory: changed in place.
        figures: the summary over all processes.
        policy: for the weights of the steps.
    """
    if not isinstance(algorithm, TailorPO) or (algorithm.kl_target is None and FACTOR not in memory):
        return {}
    used = adapted(algorithm, memory)
    assert isinstance(used, TailorPO)
    assert used.beta != "auto"
    logged = {"beta": used.beta} | ({"kl_penalty": used.kl_penalty} if used.kl_penalty else {})
    if algorithm.beta == "auto":
        squares = gap_squares(figures, policy, normalised=algorithm.step_weights == "normalised")
        if squares is not None:
            before = _one(memory, GAPS, squares)
            memory[GAPS] = [GAP_DECAY * before + (1 - GAP_DECAY) * squares]
    kl = cast(float | None, figures.get("kl_trajectory"))
    if algorithm.kl_target is not None and kl is not None and math.isfinite(kl):
        before = _one(memory, KL, kl)
        memory[KL] = [KL_DECAY * before + (1 - KL_DECAY) * kl]
        error = _error(memory[KL][0], algorithm.kl_target / _one(memory, FACTOR, 1.0) ** 2)
        change = 0.0 if before <= 0 else math.log(max(memory[KL][0] / before, 1e-6))
        memory[CHANGE] = [_clip(change, LARGEST_CHANGE)]
        rising = before <= 0 or change > -error / ARRIVAL
        if abs(error) > DEADBAND and not (error < 0 and rising):
            gain, clip = (GAIN / 2, CLIP) if algorithm.controlled == "beta" else (INTEGRAL_GAIN, INTEGRAL_CLIP)
            memory[INTEGRAL] = [_one(memory, INTEGRAL, 0.0) + gain * _clip(error, clip)]
        logged["kl_mean"] = memory[KL][0]
    return logged


def gap_squares(figures: Mapping[str, Any], policy: Policy, *, normalised: bool) -> float | None:
    """Sum over all steps of the mean square of the gap, each times the square of the step's weight under normalised
    step weights; None where no pair had its rewards."""
    schedule, sampler = policy.schedule, policy.sampler
    seen = {row["k"]: row["gap_rms"] ** 2 for row in figures["by_step"] if row.get("gap_rms") is not None}
    if not seen:
        return None
    total = 0.0
    for k in range(schedule.steps):
        if sampler.std(schedule, k) > 0:
            nearest = min(seen, key=lambda known: (abs(known - k), known))
            weight = sampler.noise_weight(schedule, k, kind=policy.model.prediction_type) if normalised else 1.0
            total += weight**2 * seen[nearest]
    return total


def _error(kl: float, target: float) -> float:
    """log(KL / target); a KL of 0, before the first update, is far below."""
    return math.log(max(kl / target, 1e-6))


def _one(memory: Memory, name: str, default: float) -> float:
    return memory[name][0] if name in memory else default


def _clip(value: float, limit: float) -> float:
    return min(max(value, -limit), limit)
