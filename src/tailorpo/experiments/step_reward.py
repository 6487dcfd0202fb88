"""How good is the step reward r(x0hat(x_k)) as an estimate of E[r(x_0) | x_k]? (the paper's Tables 6 and 7)

For every state a trajectory of the untrained model is drawn to x_{k-1}, and two siblings x_k from there, as TailorPO
draws its candidates. The truth of each sibling is the mean reward of the ends of `continuations` continuations, whose
noises the two share, since their difference is what matters and its noise is much smaller then.

    error     r(x0hat) - truth of a sibling; relative to |truth| as in the paper, and to the std of r(x_0) given x_k
    misranked the step reward orders the siblings otherwise than their truths; over all pairs, and over those whose true
              difference is more than two standard errors from zero (for the others the truth itself is not known)
    rho       correlation of the difference of step rewards with the true one, corrected for the noise of the truth:
              rho = corr / sqrt(reliability), reliability = 1 - noise variance / variance of the measured difference
    kept      mean of sign(difference of step rewards) * true difference, over the mean |true difference|: 1 for a
              choice that is always right, 0 for a coin

The paper counts steps from the end; so does `left`: 12 left of 20 is k = 8. Pairs and states are averaged as the
independent things they are, one trajectory each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tailorpo.experiments.measurement import Lines, Settings, base_policy, described
from tailorpo.experiments.plots import COLOURS, pyplot
from tailorpo.noise import Key, Noise
from tailorpo.policy import Policy
from tailorpo.prompts import load_prompts
from tailorpo.rewards import Scorer
from tailorpo.rollout import Trajectories, start_trajectories, step_noise
from tailorpo.statistics import mean_interval, plain, win_rate
from tailorpo.train import Reporter

LEFT = (12, 8, 4, 1)
"""Steps that are left, as the paper counts; of 20."""
ROWS = 64
"""Latents at once."""


def cost(settings: Settings) -> int:
    """Guided network evaluations: the way to the state, the siblings' predictions, their continuations."""
    steps, states, futures = settings.run.sampler.steps, settings.sizes["states"], settings.sizes["continuations"]
    return sum(states * (steps - left + 2 + 2 * futures * left) for left in _left(steps))


