"""Rewards: what says which picture is better.

Each reward is a frozen dataclass that is its section of a run file; `load(device)` returns the thing to call with
(images (B, 3, H, W) in [0, 1], prompts) -> (B,). Training and evaluation call a Scorer over one or several of them.
Importing this package imports neither transformers nor any weights.

In these classes `differentiable`, `needs`, `units`, `source` and, where there are files to fetch first, `downloads`
carry no annotation on purpose: a dataclass then takes them for facts about the class, not for fields that a run file
could set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from tailorpo._distributed import find_device
from tailorpo.rewards.aesthetic import Aesthetic
from tailorpo.rewards.clip_preference import ClipPreference, EmojiJudge, EmojiPreference
from tailorpo.rewards.clip_score import ClipScore
from tailorpo.rewards.colour import Brightness, Colourfulness
from tailorpo.rewards.custom import CustomReward
from tailorpo.rewards.ensemble import Ensemble
from tailorpo.rewards.ensemble_scorer import EnsembleScorer
from tailorpo.rewards.hpsv2 import HPSv2
from tailorpo.rewards.hpsv3 import HPSv3
from tailorpo.rewards.image_reward import ImageReward
from tailorpo.rewards.jpeg import JpegCompressibility, JpegIncompressibility
from tailorpo.rewards.ocr import OCR
from tailorpo.rewards.pickscore import PickScore
from tailorpo.rewards.remote import RemoteReward
from tailorpo.rewards.scorer import Reward, Scorer, StepAware
from tailorpo.rewards.step_preference import EmojiStepPreference
from tailorpo.rewards.vision_judge import VisionJudge
from tailorpo.rewards.weights import Download, NeedsFiles

BuiltinReward = (
    EmojiPreference
    | EmojiStepPreference
    | EmojiJudge
    | ClipPreference
    | Aesthetic
    | ImageReward
    | HPSv2
    | PickScore
    | ClipScore
    | HPSv3
    | OCR
    | VisionJudge
    | RemoteReward
    | JpegCompressibility
    | JpegIncompressibility
    | Colourfulness
    | Brightness
)
RewardConfig = BuiltinReward | CustomReward
"""Any reward's section of a run file; `name` says which, "package.module:attribute" is one's own."""


@dataclass(frozen=True, kw_only=True)
class RewardEntry:
    """One summand of the score of a run.

    Attributes:
        device: where the reward computes, such as cuda:1 or cpu; null for where the model does. Several processes on a
            machine share it, with a copy of the reward each.
    """

    reward: RewardConfig
    weight: float = 1.0
    # Where a reward computes is no part of what is trained: a run may be resumed on another machine.
    device: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Raise ValueError for a weight that is not finite."""
        if not math.isfinite(self.weight):
            raise ValueError(f"a reward's weight has to be a finite number, not {self.weight}")


def load_scorer(
    entries: Sequence[RewardEntry],
    device: torch.device | str,
    *,
    on_invalid: Literal["stop", "skip"] = "stop",
    ensemble: Ensemble | None = None,
) -> Scorer:
    """Load every entry's reward on the device and put them into one Scorer."""
    devices = [find_device(entry.device) if entry.device else torch.device(device) for entry in entries]
    members = [(entry.reward.load(own), entry.weight) for entry, own in zip(entries, devices, strict=True)]
    if ensemble is not None:
        return EnsembleScorer(members, ensemble, on_invalid=on_invalid, devices=devices)
    return Scorer(members, on_invalid=on_invalid, devices=devices)


@dataclass(frozen=True, kw_only=True)
class RewardInfo:
    """One line of `tailorpo rewards`."""

    name: str
    summary: str
    differentiable: bool | None
    """None: depends on the reward (one's own)."""
    needs: str
    units: str
    source: str
    downloads: tuple[Download, ...] = ()
    """What has to be fetched before it can be used, with sizes and licences."""


def describe_rewards() -> tuple[RewardInfo, ...]:
    """What there is, for `tailorpo rewards` and the docs; the last one stands for a user's own."""
    builtin: tuple[type[BuiltinReward], ...] = (
        EmojiPreference,
        EmojiStepPreference,
        EmojiJudge,
        ClipPreference,
        Aesthetic,
        ImageReward,
        HPSv2,
        PickScore,
        ClipScore,
        HPSv3,
        OCR,
        VisionJudge,
        RemoteReward,
        JpegCompressibility,
        JpegIncompressibility,
        Colourfulness,
        Brightness,
    )
    kinds: list[tuple[str, type[RewardConfig], bool | None]] = [
        *((kind.__dataclass_fields__["name"].default, kind, _has_gradient(kind)) for kind in builtin),
        ("package.module:attribute", CustomReward, None),
    ]
    return tuple(
        RewardInfo(
            name=name,
            summary=(kind.__doc__ or "").partition("\n")[0],
            differentiable=differentiable,
            needs=kind.needs,
            units=kind.units,
            source=kind.source,
            downloads=getattr(kind, "downloads", ()),
        )
        for name, kind, differentiable in kinds
    )


def _has_gradient(kind: type[BuiltinReward]) -> bool | None:
    return None if kind is RemoteReward else kind.differentiable


__all__ = [
    "OCR",
    "Aesthetic",
    "Brightness",
    "BuiltinReward",
    "ClipPreference",
    "ClipScore",
    "Colourfulness",
    "CustomReward",
    "Download",
    "EmojiJudge",
    "EmojiPreference",
    "EmojiStepPreference",
    "HPSv2",
    "HPSv3",
    "ImageReward",
    "JpegCompressibility",
    "JpegIncompressibility",
    "NeedsFiles",
    "PickScore",
    "RemoteReward",
    "Reward",
    "RewardConfig",
    "RewardEntry",
    "RewardInfo",
    "Scorer",
    "StepAware",
    "VisionJudge",
    "describe_rewards",
    "load_scorer",
]
