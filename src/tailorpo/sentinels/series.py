"""The looks of a run, read from the rows of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def looks(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The sentinels' part of the rows that have one, each with its "update"."""
    return [{"update": row["update"], **row["sentinel"]} for row in rows if row.get("sentinel")]


def ended(rows: Sequence[Row]) -> dict[str, Any] | None:
    """The look that ended the training, if one did."""
    last = looks(rows[-1:])
    return last[0] if last and last[0].get("action") in ("stop", "rollback") else None


def kept_update(rows: Sequence[Row]) -> int:
    """How many updates are behind the weights that a run has kept; 0 without rows."""
    end = ended(rows)
    if end is not None:
        return int(end.get("restored", end["update"]))
    return int(rows[-1]["update"]) if rows else 0


def ended_text(rows: Sequence[Row]) -> str | None:
    """How the sentinels ended the training, as sentences; None if they did not."""
    end = ended(rows)
    if end is None:
        return None
    text = f"Its sentinels ended the training after update {end['update']}: {'; '.join(end['reasons'])}."
    if "restored" in end:
        kept = end["restored"]
        text += f" Kept are the weights of {f'update {kept}' if kept else 'the base model'}, where the judge was best."
    return text


def summary(look: Row) -> str:
    """One line of a look: the state and why."""
    reasons = "; ".join(look["reasons"])
    return f"{look['state']}: {reasons}" if reasons else str(look["state"])
