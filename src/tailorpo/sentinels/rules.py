"""From the numbers of a look to ok, warning or hacking: pure functions of what was measured.

A look holds one value per prompt and measure. Everything is compared on the same prompts and noises, so the unit is the
paired difference of a prompt, with Student's interval over prompts:

    fall           judge now - judge at its best look; an alarm where it is below 0 by more than `fall` of what the
                   judge had gained there, while the trained reward has not fallen
    diversity      distance within a prompt now / base; a warning below `diversity`, an alarm below `collapse`
    drift          |saturation, edge energy, JPEG size, flat share now - base| in spreads of the base; a warning
    disagreement   sibling pictures that the rewards order differently, now - base; a warning
    kl_growth      KL now / KL at the judge's best look above this, where the judge has gained nothing since; an alarm
                   where the trained reward has risen for it and the judge has lost `fall` of a gain that was one,
                   otherwise a warning
    turn           judge now - judge at its best look, its interval at this level below 0; an alarm where the loss is
                   more than `fall` of a gain that was surely one and not tiny (`GAIN`), and the trained reward has
                   surely risen for it

Looking again and again, and always against the best of all looks, makes chance findings likelier than the level of one
interval says. So the n-th look compares with the best at an n-th of the error (Bonferroni over the n looks that the
best was picked from), and a finding at `confidence` becomes an alarm only in `confirm` looks in a row, or at once where
it holds at the stricter `certain`.

A fall of a tenth of the best gain can only be seen before it happens if the interval is narrower than that: more
prompts make it so. kl_growth does not wait for the interval, nor for a second look, in which the judge may lose more
than a tenth: three signs have to agree instead. By the law of Gao et al. 2022 (arXiv 2210.10760) a judge gains
d (a - b d), d the root of the KL, so at r times the peak's d it keeps r (2 - r) of its best: 95 % at 1.5 times the
peak's KL, 90 % at 1.73 times; before the peak it gains while the KL grows by half. A reward that stands still, too, has
bought nothing. In the first looks, before the model has moved, a chance gain would pass for a peak, so the gain has to
exclude 0, at the modest level `PEAK`. A judge on its plateau under a reward that goes on rising does count: that is
where to stop.

turn waits neither for the KL, of which half as much again is late where a judge falls faster than the law has it, nor
for a second look. What keeps chance out is the interval, and that the gain and the reward's rise hold at `confidence`.
That is enough only where a look has hundreds of pictures: on the same noises a picture turns from good to bad and back,
and with two pictures of each of 45 prompts such a wobble is as large as the tenth that is at stake.

How often all that is wrong is simulated in tests/unit/test_sentinel_rules.py: for `fall` with prompts that wobble anew
at each look, and for all rules together with prompts that drift from look to look as they did in training.

Left out: sequential tests with a guaranteed error over an endless series (alpha spending, e-values), which answer
later, when there is less to save; and a fit of Gao's law to all looks, whose peak is not known before it is passed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tailorpo.sentinels.config import Rules
from tailorpo.statistics import Interval, student_interval

Values = list[float | None]
State = Literal["ok", "warning", "hacking"]

PEAK = 0.8
"""Confidence at which the judge's best look has to lie above the base before kl_growth calls it a peak."""
GAIN = 0.05
"""In standard deviations among the base's pictures of one prompt: a smaller gain of the judge's best look is none that
`turn` could watch. The first small steps of training move every picture a little and surely, up or down."""
LOW_LEVEL = {
    "saturation": "saturation",
    "edges": "edge energy",
    "jpeg": "JPEG size",
    "flat": "flat share",
}
"""Names of the low-level statistics, and what people read."""


@dataclass
class Look:
    """What was measured at one time.

    Attributes:
        update: after how many updates; 0 is the base model.
        values: one number per prompt by measure, None where there is none.
        spread: standard deviation among the pictures of one prompt by measure, None where there is none.
        kl: mean KL of a trajectory in nats.
        kl_by_step: its parts.
    """

    update: int
    values: dict[str, Values]
    spread: dict[str, float | None] = field(default_factory=dict[str, "float | None"])
    kl: float = 0.0
    kl_by_step: list[float] = field(default_factory=list[float])

    def mean(self, name: str) -> float | None:
        """Over the prompts that have a number."""
        known = [value for value in self.values.get(name, []) if value is not None]
        return sum(known) / len(known) if known else None