@torch.no_grad()
def measure(settings: Settings, folder: Path, reporter: Reporter) -> dict[str, Any]:
    """Measure state after state and sum up; every reward of the run is measured on the same latents."""
    run, sizes = settings.run, settings.sizes
    policy, noise, prompts = base_policy(run), Noise(run.seed), load_prompts(run.prompts)
    rewards = {
        entry.reward.name: Scorer([(entry.reward.load(policy.model.device), 1.0)], on_invalid="stop")
        for entry in run.reward
    }
    lines = Lines(folder / "states.jsonl", {**described(settings), "rewards": list(rewards)})
    done = {(row["left"], row["state"]) for row in lines.rows}
    wanted = [(left, state) for left in _left(policy.schedule.steps) for state in range(sizes["states"])]
    reporter.phase("continuing from states")
    for number, (left, state) in enumerate(wanted):
        if (left, state) not in done:
            prompt = prompts[state % len(prompts)]
            k = policy.schedule.steps - left
            siblings = _siblings(policy, prompt, noise=noise, state=state, k=k)
            found = _values(policy, siblings, prompt, noise=noise, k=k, rewards=rewards, futures=sizes["continuations"])
            lines.add({"left": left, "state": state, "prompt": prompt, "rewards": found})
        reporter.step(number + 1, len(wanted))
    return {"sizes": dict(sizes), "rewards": summary(lines.rows)}


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By reward and steps left: errors and misranked pairs with their intervals."""
    names = list(rows[0]["rewards"])
    lefts = sorted({row["left"] for row in rows}, reverse=True)
    return {
        name: {str(left): _summary([row["rewards"][name] for row in rows if row["left"] == left]) for left in lefts}
        for name in names
    }


def _summary(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    guess, truth, noise = (np.array([state[key] for state in states]) for key in ("guess", "truth", "std"))
    gap, true = guess[:, 0] - guess[:, 1], truth[:, 0] - truth[:, 1]
    error = np.array([state["difference_error"] for state in states])
    wrong = np.where(gap * true < 0, 1.0, np.where(gap * true == 0, 0.5, 0.0))
    sure = np.abs(true) > 2 * error
    spread = float(np.sqrt((noise**2).mean()))
    reliability = 1 - float((error**2).mean() / true.var()) if true.var() > 0 else 0.0
    observed = float(np.corrcoef(gap, true)[0, 1]) if gap.std() > 0 and true.std() > 0 else math.nan
    return {
        "states": len(states),
        "relative_error": _mean(np.abs((guess - truth) / truth).mean(1)),
        "bias": _mean((guess - truth).mean(1)),
        "error_in_std": _mean(np.abs(guess - truth).mean(1) / spread) if spread > 0 else None,
        "truth_error_in_std": plain(1 / math.sqrt(states[0]["continuations"])),
        "misranked": _share(wrong),
        "misranked_sure": _share(wrong[sure]) if sure.any() else None,
        "sure": int(sure.sum()),
        "rho": plain(max(-1.0, min(1.0, observed / math.sqrt(reliability)))) if reliability > 0 else None,
        "reliability": plain(reliability),
        "kept": plain(float((np.sign(gap) * true).mean() / np.abs(true).mean())) if true.any() else None,
        "std_of_gap": plain(float(gap.std())),
        "std_of_true_gap": plain(float(true.std())),
    }


def _left(steps: int) -> tuple[int, ...]:
    return tuple(dict.fromkeys(max(1, round(left * steps / 20)) for left in LEFT))


def _siblings(policy: Policy, prompt: str, *, noise: Noise, state: int, k: int) -> Tensor:
    """Two x_k from one x_{k-1}, (2, C, h, w)."""
    keys: list[tuple[Key, ...]] = [("state", state)]
    start = start_trajectories(policy, [prompt], noise=noise, keys=keys)
    for before in range(k):
        gaussian = policy.step(start.latents, before, start.cond).gaussian
        if before == k - 1:
            drawn = [step_noise(noise, start, before, "candidate", j, like=start.latents) for j in (0, 1)]
            return gaussian.sample(torch.stack(drawn)).flatten(0, 1)
        start.latents = gaussian.sample(step_noise(noise, start, before, like=start.latents))
    raise ValueError(f"x_{k} has no siblings: nothing was drawn before it")


def _values(
    policy: Policy,
    siblings: Tensor,
    prompt: str,
    *,
    noise: Noise,
    k: int,
    rewards: dict[str, Scorer],
    futures: int,
) -> dict[str, Any]:
    """Step reward and truth of both siblings, by reward."""
    cond = policy.model.encode([prompt])
    guessed = policy.model.decode(policy.step(siblings, k, cond.repeat(2)).x0)
    ends: dict[str, list[Tensor]] = {name: [] for name in rewards}
    for first in range(0, futures, ROWS // 2):
        keys: list[tuple[Key, ...]] = [("future", k, prompt, n) for n in range(first, min(first + ROWS // 2, futures))]
        pictures = _continue(policy, siblings, prompt, noise=noise, keys=keys, k=k)
        for name, score in rewards.items():
            ends[name].append(score(pictures, [prompt] * len(pictures)).view(2, -1).double().cpu())
    found: dict[str, Any] = {}
    for name, score in rewards.items():
        values = torch.cat(ends[name], dim=1)
        difference = values[0] - values[1]
        found[name] = {
            "guess": [float(v) for v in score(guessed, [prompt] * 2)],
            "truth": [float(v) for v in values.mean(1)],
            "std": [float(v) for v in values.std(1)],
            "difference_error": float(difference.std()) / math.sqrt(futures),
            "continuations": futures,
        }
    return found


def _continue(
    policy: Policy, siblings: Tensor, prompt: str, *, noise: Noise, keys: Sequence[tuple[Key, ...]], k: int
) -> Tensor:
    """Pictures at the ends of continuations from x_k, first those of sibling 0; both share the noise of each key."""
    both, texts = [*keys, *keys], [prompt] * (2 * len(keys))
    way = Trajectories(texts, policy.model.encode(texts), both, siblings.repeat_interleave(len(keys), dim=0))
    for step in range(k, policy.schedule.steps):
        gaussian = policy.step(way.latents, step, way.cond).gaussian
        way.latents = gaussian.sample(step_noise(noise, way, step, like=way.latents))
    return policy.model.decode(way.latents)


def _mean(values: Any) -> list[float | None]:
    found = mean_interval([float(v) for v in values])
    return [plain(found.value), plain(found.low), plain(found.high)]


def _share(wrong: Any) -> list[float | None]:
    """Wilson's interval of a share; a half counts half."""
    found = win_rate([float(v) - 0.5 for v in wrong])
    return [plain(found.value), plain(found.low), plain(found.high)]


