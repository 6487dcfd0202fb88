"""How many plain pairs is one guided pair worth, and does its gradient still point to better pictures?

At the reference the gradient of a DPO loss is linear in the pair's difference of noises d: -(beta / 2) J^T d. So from
the untrained model one backward pass for each of a few directions gives the gradient of every kind of pair:

    plain       d = z_w - z_l of two candidates
    extremes    d = z_best - z_worst of four candidates
    all six     d = mean of z_w - z_l over the six pairs of four candidates = sum_i c_i z_(i), c = (3, 1, -1, -3) / 6
    guided      d = z_w - z_l + k g / |g|, g the winner's gradient, or the mean of winner's and loser's (symmetric)

With mu_a the mean of a kind's gradients over trajectories, m_ab = mu_a . mu_b, and n_a^2 = E|g_a|^2 - m_aa the noise of
one, the measure is

    worth_a = (m_ap / m_pp)^2 n_plain^2 / n_a^2          p: all six, whose mean is that of a plain pair at less noise

the number of plain pairs whose mean gradient shows the direction p as clearly as one pair of this kind. Only progress
along p counts: a gradient that is large and points elsewhere is worth little. If g were the same everywhere and the
reward linear it would be (1 + 0.886 k)^2 (`guidance`), 3.33 for extremes and 3.6 for all six. It is not, so the push
has a noise of its own, and `the push alone`, without a pair, is what no k can pass. `cosine` is that of the angle
between mu_a and p.

`judge` asks how much of the progress the judge sees: with j the mean gradient of all six pairs as the judge ranks them,
(m_aj / m_ap) / (m_pj / m_pp), so 1 for plain pairs; less means that a kind gains reward in ways that the judge values
less. The rewards' own gradients are not compared, only their rankings.

m_ab comes from products between DIFFERENT blocks of trajectories, so noise does not inflate it. The gradient of a
trajectory is the sum over its trained steps, each with the same weight (`step_weights: normalised`), and the walk goes
on from a candidate that no ranking chose. Intervals: delete-one-block jackknife of the logarithm, Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from scipy import stats
from torch import Tensor

from tailorpo.errors import UserError
from tailorpo.experiments.measurement import Lines, Settings, base_policy, described
from tailorpo.experiments.plots import COLOURS, pyplot
from tailorpo.guidance import SigmaGuidance
from tailorpo.noise import Noise
from tailorpo.policy import Policy
from tailorpo.prompts import load_prompts
from tailorpo.rewards import Scorer, load_scorer
from tailorpo.rollout import Branch, rollout_branches, start_trajectories
from tailorpo.statistics import plain
from tailorpo.train import Reporter

Matrix = NDArray[np.float64]

EACH = 2
"""Trajectories of a block. The blocks of a smaller size are the first of a larger one, which goes on from them."""
CANDIDATES = 4
RANKS = (3 / 6, 1 / 6, -1 / 6, -3 / 6)
"""Of the mean over all six pairs of four ranked candidates."""

BASIS = ("plain", "extremes", "all six", "judge's six", "winner's gradient", "mean gradient")
PUSHES = (1.0, 2.0, 4.0, 8.0)
PLAIN, ALL, JUDGE = 0, 2, 3


@dataclass(frozen=True)
class Kind:
    """A kind of pair: what it is of each direction in `BASIS`, and what theory says that it is worth."""

    name: str
    mix: tuple[float, ...]
    predicted: float
    k: float | None = None


def _kinds() -> list[Kind]:
    found = [
        Kind("plain", _mix({PLAIN: 1.0}), 1.0, 0.0),
        Kind("best and worst of four", _mix({1: 1.0}), 3.33),
        Kind("all six pairs of four", _mix({ALL: 1.0}), 3.6),
    ]
    for place, name in ((4, "guided"), (5, "symmetric")):
        found += [
            Kind(f"{name}, k {k:g}", _mix({PLAIN: 1.0, place: k}), SigmaGuidance(k=k).gain ** 2, k) for k in PUSHES
        ]
        found.append(Kind(f"{name}, the push alone", _mix({place: 1.0}), math.inf))
    return found


def _mix(parts: dict[int, float]) -> tuple[float, ...]:
    return tuple(parts.get(index, 0.0) for index in range(len(BASIS)))


def cost(settings: Settings) -> int:
    """Guided network evaluations, backward passes not counted."""
    steps, algorithm = settings.run.sampler.steps, settings.run.algorithm
    trained = len(algorithm.trained_steps(steps, noise=Noise(settings.run.seed), update=0))
    return settings.sizes["pairs"] * (steps + trained * CANDIDATES)


def measure(settings: Settings, folder: Path, reporter: Reporter) -> dict[str, Any]:
    """Measure block after block of trajectories and sum up.

    Raises:
        UserError: there is no judge, or less than two trajectories.
    """
    run, pairs = settings.run, settings.sizes["pairs"]
    blocks = pairs // EACH
    if run.eval.judge is None or blocks < 2:
        raise UserError(
            f"pair-worth needs eval.judge and --pairs of at least {2 * EACH}, got {run.eval.judge} and {pairs}"
        )
    policy, noise, prompts = base_policy(run), Noise(run.seed), load_prompts(run.prompts)
    device = policy.model.device
    scorers = load_scorer(run.reward, device), Scorer([(run.eval.judge.load(device), 1.0)], on_invalid="skip")
    trained = run.algorithm.trained_steps(run.sampler.steps, noise=noise, update=0)
    data, head = run.to_dict(), described(replace(settings, sizes={}))
    judge = data["eval"]["judge"]
    lines = Lines(
        folder / "blocks.jsonl", {**head, "reward": data["reward"], "algorithm": data["algorithm"], "judge": judge}
    )
    done = {row["block"] for row in lines.rows}
    reporter.phase("gradients of pairs")
    for block in range(blocks):
        numbers = range(EACH * block, EACH * (block + 1))
        if block not in done:
            total, gram, count = _block(policy, numbers, prompts, trained=trained, noise=noise, scorers=scorers)
            _file(folder, block).write_bytes(save({"sums": total}))
            lines.add({"block": block, "count": count, "gram": gram.tolist()})
        reporter.step(block + 1, blocks)
    rows = [row for row in lines.rows if row["block"] < blocks]
    return {"sizes": dict(settings.sizes), "trained": list(trained), **summary(*_gathered(rows, folder))}


def _file(folder: Path, block: int) -> Path:
    return folder / f"block-{block:03d}.safetensors"


def _block(
    policy: Policy,
    numbers: Sequence[int],
    prompts: Sequence[str],
    *,
    trained: Sequence[int],
    noise: Noise,
    scorers: tuple[Scorer, Scorer],
) -> tuple[Tensor, Tensor, int]:
    """Sum over trajectories of the gradients, (basis, parameters), of their products, (basis, basis), and how many."""
    size = sum(parameter.numel() for parameter in policy.model.trainable().values())
    total, gram, count = torch.zeros(len(BASIS), size), torch.zeros(len(BASIS), len(BASIS), dtype=torch.float64), 0
    for number in numbers:
        prompt = prompts[number % len(prompts)]
        found = _trajectory(policy, prompt, number, trained=trained, noise=noise, scorers=scorers)
        if bool(found.isfinite().all()):
            total += found
            gram += found.double() @ found.double().T
            count += 1
    return total, gram, count


def _trajectory(
    policy: Policy,
    prompt: str,
    number: int,
    *,
    trained: Sequence[int],
    noise: Noise,
    scorers: tuple[Scorer, Scorer],
) -> Tensor:
    """The gradients of the directions in `BASIS`, (basis, parameters), summed over the trained steps; not finite where
    a reward is missing."""
    score, judge = scorers
    parameters = list(policy.model.trainable().values())
    found = torch.zeros(len(BASIS), sum(parameter.numel() for parameter in parameters))
    trajectory = start_trajectories(policy, [prompt], noise=noise, keys=[("pair", number)])
    for branch in rollout_branches(
        policy,
        trajectory,
        noise=noise,
        trained=trained,
        candidates=CANDIDATES,
        score=score,
        graph=lambda k: k in trained,
        gradient="full",
    ):
        if not isinstance(branch, Branch):
            continue
        trajectory.go_on(*branch.scored.rows(torch.tensor([0])))  # as good a draw as any
        with torch.no_grad():
            judged = judge(branch.scored.pictures, [prompt] * CANDIDATES)
        weight = policy.sampler.noise_weight(policy.schedule, branch.k, kind=policy.model.prediction_type)
        gaussian = branch.step.gaussian
        origin = gaussian.mean.detach()
        directions = _directions(branch, judged)
        for row, direction in enumerate(directions):
            logit = gaussian.projection(direction[None], origin).sum() / weight
            gradients = torch.autograd.grad(logit, parameters, retain_graph=row + 1 < len(directions))
            found[row] += torch.cat([gradient.flatten().cpu() for gradient in gradients])
    return found


def _directions(branch: Branch, judged: Tensor) -> Tensor:
    """Differences of noises, (basis, C, h, w), of one branch with `CANDIDATES` candidates."""
    noises, reward, gradient = branch.noises[:, 0], branch.scored.reward, branch.scored.gradient
    assert gradient is not None
    missing = reward.isnan().any() | judged.isnan().any()
    order = reward.argsort(descending=True)
    winner, loser = (0, 1) if bool(reward[0] >= reward[1]) else (1, 0)
    ranks = torch.tensor(RANKS, device=noises.device).view(-1, 1, 1, 1)
    found = torch.stack(
        [
            noises[winner] - noises[loser],
            noises[order[0]] - noises[order[-1]],
            (ranks * noises[order]).sum(dim=0),
            (ranks * noises[judged.argsort(descending=True)]).sum(dim=0),
            _unit(gradient[winner]),
            _unit(gradient[winner] + gradient[loser]),
        ]
    )
    return torch.where(missing, torch.nan, found)


def _unit(gradient: Tensor) -> Tensor:
    return SigmaGuidance(k=1.0).push(gradient[None], gradient.new_zeros(1), std=1.0, progress=0.0)[0]


def _gathered(rows: Sequence[dict[str, Any]], folder: Path) -> tuple[Matrix, Matrix, Matrix]:
    """Products between the blocks' sums, (blocks, basis, blocks, basis), within trajectories, (blocks, basis, basis),
    and the numbers of trajectories, (blocks,)."""
    ordered = sorted(rows, key=lambda row: row["block"])
    sums = torch.stack([load(_file(folder, row["block"]).read_bytes())["sums"] for row in ordered])
    flat = sums.flatten(0, 1)
    cross = (flat @ flat.T).view(*sums.shape[:2], *sums.shape[:2])
    return (
        cross.double().numpy(),
        np.array([row["gram"] for row in ordered]),
        np.array([row["count"] for row in ordered], dtype=float),
    )


def summary(cross: Matrix, gram: Matrix, counts: Matrix) -> dict[str, Any]:
    """The numbers of every kind with their intervals; see `_gathered` for the arguments."""
    kinds: list[dict[str, Any]] = []
    for kind in _kinds():
        mix = np.array(kind.mix)

        def of(form: Callable[[Matrix, Matrix, Matrix], float], mix: Matrix = mix) -> list[float | None]:
            return _jackknife(lambda keep: form(mix, *_moments(cross, gram, counts, keep=keep)), len(counts))

        unknown, alone = [None, None, None], kind.mix[PLAIN] == 0 and math.isinf(kind.predicted)
        exact = kind.name in ("plain", "all six pairs of four")
        kinds.append(
            {
                "name": kind.name,
                "k": kind.k,
                "predicted": plain(kind.predicted),
                "noise": unknown if alone else of(_noise),
                "progress": unknown if alone else [1.0, 1.0, 1.0] if exact else of(_progress),
                "worth": [1.0, 1.0, 1.0] if kind.name == "plain" else of(_worth_of_all if exact else _worth),
                "cosine": [1.0, 1.0, 1.0] if exact else of(_cosine),
                "judge": [1.0, 1.0, 1.0] if exact else of(_judge),
            }
        )
    return {"trajectories": int(counts.sum()), "kinds": kinds}


def _moments(cross: Matrix, gram: Matrix, counts: Matrix, *, keep: Matrix) -> tuple[Matrix, Matrix]:
    """m_ab without bias, and E[g_a . g_b], both (basis, basis), from the blocks to keep (a mask)."""
    weights = np.outer(keep, keep) * (1 - np.eye(len(keep)))
    mean = np.einsum("ij,iajb->ab", weights, cross) / (weights * np.outer(counts, counts)).sum()
    second = np.einsum("i,iab->ab", keep, gram) / (keep * counts).sum()
    return (mean + mean.T) / 2, second


def _variance(mix: Matrix, mean: Matrix, second: Matrix) -> float:
    return max(float(mix @ (second - mean) @ mix), 0.0)


def _noise(mix: Matrix, mean: Matrix, second: Matrix) -> float:
    """n_a / n_plain."""
    return math.sqrt(_variance(mix, mean, second) / _variance(np.eye(len(BASIS))[PLAIN], mean, second))


def _progress(mix: Matrix, mean: Matrix, second: Matrix) -> float:
    del second
    return float(mix @ mean[:, ALL] / mean[ALL, ALL])


def _worth(mix: Matrix, mean: Matrix, second: Matrix) -> float:
    noise = _noise(mix, mean, second)
    return (_progress(mix, mean, second) / noise) ** 2 if noise > 0 else math.inf


def _worth_of_all(mix: Matrix, mean: Matrix, second: Matrix) -> float:
    return _noise(mix, mean, second) ** -2


def _cosine(mix: Matrix, mean: Matrix, second: Matrix) -> float:
    del second
    square = float(mix @ mean @ mix) * mean[ALL, ALL]
    return float(mix @ mean[:, ALL]) / math.sqrt(square) if square > 0 else math.nan


def _judge(mix: Matrix, mean: Matrix, second: Matrix) -> float:
    del second
    return float((mix @ mean[:, JUDGE]) / (mix @ mean[:, ALL]) / (mean[ALL, JUDGE] / mean[ALL, ALL]))


def _jackknife(estimate: Callable[[Matrix], float], blocks: int) -> list[float | None]:
    """Value and 95 % interval of a positive number; what is not positive has none."""
    everything = np.ones(blocks)
    value = estimate(everything)
    without = np.array([estimate(everything - one) for one in np.eye(blocks)]) if blocks > 2 else np.array([math.nan])
    if not (value > 0 and (without > 0).all() and np.isfinite(without).all()):
        return [plain(value), None, None]
    logs = np.log(without)
    error = math.sqrt((blocks - 1) / blocks * float(((logs - logs.mean()) ** 2).sum()))
    reach = float(stats.t.ppf(0.975, blocks - 1)) * error
    return [plain(value * math.exp(shift)) for shift in (0.0, -reach, reach)]


def table(content: dict[str, Any]) -> str:
    """One row per kind of pair."""
    steps = ", ".join(map(str, content["trained"]))
    lines = [
        f"{content['trajectories']} trajectories, a pair at each of the steps {steps};"
        " jackknife 95 % intervals over blocks of them.",
        "",
        "| pair | worth in theory | worth, in plain pairs | progress | noise | cosine to plain | judge's share |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind in content["kinds"]:
        cells = (_cell(kind[key], digits) for key, digits in COLUMNS.items())
        predicted = "no limit" if kind["predicted"] is None else f"{kind['predicted']:.1f}"
        lines.append(f"| {kind['name']} | {predicted} | {' | '.join(cells)} |")
    lines += [
        "",
        "Progress: along the mean gradient of plain pairs, in units of a plain pair's. Noise: of one pair's gradient,"
        " in those units. Worth: their ratio, squared. Judge's share: progress along the mean gradient of pairs that"
        " the judge ranks, per progress along that of the trained reward's, in units of a plain pair's.",
    ]
    return "\n".join(lines) + "\n"


COLUMNS = {"worth": 1, "progress": 2, "noise": 2, "cosine": 2, "judge": 2}


def _cell(value: Sequence[float | None], digits: int) -> str:
    middle, low, high = value
    if middle is None:
        return "-"
    ends = "" if low is None or high is None or low == high else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{middle:.{digits}f}{ends}"


def plot(content: dict[str, Any], path: Path) -> None:
    """Worth and the judge's share against k."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    titles = {"worth": "worth, in plain pairs", "cosine": "cosine to plain pairs", "judge": "judge's share"}
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        for colour, form in zip(COLOURS, ("guided", "symmetric"), strict=False):
            rows = [kind for kind in content["kinds"] if kind["name"].startswith(form) and kind["k"] is not None]
            rows = [row for row in rows if row[key][0] is not None]
            ks, values = [row["k"] for row in rows], [row[key] for row in rows]
            panel.plot(ks, [value[0] for value in values], color=colour, marker="o", markersize=3, label=form)
            if all(value[1] is not None for value in values):
                lows, highs = [value[1] for value in values], [value[2] for value in values]
                panel.fill_between(ks, lows, highs, color=colour, alpha=0.2)
        panel.set_title(title, fontsize=8)
        panel.set_xlabel("k")
    ks = np.linspace(PUSHES[0], PUSHES[-1], 50)
    panels[0].plot(ks, [SigmaGuidance(k=k).gain ** 2 for k in ks], color="0.5", linestyle=":", label="theory")
    panels[0].legend(frameon=False, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
