"""The `sentinels` section of a run file, and what of it cannot work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from pydantic import Field

from tailorpo.algorithms.base import Algorithm
from tailorpo.algorithms.d3po import D3PO
from tailorpo.algorithms.spo import SPO
from tailorpo.algorithms.tailorpo import TailorPO
from tailorpo.prompts import PromptsConfig
from tailorpo.rewards import RewardConfig, RewardEntry
from tailorpo.settings import check_fields

OnAlarm = Literal["warn", "stop", "rollback", "raise_beta"]
Share = Annotated[float, Field(ge=0, le=1)]
Level = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """When a look is a warning and when an alarm. Each threshold can be null, which switches its rule off.

    Attributes:
        confidence: of the intervals over prompts that a finding needs.
        certain: of the interval at which one look is enough for an alarm; otherwise `confirm` looks in a row are.
        confirm: how many looks in a row have to agree on an alarm that is not certain (a fall, a collapse).
        fall: how far the judge may lie below its best look, as a share of what it had gained there.
        diversity: a warning once the upper end of the share of the base's diversity lies below.
        collapse: an alarm once it lies below this.
        drift: a warning once a low-level statistic has moved by more than this many of the base's spreads within a
            prompt, unless the judge has risen.
        disagreement: a warning once the share of sibling pictures that the rewards order differently has risen by more.
        kl_growth: a warning once the KL is so many times that of the judge's best look and the judge is no better; an
            alarm, without waiting for another look, if the trained reward has risen since and the judge has lost `fall`
            of a gain that was one.
        turn: an alarm, without waiting for another look or for the KL, once the interval at this level says that the
            judge has lost `fall` of its gain, while that gain and a rise of the trained reward since hold at
            `confidence`; a gain below a twentieth of the spread among the base's pictures of a prompt does not count.
            For looks at hundreds of pictures; then kl_growth can be null.
    """

    confidence: Level = 0.99
    certain: Level = 0.999
    confirm: Positive = 2
    fall: Share | None = 0.05
    diversity: Share | None = 0.85
    collapse: Share | None = 0.5
    drift: Annotated[float, Field(ge=0)] | None = 1.0
    disagreement: Share | None = 0.15
    kl_growth: Annotated[float, Field(gt=1)] | None = 1.5
    turn: Level | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.certain < self.confidence:
            raise ValueError(
                f"certain ({self.certain}) must be at least confidence ({self.confidence}): it is the stricter level"
            )
        if self.collapse is not None and self.diversity is not None and self.collapse > self.diversity:
            raise ValueError(
                f"collapse ({self.collapse}) must be at most diversity ({self.diversity}): the warning comes first"
            )


@dataclass(frozen=True, kw_only=True)
class Sentinels:
    """The `sentinels` section.

    Attributes:
        every: updates between looks.
        prompts: what is drawn at every look; null for the training's prompts.
        count: at most so many of them, spread evenly over the list.
        seeds: pictures per prompt; from two on diversity is measured.
        batch_size: pictures at once.
        judge: a reward that training does not use; null for eval.judge.
        rules: when a look is a warning or an alarm.
        on_alarm: "warn" says so and goes on; "stop" ends the training; "rollback" ends it with the weights of the look
            with the best judge; "raise_beta" ties the updates that follow closer to the reference.
        beta_raise: what beta is multiplied by at an alarm under "raise_beta".
    """

    every: Positive = 5
    prompts: PromptsConfig | None = None
    count: Positive = 16
    seeds: Positive = 2
    batch_size: Positive = 8
    judge: RewardConfig | None = None
    rules: Rules = field(default_factory=Rules)
    on_alarm: OnAlarm = "warn"
    beta_raise: Annotated[float, Field(gt=1)] = 2.0

    def __post_init__(self) -> None:
        check_fields(self)

    def judge_of(self, fallback: RewardConfig | None) -> RewardConfig | None:
        """The judge, eval's if this section names none."""
        return self.judge if self.judge is not None else fallback


def sentinel_problems(
    sentinels: Sentinels,
    *,
    judge: RewardConfig | None,
    rewards: Sequence[RewardEntry],
    algorithm: Algorithm | None,
) -> list[str]:
    """What cannot work with the rest of the run; `judge` is eval's."""
    problems: list[str] = []
    asked = sentinels.judge_of(judge)
    if asked is not None and asked in [entry.reward for entry in rewards]:
        where = "sentinels.judge" if sentinels.judge is not None else "eval.judge"
        problems.append(
            f"sentinels: the judge {asked.name} ({where}) is one of the training's rewards and would never object; name"
            " another one in sentinels.judge"
        )
    if sentinels.on_alarm == "rollback" and asked is None:
        problems.append(
            "sentinels.on_alarm is rollback, which goes back to the look with the best judge, and there is none: set"
            " sentinels.judge or eval.judge, or take stop"
        )
    if sentinels.on_alarm == "raise_beta" and algorithm is not None:
        if not isinstance(algorithm, TailorPO | D3PO | SPO):
            problems.append(
                f"sentinels.on_alarm is raise_beta, and {algorithm.name} has no beta that could be raised during"
                " training; take warn, stop or rollback"
            )
        elif not isinstance(algorithm.beta, int | float):  # pyright: ignore[reportUnnecessaryIsInstance]
            problems.append(
                "sentinels.on_alarm is raise_beta, and algorithm.beta is set by its own rule; take warn, stop or"
                " rollback"
            )
    return problems


def may_change(old: Sentinels | None, new: Sentinels | None) -> bool:
    """Whether a run that has begun with the first can go on with the second: its looks stay comparable, and nothing is
    needed that was not kept."""
    if new is None:
        return True
    if old is None or (new.on_alarm == "rollback" and old.on_alarm != "rollback"):
        return False
    return replace(old, rules=new.rules, on_alarm=new.on_alarm, beta_raise=new.beta_raise) == new
