"""Does a gradient step raise the winner's likelihood and lower the loser's? (the paper's Section 3)

For pairs of D3PO (two chains from one x_0, labelled by their ends; the inputs differ) and of TailorPO (two candidates
from one x_k, labelled by the step reward) at every step, from the untrained model: one plain gradient step on the loss
of that pair alone, so small that the log-ratio between winner and loser changes by `SHIFT` nats to first order; then
the exact change of log pi of both under their own inputs. Reported: how often the winner's fell, or the loser's rose.

D3PO's clamp and mean are left out here: at the reference they only scale the gradient.

Two more numbers need no gradient. The paper's Eq. 8 says that D3PO moves the mean along

    (x^w_{k+1} - x^l_{k+1}) + (mu(x^l_k) - mu(x^w_k)) = std (z_w - z_l)

in place of x^w_{k+1} - x^l_{k+1}: `cosine` is that of the angle between the two (1 for TailorPO, by construction), and
`reversed` how often it is negative. `agrees` is how often the step of the chain that won was itself the better step:
its step reward rose by more than the other's.

The steps of one pair of chains are not independent, but intervals over all steps count them as such; over one step
they are right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tailorpo.algorithms.d3po import D3PO, ChainPair
from tailorpo.algorithms.pairs import Pair
from tailorpo.algorithms.tailorpo import TailorPO
from tailorpo.experiments.measurement import Lines, Settings, base_policy, described
from tailorpo.experiments.plots import COLOURS, pyplot
from tailorpo.gaussian_step import GaussianStep
from tailorpo.models import Conditioning
from tailorpo.noise import Key, Noise
from tailorpo.policy import Policy
from tailorpo.prompts import load_prompts
from tailorpo.rewards import Scorer, load_scorer
from tailorpo.rollout import start_trajectories, step_noise
from tailorpo.statistics import plain, win_rate
from tailorpo.train import Reporter

SHIFT = 0.01
"""Nats by which a gradient step changes the log-ratio between winner and loser, to first order."""

PLAIN = D3PO(beta=1.0, reduction="sum", clip=None, update="buffered")
METHODS = ("D3PO", "TailorPO")


def cost(settings: Settings) -> int:
    """Guided network evaluations of the rollouts and of the gradient steps, backward passes not counted."""
    steps, pairs = settings.run.sampler.steps, settings.sizes["pairs"]
    return pairs * (steps * (2 + 2 + 2 + 2) + steps * (1 + 2 + 1 + 1 + 1))


def measure(settings: Settings, folder: Path, reporter: Reporter) -> dict[str, Any]:
    """Measure pair after pair and sum up."""
    run, pairs = settings.run, settings.sizes["pairs"]
    policy, noise, prompts = base_policy(run), Noise(run.seed), load_prompts(run.prompts)
    score = load_scorer(run.reward, policy.model.device)
    lines = Lines(folder / "pairs.jsonl", {**described(settings), "reward": run.to_dict()["reward"], "shift": SHIFT})
    done = {row["pair"] for row in lines.rows}
    reporter.phase("gradient steps on single pairs")
    for number in range(pairs):
        if number not in done:
            prompt, keys = prompts[number % len(prompts)], [("pair", number)]
            rows = {
                "D3PO": _chains(policy, prompt, keys, noise=noise, score=score),
                "TailorPO": _siblings(policy, prompt, keys, noise=noise, score=score),
            }
            lines.add({"pair": number, "prompt": prompt, **rows})
        reporter.step(number + 1, pairs)
    return {
        "sizes": dict(settings.sizes),
        "methods": {name: summary([r[name] for r in lines.rows]) for name in METHODS},
    }


def _chains(
    policy: Policy, prompt: str, keys: Sequence[tuple[Key, ...]], *, noise: Noise, score: Scorer
) -> list[dict[str, Any]]:
    """One pair of chains, an entry per step."""
    steps = policy.schedule.steps
    way = start_trajectories(policy, [prompt], noise=noise, keys=keys)
    found: list[dict[str, Any]] = []
    pairs = list(PLAIN.collect(policy, way, trained=range(steps), score=score, noise=noise))
    if not bool(pairs[0].present.all()) or bool(pairs[0].tie.any()):
        return found
    guesses: list[Tensor] = []
    for pair in pairs:
        with torch.no_grad():
            step = policy.step(pair.latents[0], pair.k, pair.cond.repeat(2))
            guesses.append(score(policy.model.decode(step.x0), [prompt] * 2))
    guesses.append(pairs[-1].reward[0])
    for pair, before, after in zip(pairs, guesses[:-1], guesses[1:], strict=True):
        loss = PLAIN.loss(policy, pair)
        inputs = _Inputs(pair.k, pair.latents[0], pair.cond.repeat(2), pair.next_latents[0], pair.reference_mean[0])
        changed = _step(policy, loss, inputs)
        wanted, noises = _directions(pair)
        rise = after - before
        found.append(
            {
                "k": pair.k,
                "winner": changed[0],
                "loser": changed[1],
                "cosine": plain(float(cosine_similarity(wanted, noises, dim=0))),
                "agrees": bool(rise[0] > rise[1]),
            }
        )
    return found


def _directions(pair: ChainPair) -> tuple[Tensor, Tensor]:
    """x^w_{k+1} - x^l_{k+1}, and where D3PO's gradient moves the mean instead, flat."""
    winner, loser = pair.next_latents[0]
    # The untrained model is the reference, so its means are the policy's.
    own = pair.next_latents[0] - pair.reference_mean[0]
    return (winner - loser).flatten(), (own[0] - own[1]).flatten()


