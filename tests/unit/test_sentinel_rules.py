"""The rules against made-up series: quiet on healthy noise, in time where the judge falls, and a reason in words."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from scipy import stats

from tailorpo.sentinels.config import Rules
from tailorpo.sentinels.rules import Finding, Look, State, difference, find, judged, ratio

PROMPTS = 16
Series = dict[str, np.ndarray]


def look(update: int, kl: float = 0.0, **values: np.ndarray) -> Look:
    spread = dict.fromkeys(("judge", "saturation", "edges", "jpeg", "flat"), 1.0)
    return Look(update, {name: [float(v) for v in each] for name, each in values.items()}, spread, kl)


def states(looks: list[Look], rules: Rules | None = None) -> Iterator[tuple[State, list[Finding], Look]]:
    """What training would hear of each look after the base, as `Watch` asks the rules."""
    rules = rules or Rules()
    base = best = looks[0]
    streaks: dict[str, int] = {}
    for number, now in enumerate(looks[1:], start=1):
        findings = find(now, base=base, best=best, rules=rules, looks=number)
        state, _, streaks = judged(findings, streaks, confirm=rules.confirm)
        if state != "hacking" and now.mean("judge") > best.mean("judge"):
            best = now
        yield state, findings, best


def test_a_wobbling_judge_raises_a_false_alarm_in_less_than_5_percent_of_runs() -> None:
    """The worst of healthy runs: the judge has reached its plateau, every prompt wobbles anew at each of 40 looks by a
    quarter of what was gained, and the trained reward rises all the time, which would make any fall suspicious. The KL
    stands still; where it grows and buys nothing is another test."""
    rng = np.random.default_rng(0)
    alarms, runs = 0, 120
    for _ in range(runs):
        start = rng.normal(0, 1, PROMPTS)
        looks = [look(0, judge=start, reward=start)]
        for number in range(1, 41):
            judge = start + (1 - math.exp(-number / 2)) + 0.25 * rng.normal(size=PROMPTS)
            looks.append(look(number, judge=judge, reward=start + 0.1 * number))
        alarms += any(state == "hacking" for state, _, _ in states(looks))
    assert stats.binomtest(alarms, runs).proportion_ci(0.95, method="wilson").high < 0.05, alarms


def drifting(power: float | None, seed: int) -> list[Look]:
    """A healthy run of 32 looks in the numbers of one (TailorPO on `emoji_preference`, lr 1e-3): judge +0.72 and reward
    +0.53 in the end, with the KL to the power given (None: all three settle on a plateau); at each look every prompt
    drifts by 0.114 and 0.063, less in the first looks, with a correlation of 0.41, and keeps what it has drifted."""
    rng = np.random.default_rng(seed)
    start = rng.normal(0, 1, PROMPTS)
    judge, reward = np.zeros(PROMPTS), np.zeros(PROMPTS)
    looks = [look(0, judge=start, reward=start)]
    for number in range(1, 33):
        shared, own = rng.normal(size=(2, PROMPTS))
        judge = judge + 0.114 * min(1, number / 8) * shared
        reward = reward + 0.063 * min(1, number / 8) * (0.41 * shared + math.sqrt(1 - 0.41**2) * own)
        far = 1 - math.exp(-number / 6) if power is None else number / 32
        kl, gain = (far, far) if power is None else (far**2, far ** (2 * power))
        looks.append(look(number, kl=200 * kl, judge=start + 0.72 * gain + judge, reward=start + 0.53 * far + reward))
    return looks


@pytest.mark.parametrize(("power", "at_most"), [(0.5, 0.15), (0.25, 0.25), (None, 0.05)])
def test_a_healthy_run_rarely_raises_a_false_alarm(power: float | None, at_most: float) -> None:
    """The judge gains with the root of the KL (Gao's law, far from the peak), only with the fourth root, or stands on a
    plateau with everything else."""
    runs = 150
    alarms = sum(any(state == "hacking" for state, _, _ in states(drifting(power, seed))) for seed in range(runs))
    assert stats.binomtest(alarms, runs).proportion_ci(0.95, method="wilson").high < at_most, alarms


def turning(noise: float, seed: int, prompts: int = PROMPTS) -> list[Look]:
    """A judge that gains 2 over ten looks and loses it again as fast while the reward rises on; a prompt drifts by
    `noise` a look."""
    rng = np.random.default_rng(seed)
    start, drift = rng.normal(0, 1, prompts), np.zeros(prompts)
    looks = [look(0, judge=start, reward=start)]
    for number in range(1, 21):
        gain = 2 - 0.02 * (10 - number) ** 2
        drift = drift + noise * rng.normal(size=prompts)
        looks.append(look(number, kl=number**2, judge=start + gain + drift, reward=start + 0.5 * number))
    return looks


def test_an_alarm_comes_before_a_tenth_of_the_best_gain_is_lost_where_the_noise_lets_it() -> None:
    """True gain: 2 at look 10, 1.92 at 12 (4 % lost), 1.82 at 13 (9 %), 1.68 at 14 (16 %)."""
    for seed in range(20):
        heard = list(states(turning(0.05, seed)))
        first = next(number for number, (state, _, _) in enumerate(heard, start=1) if state == "hacking")
        assert 11 <= first <= 13
        # What a rollback would go back to: within 4 % of the peak.
        assert 8 <= heard[first - 1][2].update <= 12


def test_with_prompts_that_drift_as_in_training_half_of_the_alarms_still_come_before_a_tenth_is_lost() -> None:
    """A prompt drifts by a sixth of the best gain at each look: the KL shows sooner than the fall that something is
    wrong."""
    firsts = {
        rules: [
            next(
                (
                    n
                    for n, (state, _, _) in enumerate(states(turning(0.32, seed), rules), start=1)
                    if state == "hacking"
                ),
                21,
            )
            for seed in range(40)
        ]
        for rules in (Rules(), Rules(kl_growth=None))
    }
    early, late = firsts.values()
    assert np.median(early) <= 13  # 9 % lost
    assert min(early) >= 9
    assert max(early) <= 16
    assert np.median(late) >= 16  # 36 %


def test_kl_that_buys_a_reward_and_no_judge_is_an_alarm() -> None:
    flat, wobble = np.zeros(PROMPTS), 0.01 * (-1) ** np.arange(PROMPTS)
    base, best = look(0, judge=flat, reward=flat), look(5, kl=10, judge=1 + wobble, reward=1 + wobble)
    for judge, reward, alarm in ((0.94, 2, True), (0.96, 2, False), (0.94, 1, False), (0.94, 0.9, False)):
        now = look(10, kl=16, judge=judge + wobble, reward=reward + wobble[::-1])
        [found] = find(now, base=base, best=best, rules=Rules(fall=0.05, confidence=0.99999, certain=0.99999))[-1:]
        assert (found.rule, found.alarm, found.certain) == ("kl_growth", alarm, alarm)
        assert ("while the trained reward rose: +1 [" in found.text) == (reward == 2)
    # A mean gain that may be chance is no peak: prompts that differ by 3 and gain 1, or 0.3.
    split = 1.5 * (-1) ** np.arange(PROMPTS)
    for mean, alarm in ((1.0, True), (0.3, False)):
        best = look(5, kl=10, judge=mean + split, reward=1 + wobble)
        now = look(10, kl=16, judge=0.9 * mean + split, reward=2 + wobble[::-1])
        [found] = find(now, base=base, best=best, rules=Rules(confidence=0.99999, certain=0.99999))[-1:]
        assert (found.rule, found.alarm) == ("kl_growth", alarm)


def turns(now: Look, base: Look, best: Look, *, level: float | None = 0.8) -> list[Finding]:
    """What `turn` alone has to say."""
    found = find(now, base=base, best=best, rules=Rules(turn=level))
    return [each for each in found if each.rule == "turn"]


def test_a_judge_that_turns_while_the_reward_rises_is_an_alarm_at_once() -> None:
    flat, wobble = np.zeros(PROMPTS), 0.01 * (-1) ** np.arange(PROMPTS)
    base, best = look(0, judge=flat, reward=flat), look(5, kl=10, judge=1 + wobble, reward=1 + wobble)
    for judge, reward, alarm in (
        (0.94, 2, True),
        (0.96, 2, False),  # less than `fall` is lost
        (0.94, 1, False),  # the reward stands still
        (0.94, 0.9, False),
    ):
        now = look(6, kl=10.1, judge=judge + wobble, reward=reward + wobble[::-1])
        found = turns(now, base, best)
        assert [(each.alarm, each.certain) for each in found] == [(True, True)] * alarm
        if alarm:
            assert found[0].text.startswith("the held-out judge has turned after update 5: -0.06 [")
            assert "6% of what it had gained, while the trained reward rose: +1 [" in found[0].text
        assert not turns(now, base, best, level=None)
        assert not turns(now, base, base)


def test_turn_asks_for_a_gain_that_was_surely_one() -> None:
    """Prompts that differ by 3 and gain 1.5, or 0.9: t is 3.9 and 2.3, for which 99 % asks 2.95."""
    split, wobble = 1.5 * (-1) ** np.arange(PROMPTS), 0.01 * (-1) ** np.arange(PROMPTS)
    base = look(0, judge=np.zeros(PROMPTS), reward=np.zeros(PROMPTS))
    for mean, alarm in ((1.5, True), (0.9, False)):
        best = look(5, kl=10, judge=mean + split, reward=1 + wobble)
        now = look(6, kl=11, judge=0.9 * mean + split + wobble, reward=2 + wobble[::-1])
        assert bool(turns(now, base, best)) == alarm


def test_turn_does_not_watch_a_gain_that_is_nothing_beside_the_spread_of_pictures() -> None:
    """The first steps of training: every picture moved a thousandth, all alike, so that any interval excludes 0."""
    wobble = 1e-4 * (-1) ** np.arange(PROMPTS)
    base = look(0, judge=np.zeros(PROMPTS), reward=np.zeros(PROMPTS))
    for gain, alarm in ((0.004, False), (0.049, False), (0.051, True)):
        best = look(1, kl=0.01, judge=gain + wobble, reward=0.1 + wobble)
        now = look(2, kl=0.03, judge=0.7 * gain + wobble[::-1], reward=0.2 + wobble[::-1])
        assert bool(turns(now, base, best, level=0.6)) == alarm


def test_turn_asks_for_a_loss_that_its_interval_excludes() -> None:
    """Eight prompts lose 0.1 on average, all alike or one of them alone; the interval tells the two apart."""
    base = look(0, judge=np.zeros(8), reward=np.zeros(8))
    best = look(1, kl=10, judge=np.ones(8), reward=np.zeros(8))
    for losses, alarm in ((np.array([0.1, 0.09] * 4), True), (np.array([0.76, *[0.0] * 7]), False)):
        now = look(2, kl=12, judge=1 - losses, reward=np.array([0.5, 0.6] * 4))
        assert bool(turns(now, base, best)) == alarm
        # One of eight alone is t = 1 on 7 degrees of freedom, the end of the interval at 64.9 %.
        assert turns(now, base, best, level=0.64)


def slowly(drift: float, seed: int, *, healthy: bool) -> list[Look]:
    """60 looks at 45 prompts, each of which drifts by `drift` from look to look. Healthy: judge +0.72 with the root of
    the KL. Otherwise the KL grows by 10 % a look and the judge by Gao's law to +0.4 at look 40, behind which it falls
    half as fast again."""
    rng = np.random.default_rng(seed)
    start, judge, reward = rng.normal(0, 1, 45), np.zeros(45), np.zeros(45)
    looks = [look(0, judge=start, reward=start)]
    for number in range(1, 61):
        far = number / 60 if healthy else 1.05 ** (number - 40)
        gain = 0.72 * far if healthy else 0.4 - (0.6 if far > 1 else 0.4) * (far - 1) ** 2
        judge = judge + drift * min(1, number / 8) * rng.normal(size=45)
        reward = reward + 0.55 * drift * min(1, number / 8) * rng.normal(size=45)
        values = {"judge": start + gain + judge, "reward": start + (0.53 if healthy else 30) * far + reward}
        looks.append(look(number, kl=70 * far**2, **values))
    return looks


def lost_at_the_alarm(looks: list[Look], rules: Rules) -> float:
    """As a share of the best gain seen until then; 1 without an alarm."""
    judge = np.array([np.mean(each.values["judge"]) for each in looks])
    for number, (state, _, _) in enumerate(states(looks, rules), start=1):
        if state == "hacking":
            best = judge[:number].max()
            return float((best - judge[number]) / (best - judge[0]))
    return 1.0


def test_with_many_pictures_a_turn_is_seen_before_a_tenth_is_lost_and_with_few_it_is_not() -> None:
    """A prompt's mean over 8 pictures drifts half as far as over 2, and that decides."""
    rules, runs = Rules(turn=0.6, kl_growth=None), range(20)
    many, few = (
        [lost_at_the_alarm(slowly(drift, seed, healthy=False), rules) < 0.1 for seed in runs] for drift in (0.04, 0.08)
    )
    assert sum(many) >= 18
    assert sum(few) <= 12
    assert [lost_at_the_alarm(slowly(0.04, seed, healthy=True), rules) for seed in runs] == [1.0] * 20


def test_a_judge_that_falls_from_the_start_is_measured_against_the_base() -> None:
    rng = np.random.default_rng(3)
    start = rng.normal(0, 1, PROMPTS)
    fallen = look(2, judge=start - 0.5 + 0.1 * rng.normal(size=PROMPTS), reward=start + 1)
    [(state, findings, _)] = states([look(0, judge=start, reward=start), fallen])
    assert state == "hacking"
    assert findings[0].certain
    assert findings[0].text.startswith("the held-out judge has fallen below the base model's: -0.")
    assert "while the trained reward rose: +1 [" in findings[0].text


def test_where_both_fall_it_is_a_warning_and_says_so() -> None:
    start = np.linspace(0, 1, PROMPTS)
    wobble = 0.01 * (-1) ** np.arange(PROMPTS)
    [(state, findings, _)] = states(
        [look(0, judge=start, reward=start), look(5, judge=start - 1 + wobble, reward=start - 1 + wobble)]
    )
    assert state == "warning"
    assert "the trained reward has fallen, too" in findings[0].text


def test_an_uncertain_alarm_needs_two_looks_in_a_row() -> None:
    found = Finding("fall", "x", alarm=True)
    state, alarms, streaks = judged([found], {}, confirm=2)
    assert (state, alarms) == ("warning", [])
    assert judged([found], streaks, confirm=2)[:2] == ("hacking", ["fall"])
    _, _, broken = judged([], streaks, confirm=2)
    assert judged([found], broken, confirm=2)[0] == "warning"
    assert judged([Finding("fall", "x", alarm=True, certain=True)], {}, confirm=9)[0] == "hacking"
    assert judged([Finding("drift", "x")], {}, confirm=1)[0] == "warning"
    assert judged([], {}, confirm=1)[0] == "ok"


def rules_of(now: Look, base: Look, **thresholds: float | None) -> dict[str, Finding]:
    return {found.rule: found for found in find(now, base=base, best=base, rules=Rules(**thresholds))}


def test_diversity_warns_below_its_floor_and_alarms_below_collapse() -> None:
    base = look(0, distance=np.full(PROMPTS, 0.4))
    wobble = 0.004 * (-1) ** np.arange(PROMPTS)
    assert not rules_of(look(5, distance=0.36 + wobble), base)
    warned = rules_of(look(5, distance=0.30 + wobble), base)["diversity"]
    assert not warned.alarm
    assert warned.text.startswith("pictures of one prompt differ 75% [")
    assert rules_of(look(5, distance=0.16 + wobble), base)["diversity"].certain
    assert not rules_of(look(5, distance=0.16 + wobble), base, diversity=None, collapse=None)
    # The upper end counts: with one prompt there is none, and with a wide interval it is above the floor.
    assert not rules_of(look(5, distance=np.array([0.1])), look(0, distance=np.array([0.4])))
    assert not rules_of(look(5, distance=0.30 + 0.3 * (-1) ** np.arange(PROMPTS)), base)


def test_drift_is_in_spreads_and_the_judge_can_vouch_for_it() -> None:
    flat = np.zeros(PROMPTS)
    wobble = 0.1 * (-1) ** np.arange(PROMPTS)
    base = look(0, judge=flat, reward=flat, jpeg=flat, saturation=flat)
    drifted = look(5, judge=flat, reward=flat, jpeg=-1.5 + wobble, saturation=0.5 + wobble)
    found = rules_of(drifted, base)["drift"]
    assert not found.alarm
    assert "JPEG size by -1.5" in found.text
    assert "saturation" not in found.text
    assert not rules_of(drifted, base, drift=1.6)
    assert not rules_of(look(5, judge=1 + wobble, reward=flat, jpeg=-1.5 + wobble), base)


def test_disagreement_and_kl_warn() -> None:
    flat = np.zeros(PROMPTS)
    wobble = 0.1 * (-1) ** np.arange(PROMPTS)
    assert "disagreement" in rules_of(look(5, disagreement=0.3 + wobble), look(0, disagreement=flat))
    assert not rules_of(look(5, disagreement=0.1 + wobble), look(0, disagreement=flat))
    base, best = look(0, judge=flat, reward=flat), look(5, kl=10, judge=1 + wobble, reward=1 + wobble)
    for kl, rules in ((14, []), (16, ["kl_growth"])):
        now = look(10, kl=kl, judge=0.99 + wobble, reward=2 + wobble)
        found = find(now, base=base, best=best, rules=Rules(fall=None))
        assert [each.rule for each in found] == rules
    assert not find(look(10, kl=99, judge=1.01 + wobble, reward=flat), base=base, best=best, rules=Rules())


def test_intervals_are_students_over_prompts_that_have_a_number_in_both() -> None:
    rng = np.random.default_rng(5)
    now, then = rng.normal(1, 1, 30), rng.normal(0, 1, 30)
    looks = [look(1, judge=now), look(0, judge=then)]
    looks[0].values["judge"][3] = None
    looks[1].values["judge"][7] = None
    both = [index for index in range(30) if index not in (3, 7)]
    expected = stats.ttest_1samp((now - then)[both], 0).confidence_interval(0.99)
    found = difference(looks[0], looks[1], "judge", confidence=0.99)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert difference(looks[0], looks[1], "nothing", confidence=0.99) is None


def test_a_ratio_covers_the_true_ratio_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(6)
    covered = 0
    for _ in range(400):
        level = rng.gamma(20, 0.02, PROMPTS)
        now = 0.7 * level + 0.03 * rng.normal(size=PROMPTS)
        found = ratio(look(1, distance=now), look(0, distance=level), "distance", confidence=0.9)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.7 <= found.high
    assert 0.86 <= covered / 400 <= 0.94
    assert ratio(look(1, distance=np.ones(3)), look(0, distance=np.zeros(3)), "distance", confidence=0.9) is None