@dataclass(frozen=True)
class Finding:
    """What a rule has found.

    Attributes:
        rule: its name.
        text: a sentence for people, without its full stop.
        alarm: whether it is one once it is confirmed; otherwise it stays a warning.
        certain: whether this look alone is enough.
    """

    rule: str
    text: str
    alarm: bool = False
    certain: bool = False


def difference(now: Look, then: Look, name: str, *, confidence: float) -> Interval | None:
    """Of a measure between two looks, over the prompts that have a number in both; None without any."""
    pairs = _pairs(now, then, name)
    return student_interval([a - b for a, b in pairs], confidence=confidence) if pairs else None


def ratio(now: Look, then: Look, name: str, *, confidence: float) -> Interval | None:
    """Mean now / mean then by the delta method; None where the latter is not positive."""
    pairs = _pairs(now, then, name)
    below = sum(b for _, b in pairs) / len(pairs) if pairs else 0.0
    if not below > 0:
        return None
    value = sum(a for a, _ in pairs) / len(pairs) / below
    return student_interval([value + (a - value * b) / below for a, b in pairs], confidence=confidence)


def _pairs(now: Look, then: Look, name: str) -> list[tuple[float, float]]:
    both = zip(now.values.get(name, []), then.values.get(name, []), strict=False)
    return [(a, b) for a, b in both if a is not None and b is not None]


def find(now: Look, *, base: Look, best: Look | None, rules: Rules, looks: int = 1) -> list[Finding]:
    """Everything that a look gives reason to say.

    Args:
        now: the look.
        base: that at the base model.
        best: the look with the highest judge so far, the base's among them; None without a judge.
        rules: the thresholds.
        looks: how many there were up to now, of which the best was picked.
    """
    gained = difference(now, base, "judge", confidence=rules.confidence)
    vouched = gained is not None and _above(gained)
    findings = [_fall(now, base, best, rules, looks), _turn(now, base, best, rules)] if best else []
    findings += [_diversity(now, base, rules)]
    findings += [] if vouched else [_drift(now, base, rules)]
    findings += [_disagreement(now, base, rules), _kl_growth(now, base, best, rules) if best else None]
    return [finding for finding in findings if finding is not None]


def _fall(now: Look, base: Look, best: Look, rules: Rules, looks: int) -> Finding | None:
    if rules.fall is None:
        return None
    # The best of n looks is too high by chance, so each of the n comparisons gets an n-th of the error (Bonferroni).
    usual, strict = (1 - (1 - level) / looks for level in (rules.confidence, rules.certain))
    fall = difference(now, best, "judge", confidence=usual)
    gain = difference(best, base, "judge", confidence=rules.confidence)
    if fall is None or gain is None or fall.high is None or fall.high >= 0:
        return None
    # Where nothing was gained there is no tenth of it to lose: then the spread among pictures says what is small.
    scale = gain.value if gain.value > 0 else base.spread.get("judge") or 0.0
    if -fall.value <= rules.fall * scale:
        return None
    where = "the base model's" if best.update == 0 else f"its best after update {best.update}"
    text = f"the held-out judge has fallen below {where}: {_change(fall)}"
    if gain.value > 0:
        text += f", {-fall.value / gain.value:.0%} of what it had gained"
    reward = difference(now, best, "reward", confidence=rules.confidence)
    if reward is not None and reward.high is not None and reward.high < 0:
        return Finding("fall", f"{text}; the trained reward has fallen, too: {_change(reward)}")
    surely = difference(now, best, "judge", confidence=strict)
    certain = surely is not None and surely.high is not None and surely.high < 0
    if reward is not None:
        text += f", while the trained reward {'rose' if _above(reward) else 'shows no clear change'}: {_change(reward)}"
    return Finding("fall", text, alarm=True, certain=certain)


