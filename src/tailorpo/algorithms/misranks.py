"""How often the step reward orders siblings wrongly, as `tailorpo jensen` has measured it.

Its file has a list `steps` whose entries have the network's `time` at the step the siblings were drawn from, and
`misrank`, the share of wrongly ordered pairs. Runs with another number of steps find theirs by time: linearly between
two measured ones, the nearest one beyond them. A share above 1/2 counts as 1/2: no order, rather than the reverse.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any, cast

from tailorpo.errors import UserError
from tailorpo.step_choice import measurement


def misrank_at(path: str, time: int) -> float:
    """The chance of a wrong order at a time of the network, 0..1/2.

    Raises:
        UserError: the file cannot be used; see `load_misranks`.
    """
    known = load_misranks(path)
    below = [each for each in known if each[0] <= time]
    above = [each for each in known if each[0] >= time]
    if not below or not above:
        return (below[-1] if below else above[0])[1]
    (first, low), (last, high) = below[-1], above[0]
    return low if first == last else low + (high - low) * (time - first) / (last - first)


def misrank_problems(path: str | None) -> list[str]:
    """Why a file cannot be used; nothing where there is none."""
    try:
        if path is not None:
            load_misranks(path)
    except UserError as error:
        return [str(error)]
    return []


@cache
def load_misranks(path: str) -> tuple[tuple[int, float], ...]:
    """(time, share) of every measured step, by time.

    Raises:
        UserError: there is no such file, or it was not written by `tailorpo jensen`.
    """
    hint = "give the jensen.json that `tailorpo jensen` writes"
    try:
        content: Any = json.loads(measurement(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: it cannot be read ({error.strerror}); {hint}") from error
    except ValueError as error:
        raise UserError(f"{path}: this is no JSON; {hint}") from error
    steps = cast(dict[str, Any], content).get("steps") if isinstance(content, dict) else None
    known: dict[int, float] = {}
    for each in cast(list[Any], steps) if isinstance(steps, list) else []:
        row = cast(dict[str, Any], each) if isinstance(each, dict) else {}
        time, share = row.get("time"), row.get("misrank")
        if isinstance(time, int) and isinstance(share, int | float) and 0 <= share <= 1:
            known[time] = min(float(share), 0.5)
    if not known:
        raise UserError(f"{path}: `steps` has no entry with a time and a misrank between 0 and 1; {hint}")
    return tuple(sorted(known.items()))
