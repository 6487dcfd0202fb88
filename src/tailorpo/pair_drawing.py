"""Drawing and labelling preference pairs, for `tailorpo pairs`: a data set for Diffusion-DPO without people.

For every prompt the base model draws pictures two by two from independent noise; the recipe's reward says which of the
two is better. What it says is about the pictures as they are saved, rounded to 8 bits. Pairs with equal rewards, and
pairs with a reward that is not finite where the recipe skips such, are left out.

    pairs.jsonl           written last, so that a data set is there complete or not at all
    pictures/             000001-winner.png, 000001-loser.png, ...
    recipe.yaml           every setting the pairs were made with
    contact_sheet.png     the first pairs, winners left

Left out: labels drawn from a preference model's probability instead of its order, and the best and worst of more than
two pictures; both can be had by writing pairs.jsonl with a script.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tailorpo._distributed import pick_device
from tailorpo.errors import UserError
from tailorpo.files import atomic_write
from tailorpo.images import contact_sheet, save_png, to_uint8
from tailorpo.noise import Noise
from tailorpo.policy import Policy
from tailorpo.rewards import load_scorer
from tailorpo.rollout import sample_images

if TYPE_CHECKING:
    from tailorpo.run import Run
    from tailorpo.train import Reporter

PAIRS = "pairs.jsonl"
_BATCH = 4
"""Pairs drawn at once."""
_SHEET = 24
"""Pairs on the contact sheet."""


@dataclass(frozen=True)
class Drawn:
    """What was made: the file that lists the pairs, their number, and how many were left out."""

    path: Path
    pairs: int
    ties: int
    invalid: int


def draw_pairs(run: Run, prompts: Sequence[str], *, count: int, out: Path, reporter: Reporter) -> Drawn:
    """Draw `count` pairs for every prompt with the recipe's base model and sampler, and label them with its reward.

    The noise of a picture depends on the recipe's seed, the prompt and the pair's number alone.

    Raises:
        UserError: there is a data set in `out` already, or every pair was left out.
        StorageError: the disk refused.
    """
    if (out / PAIRS).exists():
        raise UserError(f"{out / PAIRS} exists; choose another folder for --out")
    if run.ensemble is not None:
        raise UserError("an ensemble has no gaps of earlier updates to go by here; set ensemble=null")
    reporter.phase("loading the model and the reward")
    device = pick_device()
    policy = Policy(replace(run.model, lora=None, full=False).load(device, seed=run.seed), run.sampler)
    score = load_scorer(run.reward, device, on_invalid=run.on_invalid_reward)
    jobs = [(prompt, number) for prompt in dict.fromkeys(prompts) for number in range(count)]
    reporter.phase("drawing pairs")
    lines: list[str] = []
    sheet: list[tuple[Tensor, str]] = []
    ties = invalid = 0
    for first in range(0, len(jobs), _BATCH):
        batch = jobs[first : first + _BATCH]
        texts = [prompt for prompt, _ in batch for _ in range(2)]
        keys = [("pairs", prompt, number, side) for prompt, number in batch for side in range(2)]
        images = to_uint8(sample_images(policy, texts, noise=Noise(run.seed), keys=keys)).float() / 255
        with torch.no_grad():
            rewards = score(images.to(device), texts).cpu().view(-1, 2)
        for (prompt, _), pictures, reward in zip(batch, images.view(-1, 2, *images.shape[1:]), rewards, strict=True):
            if not bool(reward.isfinite().all()):
                invalid += 1
                continue
            if bool(reward[0] == reward[1]):
                ties += 1
                continue
            order = reward.argsort(descending=True)
            record: dict[str, str | float] = {"prompt": prompt}
            for side, row in zip(("winner", "loser"), order, strict=True):
                record[side] = f"pictures/{len(lines) + 1:06d}-{side}.png"
                record[f"reward_{side}"] = float(reward[row])
                save_png(pictures[row], out / str(record[side]))
                if len(lines) < _SHEET:
                    sheet.append((pictures[row], f"{float(reward[row]):.3g} {prompt}"))
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        reporter.step(min(first + _BATCH, len(jobs)), len(jobs))
    if not lines:
        raise UserError(
            f"no pair is left of {len(jobs)}: {ties} had equal rewards, {invalid} a reward that is not finite"
        )
    save_png(
        contact_sheet([each for each, _ in sheet], [text for _, text in sheet], columns=8), out / "contact_sheet.png"
    )
    atomic_write(out / "recipe.yaml", run.to_yaml())
    atomic_write(out / PAIRS, "".join(lines))
    return Drawn(out / PAIRS, len(lines), ties, invalid)