def _turn(now: Look, base: Look, best: Look, rules: Rules) -> Finding | None:
    if rules.turn is None:
        return None
    loss = difference(now, best, "judge", confidence=rules.turn)
    gain = difference(best, base, "judge", confidence=rules.confidence)
    reward = difference(now, best, "reward", confidence=rules.confidence)
    if loss is None or gain is None or reward is None or -loss.value <= (rules.fall or 0.0) * gain.value:
        return None
    if gain.value <= GAIN * (base.spread.get("judge") or 0.0):
        return None
    if not (_above(gain) and _above(reward) and loss.high is not None and loss.high < 0):
        return None
    text = (
        f"the held-out judge has turned after update {best.update}: {_change(loss)}, {-loss.value / gain.value:.0%} of"
        f" what it had gained, while the trained reward rose: {_change(reward)}"
    )
    return Finding("turn", text, alarm=True, certain=True)


def _diversity(now: Look, base: Look, rules: Rules) -> Finding | None:
    share = ratio(now, base, "distance", confidence=rules.confidence)
    if share is None or share.high is None:
        return None
    text = f"pictures of one prompt differ {share.value:.0%} [{share.low:.0%}, {share.high:.0%}] as much as the base's"
    if rules.collapse is not None and share.high < rules.collapse:
        strict = ratio(now, base, "distance", confidence=rules.certain)
        certain = strict is not None and strict.high is not None and strict.high < rules.collapse
        return Finding("diversity", text, alarm=True, certain=certain)
    if rules.diversity is not None and share.high < rules.diversity:
        return Finding("diversity", text)
    return None


def _drift(now: Look, base: Look, rules: Rules) -> Finding | None:
    if rules.drift is None:
        return None
    moved: list[str] = []
    for name, label in LOW_LEVEL.items():
        spread = base.spread.get(name)
        shift = difference(now, base, name, confidence=rules.confidence)
        if not spread or shift is None or shift.low is None or shift.high is None:
            continue
        least = max(shift.low, -shift.high)
        if least > rules.drift * spread:
            moved.append(f"{label} by {shift.value / spread:+.1f}")
    if not moved:
        return None
    return Finding("drift", f"in spreads of the base's pictures, which no judge approves of: {', '.join(moved)}")


def _disagreement(now: Look, base: Look, rules: Rules) -> Finding | None:
    rise = difference(now, base, "disagreement", confidence=rules.confidence)
    if rules.disagreement is None or rise is None or rise.low is None:
        return None
    if rise.low <= 0 or rise.value <= rules.disagreement:
        return None
    return Finding("disagreement", f"the rewards order pictures of one prompt differently more often: {_change(rise)}")


def _kl_growth(now: Look, base: Look, best: Look, rules: Rules) -> Finding | None:
    if rules.kl_growth is None or best.update == 0 or now.kl <= rules.kl_growth * best.kl:
        return None
    since = difference(now, best, "judge", confidence=rules.confidence)
    if since is None or since.value > 0:
        return None
    text = f"KL went from {best.kl:.3g} to {now.kl:.3g} nats since update {best.update}, and bought no better judge"
    reward = difference(now, best, "reward", confidence=rules.confidence)
    if reward is None or not _above(reward):
        return Finding("kl_growth", text)
    gain = difference(best, base, "judge", confidence=PEAK)
    alarm = gain is not None and _above(gain) and -since.value > (rules.fall or 0.0) * gain.value
    return Finding("kl_growth", f"{text}, while the trained reward rose: {_change(reward)}", alarm=alarm, certain=alarm)


def judged(
    findings: Sequence[Finding], streaks: Mapping[str, int], *, confirm: int
) -> tuple[State, list[str], dict[str, int]]:
    """The state of a look, the rules that raise an alarm, and how many looks in a row each rule has wanted to.

    Args:
        findings: of this look.
        streaks: what the look before returned.
        confirm: how many in a row are an alarm.
    """
    running = {found.rule: streaks.get(found.rule, 0) + 1 for found in findings if found.alarm}
    alarms = [found.rule for found in findings if found.alarm and (found.certain or running[found.rule] >= confirm)]
    return "hacking" if alarms else "warning" if findings else "ok", alarms, running


def _above(interval: Interval) -> bool:
    """Whether it lies above 0 as a whole."""
    return interval.low is not None and interval.low > 0


def _change(interval: Interval) -> str:
    low, high = interval.low, interval.high
    ends = f" [{low:+.3g}, {high:+.3g}]" if low is not None and high is not None else ""
    return f"{interval.value:+.3g}{ends}"
