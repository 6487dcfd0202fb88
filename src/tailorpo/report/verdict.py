"""The report's headline: what the numbers of an evaluation say, in plain words, and no more than they say.

A change counts only where its confidence interval excludes zero. A rise of the trained reward alone proves nothing
about the pictures: the headline is good only if a judge that training never saw rises too, and warns where it falls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tailorpo.sentinels.series import ended_text, kept_update

Row = Mapping[str, Any]
State = Literal["up", "down", "flat", "same", "unknown"]
Tone = Literal["good", "caution", "bad", "neutral"]

MINUS, ARROW, PERCENT = "\u2212", "\u2192", "\u202f%"
DIVERSITY_FLOOR = 0.85
"""Below this share of the base model's diversity the report warns (research notes, section E)."""

EQUAL_JUDGE = 0.9
"""So much of what the weighted base keeps at the same judge is no loss beyond the price of quality."""

SLIGHT = 0.1
"""A change below this share of the spread among the base model's pictures of one prompt is called slight."""


@dataclass(frozen=True)
class Figure:
    """One of the large numbers below the headline."""

    label: str
    value: str
    interval: str
    detail: str
    tone: Tone


@dataclass
class Verdict:
    """The headline with its tone, sentences below it, and large numbers."""

    tone: Tone
    headline: str
    sentences: list[str] = field(default_factory=list[str])
    figures: list[Figure] = field(default_factory=list[Figure])


def state(row: Row | None) -> State:
    """What an interval says: up or down if it excludes zero, "same" for differences that are all exactly zero."""
    if row is None or row.get("low") is None or row.get("high") is None:
        return "unknown"
    if row["low"] == 0 == row["high"] and not row.get("wins") and not row.get("losses"):
        return "same"
    return "up" if row["low"] > 0 else "down" if row["high"] < 0 else "flat"


def number(value: float | None, *, digits: int = 2, sign: bool = False) -> str:
    """A number as people write it: a real minus sign, and a plus where asked for."""
    if value is None or not math.isfinite(value):
        return "\u2013"
    text = f"{value:{'+' if sign else ''},.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def digits_of(row: Row) -> int:
    """Decimals that show an interval's width with two digits, or a value's size where there is no interval."""
    low, high = row.get("low"), row.get("high")
    size = (high - low) / 2 if low is not None and high is not None and high > low else abs(row.get("base") or 1.0) / 10
    return min(4, max(0, 1 - math.floor(math.log10(size)))) if size > 0 else 2


def percent(value: float | None, *, sign: bool = False) -> str:
    """A share as a whole number of per cent."""
    return number(None if value is None else 100 * value, digits=0, sign=sign) + (PERCENT if value is not None else "")


def interval_text(row: Row) -> str:
    """The ends of a difference's interval in brackets; empty where there is none."""
    if row.get("low") is None or row.get("high") is None:
        return ""
    digits = digits_of(row)
    return f"[{number(row['low'], digits=digits)}, {number(row['high'], digits=digits)}]"


def change(row: Row) -> str:
    """A difference with its sign and interval: "+1.21 [0.98, 1.45]"."""
    return f"{number(row['difference'], digits=digits_of(row), sign=True)} {interval_text(row)}".strip()


def judge_run(evaluation: Mapping[str, Any] | None, rows: Sequence[Row], *, target: int | None) -> Verdict:
    """The verdict of a run.

    Args:
        evaluation: the content of eval.json, None if there is none.
        rows: of metrics.jsonl.
        target: how many updates the run file asks for, None if it cannot be read.
    """
    done = int(rows[-1]["update"]) if rows else 0
    verdict = _evaluated(evaluation) if evaluation else _unevaluated(rows)
    end = ended_text(rows)
    if end is not None:
        verdict.sentences.insert(0, end)
        done = kept_update(rows)
    elif target is not None and done < target:
        verdict.sentences.append(
            f"The run is not finished: {done:,} of {target:,} updates are done. `tailorpo resume` continues it."
        )
    if evaluation and int(evaluation["update"]) != done:
        verdict.sentences.append(f"The evaluation is of update {evaluation['update']:,}; training is at {done:,}.")
    return verdict


