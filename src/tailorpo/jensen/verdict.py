"""The numbers of one reward in plain words.

The rule: a step is reliable if the upper end of the 95 % interval of its misranked pairs is below 25 %, halfway between
always right and a coin; it is unreliable if the lower end is above; else the measurement cannot tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

THRESHOLD = 0.25


def judge(reward: Mapping[str, Any], *, last: int) -> dict[str, Any]:
    """The verdict on a reward of `summary`; `last` is the last step of the run."""
    steps: Sequence[Mapping[str, Any]] = reward["steps"]
    state = {row["k"]: _state(row) for row in steps}
    start = None
    for row in reversed(steps):
        if state[row["k"]] != "reliable":
            break
        start = row["k"]
    return {
        "threshold": THRESHOLD,
        "reliable_from": start,
        "reliable": [k for k, word in state.items() if word == "reliable"],
        "unreliable": [k for k, word in state.items() if word == "unreliable"],
        "undecided": [k for k, word in state.items() if word == "undecided"],
        "headline": _headline(start, steps, last),
        "sentences": [sentence for sentence in _sentences(reward, state, last) if sentence],
    }


def _state(row: Mapping[str, Any]) -> str:
    if row["misrank_high"] < THRESHOLD:
        return "reliable"
    return "unreliable" if row["misrank_low"] > THRESHOLD else "undecided"


def _headline(start: int | None, steps: Sequence[Mapping[str, Any]], last: int) -> str:
    if start is None:
        return f"Rankings by the step reward are not shown to be reliable at step {steps[-1]['k']}, the last measured"
    if start == last:
        return "Rankings by the step reward are reliable only at the last step, among finished pictures"
    if start == steps[0]["k"]:
        return f"Rankings by the step reward are reliable at every measured step ({start} to {steps[-1]['k']})"
    return f"Rankings by the step reward are reliable from step {start} on"


def _sentences(reward: Mapping[str, Any], state: Mapping[int, str], last: int) -> list[str]:
    steps: Sequence[Mapping[str, Any]] = reward["steps"]
    percent = f"{100 * THRESHOLD:.0f} %"
    unreliable = [k for k, word in state.items() if word == "unreliable"]
    undecided = [k for k, word in state.items() if word == "undecided"]
    return [
        f"Reliable means that the upper end of the 95 % interval of misranked pairs is below {percent}; steps are"
        " numbered as in algorithm.train_steps.",
        f"Worse than {percent} with 95 % confidence: {_list(unreliable)}." if unreliable else "",
        f"Not decided, because the interval reaches across {percent}: {_list(undecided)}; more --states narrow it"
        f"{_noise_hint(steps, undecided)}."
        if undecided
        else "",
        _spectrum(reward, state),
        _gaps(steps, last),
        _lookahead(reward),
    ]


def _noise_hint(steps: Sequence[Mapping[str, Any]], undecided: Sequence[int]) -> str:
    noisy = [row["k"] for row in steps if row["k"] in undecided and row["reliability"] < 0.5]
    return f", and more --continuations at {_list(noisy)}, where the truth is mostly noise" if noisy else ""


def _spectrum(reward: Mapping[str, Any], state: Mapping[int, str]) -> str:
    """How much of the variance is decided where rankings are reliable, by linear interpolation between steps."""
    steps: Sequence[Mapping[str, Any]] = reward["steps"]
    values = [max(row["v"], 0.0) for row in steps]
    if not sum(values) or reward["variance"] <= 0:
        return ""
    most = max(steps, key=lambda row: row["v"])["k"]
    shared = sum(value for row, value in zip(steps, values, strict=True) if state[row["k"]] == "reliable")
    part = reward["decided_by_denoising"] / reward["variance"]
    about = "about " if reward["interpolated"] else ""
    return (
        f"Of the variance of the final reward {about}{100 * part:.0f} % is decided by the noise of the steps, the rest"
        f" by prompt and first noise; most at step {most}. The reliable steps hold {100 * shared / sum(values):.0f} %"
        " of what the measured steps decide."
    )


def _gaps(steps: Sequence[Mapping[str, Any]], last: int) -> str:
    open_ = [row for row in steps if row["k"] < last and row["signal"] > 0]
    if not open_:
        return ""
    row = open_[0]
    return (
        f"At step {row['k']} the step reward is off by {row['gap_rms']:.3g} (rms) from the expected final reward,"
        f" {row['gap_rms'] / row['signal']:.1f} times what siblings differ by ({row['signal']:.3g}); of that the"
        f" siblings share all but {row['gap_difference']:.3g}, the difference of their gaps, which alone can turn a"
        " ranking."
    )


def _lookahead(reward: Mapping[str, Any]) -> str:
    gain = reward["lookahead_gain"]
    if gain is None or gain["share_low"] is None:
        return ""
    low, high = 100 * gain["share_low"], 100 * gain["share_high"]
    if low > 0:
        found = "The lookahead ranks better than the step reward"
    elif high < 0:
        found = "The lookahead ranks worse than the step reward"
    else:
        found = "The lookahead ranks neither better nor worse for certain"
    return f"{found}: {100 * gain['share']:+.1f} points of pairs [{low:+.1f}, {high:+.1f}] on average over the steps."


def _list(numbers: Sequence[int]) -> str:
    return ("step " if len(numbers) == 1 else "steps ") + ", ".join(map(str, numbers))