def table(content: dict[str, Any]) -> str:
    """One row per reward and steps left."""
    sizes = content["sizes"]
    head = ["reward", "steps left", "relative error", "error / std of r(x_0)", "bias"]
    head += ["pairs misranked", "of the sure pairs", "rho", "kept"]
    lines = [
        f"{sizes['states']} states per step, {sizes['continuations']} continuations of each of two siblings. Intervals:"
        " 95 % over states.",
        "",
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
    ]
    for reward, lefts in content["rewards"].items():
        for left, row in lefts.items():
            sure = f"{_percent(row['misranked_sure'])} of {row['sure']}" if row["misranked_sure"] else "-"
            lines.append(
                f"| {reward} | {left} | {_percent(row['relative_error'])} | {_number(row['error_in_std'])} |"
                f" {_number(row['bias'], signed=True)} | {_percent(row['misranked'])} | {sure} | {_plain(row['rho'])} |"
                f" {_plain(row['kept'])} |"
            )
    return "\n".join(lines) + "\n"


def _percent(values: Sequence[float | None] | None) -> str:
    value, low, high = values or (None, None, None)
    if value is None:
        return "-"
    text = f"{100 * value:.1f} %"
    return text if low is None or high is None else f"{text} [{100 * low:.1f}, {100 * high:.1f}]"


def _number(values: Sequence[float | None] | None, *, signed: bool = False) -> str:
    value, low, high = values or (None, None, None)
    if value is None:
        return "-"
    form = "+.3f" if signed else ".2f"
    text = format(value, form)
    return text if low is None or high is None else f"{text} [{format(low, form)}, {format(high, form)}]"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def plot(content: dict[str, Any], path: Path) -> None:
    """Misranked pairs and relative error against the steps left."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for index, (reward, lefts) in enumerate(content["rewards"].items()):
        colour, shift = COLOURS[index], 0.12 * (index - (len(content["rewards"]) - 1) / 2)
        xs = [int(left) + shift for left in lefts]
        for panel, key in zip(panels, ("misranked", "relative_error"), strict=True):
            rows = [row[key] for row in lefts.values()]
            values = [100 * row[0] for row in rows]
            below = [0 if row[1] is None else 100 * (row[0] - row[1]) for row in rows]
            above = [0 if row[2] is None else 100 * (row[2] - row[0]) for row in rows]
            panel.errorbar(xs, values, yerr=[below, above], color=colour, marker="o", markersize=3, label=reward)
    panels[0].axhline(50, color="0.6", linewidth=0.8)
    panels[0].annotate("a coin", (0.02, 50), xycoords=("axes fraction", "data"), va="bottom", fontsize=7, color="0.4")
    for panel, label in zip(panels, ("pairs misranked, %", "relative error, %"), strict=True):
        panel.set_xlabel("steps left (noisy to clean)")
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
        panel.invert_xaxis()
        panel.set_xticks([int(left) for left in next(iter(content["rewards"].values()))])
    panels[1].legend(frameon=False, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