def _siblings(
    policy: Policy, prompt: str, keys: Sequence[tuple[Key, ...]], *, noise: Noise, score: Scorer
) -> list[dict[str, Any]]:
    """One trajectory of TailorPO that trains every step, an entry per step."""
    steps = policy.schedule.steps
    method = TailorPO(beta=1.0, train_steps=steps, continue_from="random", update="buffered")
    way = start_trajectories(policy, [prompt], noise=noise, keys=keys)
    found: list[dict[str, Any]] = []
    for pair in method.collect(policy, way, trained=range(steps), score=score, noise=noise):
        if not isinstance(pair, Pair) or not bool(pair.valid.all()):
            continue
        noises = [step_noise(noise, way, pair.k, "candidate", j, like=pair.latents) for j in (0, 1)]
        if not torch.equal(noises[0] - noises[1], pair.noise_difference):  # candidate 1 won
            noises.reverse()
        # The policy that drew them is the reference.
        drawn = pair.reference.sample(torch.cat(noises))
        means = pair.reference.mean.repeat(2, 1, 1, 1)
        loss = method.loss(policy, pair)
        changed = _step(
            policy, loss, _Inputs(pair.k, pair.latents.repeat(2, 1, 1, 1), pair.cond.repeat(2), drawn, means)
        )
        found.append({"k": pair.k, "winner": changed[0], "loser": changed[1], "cosine": 1.0, "agrees": True})
    return found


@dataclass(frozen=True)
class _Inputs:
    """Winner and loser of one pair: x_k, x_{k+1} and the reference's mean, two rows each."""

    k: int
    latents: Tensor
    cond: Conditioning
    next_latents: Tensor
    reference_mean: Tensor


def _step(policy: Policy, loss: Tensor, inputs: _Inputs) -> tuple[float, float]:
    """One small gradient step on the loss of one pair, what it changes of log pi of winner and loser in nats, and
    back."""
    parameters = list(policy.model.trainable().values())
    gradients = torch.autograd.grad(loss.sum(), parameters)
    # At the reference the loss falls by half of what the log-ratio rises by (beta is 1).
    square = sum(float(gradient.double().square().sum()) for gradient in gradients)
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= SHIFT / (2 * square) * gradient
        gaussian = policy.step(inputs.latents, inputs.k, inputs.cond).gaussian
        ratio = gaussian.log_ratio(inputs.next_latents, GaussianStep(inputs.reference_mean, gaussian.std))
        for parameter, old in zip(parameters, before, strict=True):
            parameter.copy_(old)
    return float(ratio[0]), float(ratio[1])


def summary(pairs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Shares over all steps and by step, with Wilson's intervals."""
    rows = [row for pair in pairs for row in pair]
    ks = sorted({row["k"] for row in rows})
    return {"all": _shares(rows), "by_step": [{"k": k, **_shares([r for r in rows if r["k"] == k])} for k in ks]}


def _shares(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "n": len(rows),
        "winner_fell": _share([row["winner"] < 0 for row in rows]),
        "loser_rose": _share([row["loser"] > 0 for row in rows]),
        "either": _share([row["winner"] < 0 or row["loser"] > 0 for row in rows]),
        "reversed": _share([row["cosine"] < 0 for row in rows]),
        "cosine": plain(sum(row["cosine"] for row in rows) / len(rows)),
        "agrees": _share([row["agrees"] for row in rows]),
        "shift": plain(sum(row["winner"] - row["loser"] for row in rows) / len(rows)),
    }


def _share(flags: Sequence[bool]) -> list[float | None]:
    found = win_rate([1.0 if flag else -1.0 for flag in flags])
    return [plain(found.value), plain(found.low), plain(found.high)]


COLUMNS = {
    "winner_fell": "winner's likelihood fell",
    "loser_rose": "loser's rose",
    "either": "either",
    "reversed": "mean pushed away from x_w - x_l",
    "agrees": "label agrees with the step's own gain",
}


def table(content: dict[str, Any]) -> str:
    """One row per method, over all steps."""
    lines = [
        f"{content['sizes']['pairs']} pairs of trajectories, every step; shares with Wilson's 95 % intervals.",
        "",
        f"| method | pairs x steps | {' | '.join(COLUMNS.values())} | mean cosine |",
        "| --- | --- |" + " --- |" * (len(COLUMNS) + 1),
    ]
    for name, found in content["methods"].items():
        row = found["all"]
        shares = (f"{100 * v:.1f} % [{100 * low:.1f}, {100 * high:.1f}]" for v, low, high in (row[c] for c in COLUMNS))
        lines.append(f"| {name} | {row['n']:,} | {' | '.join(shares)} | {row['cosine']:.2f} |")
    return "\n".join(lines) + "\n"


def plot(content: dict[str, Any], path: Path) -> None:
    """The shares by step."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    titles = {"either": COLUMNS["winner_fell"] + "\nor loser's rose, %", "reversed": COLUMNS["reversed"] + ", %"}
    titles["agrees"] = COLUMNS["agrees"].replace("with the", "with\nthe") + ", %"
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        for colour, (name, found) in zip(COLOURS, content["methods"].items(), strict=False):
            rows = found["by_step"]
            ks, (values, lows, highs) = [row["k"] for row in rows], zip(*(row[key] for row in rows), strict=True)
            panel.plot(ks, [100 * v for v in values], color=colour, marker="o", markersize=3, label=name)
            panel.fill_between(ks, [100 * v for v in lows], [100 * v for v in highs], color=colour, alpha=0.2)
        panel.set_title(title, fontsize=8)
        panel.set_xlabel("step k (noisy to clean)")
        panel.set_ylim(-3, 103)
    panels[0].legend(frameon=False, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