def _unevaluated(rows: Sequence[Row]) -> Verdict:
    if not rows:
        return Verdict("neutral", "Nothing has been trained yet.", ["There are no finished updates to show."])
    verdict = Verdict("neutral", "Trained, but not evaluated yet.")
    values = [float(row["reward_mean"]) for row in rows if isinstance(row.get("reward_mean"), int | float)]
    part = max(1, len(values) // 5)
    if len(values) >= 2:
        first, last = sum(values[:part]) / part, sum(values[-part:]) / part
        verdict.sentences.append(
            f"During training the mean reward of the candidates went from {number(first)} to {number(last)} (means of "
            f"the first and last {part} updates). Prompts and noises differ between updates, so this is no comparison."
        )
    verdict.sentences.append("`tailorpo eval` compares the base and the aligned model on equal prompts and seeds.")
    return verdict


def _evaluated(evaluation: Mapping[str, Any]) -> Verdict:
    groups, settings = evaluation["groups"], evaluation["settings"]
    everything: Mapping[str, Row | None] = groups["all"]["metrics"]
    reward = everything.get("reward")
    held_out = bool(settings.get("judge_held_out"))
    judge = everything.get("judge") if held_out else None
    spreads = {key: metric.get("spread") for key, metric in evaluation["metrics"].items()}
    slight = {key: _slight(everything.get(key), spreads.get(key)) for key in ("reward", "judge")}
    tone, headline = _headline(state(reward), state(judge) if judge else None, slight=slight)
    verdict = Verdict(tone, headline)
    names = {key: str(metric["label"]) for key, metric in evaluation["metrics"].items()}
    if reward:
        verdict.sentences.append(_sentence(f"the trained reward ({names['reward']})", reward))
        verdict.figures.append(_figure("Trained reward", reward))
    if judge:
        sentence = _sentence(f"the held-out judge ({names['judge']})", judge)
        good = everything.get("good")
        if good:
            sentence += f" It calls {percent(good['aligned'])} of the pictures good, {percent(good['base'])} before."
        verdict.sentences.append(sentence)
        verdict.figures.append(_figure("Held-out judge", judge))
        if good:
            verdict.figures.append(_good_figure(good))
    elif settings.get("judge"):
        verdict.sentences.append("The judge is one of the training rewards, so it is no independent check.")
    else:
        verdict.sentences.append(
            "No held-out judge was set (eval.judge), so nothing here is independent of the training."
        )
    if "seen" in groups and "unseen" in groups:
        verdict.sentences += _unseen(groups["unseen"]["metrics"], held_out=held_out)
    _diversity(verdict, everything, settings, groups["all"].get("weighted_base"))
    prompts, seeds = groups["all"]["prompts"], settings["seeds"]
    verdict.sentences.append(
        f"Brackets: {percent(settings['confidence'])} intervals over {prompts} prompts with {seeds} "
        f"{'seed' if seeds == 1 else 'seeds'} each; base and aligned draw from the same noise."
    )
    return verdict


def _slight(row: Row | None, spread: float | None) -> bool:
    """Whether a change is small beside the differences among the base model's pictures of one prompt."""
    return row is not None and spread is not None and abs(row["difference"]) < SLIGHT * spread


def _headline(reward: State, judge: State | None, *, slight: Mapping[str, bool]) -> tuple[Tone, str]:
    rose, better = ("rose slightly", "slightly better") if slight["reward"] else ("rose", "better")
    if reward == "same":
        return "neutral", "Nothing changed: base and aligned draw the same pictures."
    if reward == "unknown":
        return "neutral", "One prompt is too few to tell."
    if reward == "up":
        if judge is None:
            return "caution", f"The trained reward {rose}; no independent judge was asked."
        if judge == "up":
            better = "slightly better" if slight["judge"] else better
            return "good", f"The pictures got {better}, and a judge that training never saw agrees."
        if judge == "down" and slight["judge"]:
            return "caution", f"The trained reward {rose}; the held-out judge fell slightly."
        if judge == "down":
            return "bad", f"The trained reward {rose}, but the held-out judge finds the pictures worse."
        return "caution", f"The trained reward {rose}; the held-out judge sees no clear change."
    if reward == "down":
        return "bad", "The trained reward fell."
    if judge == "down":
        return "bad", "The trained reward shows no clear change, and the held-out judge fell."
    if judge == "up":
        return "caution", "The held-out judge rose, but the trained reward shows no clear change."
    return "neutral", "No clear change."


def _sentence(subject: str, row: Row) -> str:
    digits = digits_of(row)
    what = state(row)
    levels = f"from {number(row['base'], digits=digits)} to {number(row['aligned'], digits=digits)}"
    wins = f"higher on {row['wins']} of {row['n']} prompts"
    subject = subject[0].upper() + subject[1:]
    if what == "same":
        return f"{subject} is exactly the same on every prompt."
    if what == "unknown":
        return f"{subject} went {levels}; one prompt gives no interval."
    if what == "flat":
        return f"{subject} shows no clear change: {change(row)}, an interval that includes zero ({levels}, {wins})."
    verb = "rose" if what == "up" else "fell"
    size = number(abs(row["difference"]), digits=digits)
    ends = sorted((abs(row["low"]), abs(row["high"])))
    interval = f"[{number(ends[0], digits=digits)}, {number(ends[1], digits=digits)}]"
    return f"{subject} {verb} by {size} {interval}, {levels}, and is {wins}."


def _unseen(metrics: Mapping[str, Row | None], *, held_out: bool) -> list[str]:
    parts = [
        f"{label} {change(row)}{'' if state(row) in ('up', 'down') else ' (no clear change)'}"
        for key, label in (("reward", "trained reward"), ("judge", "judge"))
        if (row := metrics.get(key)) and (key == "reward" or held_out)
    ]
    return [f"On prompts that training never saw: {', '.join(parts)}."] if parts else []


def _tone(row: Row) -> Tone:
    what = state(row)
    return "good" if what == "up" else "bad" if what == "down" else "neutral"


def _figure(label: str, row: Row) -> Figure:
    digits = digits_of(row)
    detail = f"{number(row['base'], digits=digits)} {ARROW} {number(row['aligned'], digits=digits)}"
    return Figure(label, number(row["difference"], digits=digits, sign=True), interval_text(row), detail, _tone(row))


def _good_figure(row: Row) -> Figure:
    interval = ""
    if row["low"] is not None and row["high"] is not None:
        ends = (number(100 * row[key], digits=0) for key in ("low", "high"))
        interval = f"{number(100 * row['difference'], digits=0, sign=True)} points [{', '.join(ends)}]"
    return Figure("Good pictures", percent(row["aligned"]), interval, f"{percent(row['base'])} before", _tone(row))


def _ratio_interval(row: Row) -> str:
    low, high = row.get("ratio_low"), row.get("ratio_high")
    return f"[{percent(low)}, {percent(high)}]" if low is not None and high is not None else ""


def _diversity(
    verdict: Verdict, metrics: Mapping[str, Row | None], settings: Mapping[str, Any], weighted: Row | None
) -> None:
    row = metrics.get("distance")
    if not row or row.get("ratio") is None:
        return
    ratio, interval = row["ratio"], _ratio_interval(row)
    lost = ratio < DIVERSITY_FLOOR
    embedding = settings["embedding"]
    place = "on reduced pixels" if embedding == "pixels" else f"in the features of {embedding}"
    verdict.figures.append(
        Figure("Diversity", percent(ratio), interval, "of the base model's", "caution" if lost else "neutral")
    )
    verdict.sentences.append(
        f"Pictures of one prompt differ {percent(ratio)} {interval} as much as the base model's "
        f"({place})" + (": variety was lost, look at the pictures." if lost else ".")
    )
    good = metrics.get("distance_good")
    if good and good.get("ratio") is not None:
        among = f"{percent(good['ratio'])} {_ratio_interval(good)}".rstrip()
        verdict.sentences.append(f"Where the same noises gave both models good pictures: {among}.")
    paid = False
    if weighted and weighted["of_it"] is not None and state(metrics.get("judge")) == "up":
        share, of_it = (_percents(weighted, name) for name in ("share", "of_it"))
        verdict.sentences.append(
            f"The base model's own pictures, weighted until the judge likes them as much, would keep"
            f" {'less than ' * bool(weighted['beyond'])}{share}; the aligned model keeps {of_it} of that."
        )
        paid = weighted["of_it"] >= EQUAL_JUDGE
    if lost and verdict.tone == "good":
        verdict.tone = "caution"
        verdict.headline = "The pictures got better by both measures, " + (
            "and vary less, by no more than that costs." if paid else "but vary less."
        )


def _percents(row: Row, name: str) -> str:
    """The value and its interval, if it has one."""
    prefix = "" if name == "share" else f"{name}_"
    low, high = row[f"{prefix}low"], row[f"{prefix}high"]
    ends = f" [{percent(low)}, {percent(high)}]" if low is not None and high is not None else ""
    return f"{percent(row[name])}{ends}"
