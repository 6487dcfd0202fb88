"""What is measured of a picture, for evaluation and for sentinels: rewards, judge, low-level statistics, features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from tailorpo.picture_statistics import saturation
from tailorpo.rewards import Reward, Scorer
from tailorpo.rewards.jpeg import jpeg_kilobytes


@runtime_checkable
class Embedder(Protocol):
    """A reward that also gives features of pictures, to measure diversity in."""

    @property
    def name(self) -> str:
        """What the reward is called."""
        ...

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D)."""
        ...


@dataclass(frozen=True)
class Metric:
    """One row of the table.

    Attributes:
        label: what people read.
        role: "trained" the score that training saw, "member" a part of it, "judge" held out of training, "diversity"
            among the pictures of one prompt, "alarm" a low-level statistic that nobody asked to change.
        unit: what it counts in; empty where the number has no name.
    """

    label: str
    role: Literal["trained", "member", "judge", "diversity", "alarm"]
    unit: str = ""


class Meter:
    """Every number of a picture, from a run's rewards and judge."""

    def __init__(self, scorer: Scorer, judge: Reward | None, *, held_out: bool, device: torch.device) -> None:
        """Args: the training's rewards; the judge, and whether training does not use it; where pictures are."""
        self.scorer = scorer
        self.judge = judge
        self.held_out = held_out
        self.good_threshold: float | None = getattr(self.judge, "good_threshold", None)
        self._judge = Scorer([(self.judge, 1.0)], on_invalid="skip") if self.judge else None
        members = ((reward, own) for (reward, _), own in zip(self.scorer.members, self.scorer.devices, strict=True))
        candidates: list[tuple[object, torch.device | None]] = [(self.judge, device), *members]
        embedders = ((reward, own) for reward, own in candidates if isinstance(reward, Embedder))
        self._embedder, self._embedder_device = next(embedders, (None, None))
        self.embedding = self._embedder.name if self._embedder else "pixels"

    @torch.no_grad()
    def scores(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Numbers of pictures (B, 3, H, W), (B,) each, NaN where a reward gave none; names as in `metrics`."""
        members = self.scorer.each(images, prompts)
        weights = [weight for _, weight in self.scorer.members]
        total = sum((weight * score for weight, score in zip(weights, members.values(), strict=True)), torch.zeros(()))
        scores = {"reward": total}
        if len(members) > 1:
            scores |= {f"reward:{name}": score for name, score in members.items()}
        if self._judge:
            scores["judge"] = self._judge(images, prompts)
            if self.good_threshold is not None:
                good = (scores["judge"] >= self.good_threshold).float()
                scores["good"] = good.where(scores["judge"].isfinite(), math.nan)
        scores["saturation"] = saturation(images)
        scores["jpeg"] = jpeg_kilobytes(images)
        return scores

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, D): of the judge, else of a reward that has them, else 8 x 8 means of the pixels around mid grey."""
        if self._embedder:
            return self._embedder.embed(images.to(self._embedder_device)).float().cpu()
        return (adaptive_avg_pool2d(images, 8) - 0.5).flatten(1).cpu()

    def metric(self, name: str) -> Metric:
        """What a name in `scores` stands for."""
        fixed = {
            "good": Metric("pictures the judge calls good", "judge" if self.held_out else "member", "share"),
            "saturation": Metric("saturation", "alarm"),
            "jpeg": Metric("JPEG size", "alarm", "kB"),
        }
        if name in fixed:
            return fixed[name]
        if name == "judge" and self.judge:
            return Metric(self.judge.name, "judge" if self.held_out else "member")
        members = self.scorer.members
        if name == "reward":
            return Metric(members[0][0].name if len(members) == 1 else "sum of the rewards", "trained")
        return Metric(name.removeprefix("reward:"), "member")
