"""report.html: one self-contained page about a run, for a phone or a desktop, light or dark, screen or paper.

It is made of files alone (run.yaml, metrics.jsonl, eval.json, samples/), so it can be written at any time: during a
run, after an interruption, or of a run directory copied from elsewhere. What is missing or damaged is said to be so.
Nothing on it comes from the network: pictures are embedded, and its content security policy forbids any request.

    __init__.py    reads the run directory and shapes what the template shows
    verdict.py     the numbers in plain words
    sentinels.py   what the sentinels saw during training
    training.py    which curves there are, and what happened at each denoising step
    charts.py      the geometry of a curve
    page.html.j2, style.css, page.js    the page; without JavaScript only the reading-off of single values is gone
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from tailorpo.environment import environment
from tailorpo.files import atomic_write
from tailorpo.progress import duration
from tailorpo.report.charts import finite, short
from tailorpo.report.sentinels import sentinel_cost, sentinel_section
from tailorpo.report.training import history_charts, step_table, training_charts
from tailorpo.report.verdict import change, digits_of, judge_run, number, percent, state

if TYPE_CHECKING:
    from tailorpo.rundir import RunDirectory

MAX_SIDE = 256
"""Larger pictures are reduced to this before they are embedded."""
OPEN_PROMPTS = {"seen": 8, "unseen": 6}
"""Prompts of each group that are shown at once, the first of the list; the others are folded away."""
MAX_PROMPTS, MAX_SEEDS = 60, 4
PAIR_UPDATES, PAIR_TRAJECTORIES = 3, 2
ROLES = {
    "trained": "what training maximised",
    "member": "a part of the trained reward",
    "judge": "never seen by training",
    "diversity": "among the pictures of one prompt",
    "alarm": "nobody asked for a change; look at the pictures if it is large",
}


def write_report(directory: RunDirectory) -> Path:
    """Write report.html into a run directory and return its path.

    Raises:
        StorageError: the disk refused.
    """
    path = directory.path / "report.html"
    atomic_write(path, render(directory.path, directory.metrics()))
    return path


def render(folder: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """The page of a run directory, from its files and the rows of its metrics.jsonl."""
    pages = Environment(
        loader=PackageLoader("tailorpo", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters.update(number=number, percent=percent, code=_code, short=_short)
    notes: list[str] = []
    settings = _settings(folder / "run.yaml", notes)
    evaluation = _evaluation(folder / "eval.json", notes)
    script = _source("page.js")
    pairs = _pairs(folder / "samples" / "pairs")
    return pages.get_template("page.html.j2").render(
        title=folder.resolve().name,
        verdict=judge_run(evaluation, rows, target=_target(settings)),
        notes=notes,
        gallery=_gallery(folder, evaluation) if evaluation else [],
        table=_table(evaluation) if evaluation else [],
        evaluation=evaluation,
        charts=training_charts(rows),
        history=history_charts(evaluation) if evaluation else [],
        steps=step_table(rows),
        sentinels=sentinel_section(rows),
        pairs=pairs,
        guided=any(record["guided"] for update in pairs for records in update["trajectories"] for record in records),
        cost=_cost(rows, evaluation),
        run_yaml=_text(folder / "run.yaml"),
        environment=(evaluation or {}).get("environment") or environment(),
        style=Markup(_source("style.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _code(text: str) -> Markup:
    """Escaped text in which `this` is set as code."""
    parts = [escape(part) for part in text.split("`")]
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if odd % 2 else part for odd, part in enumerate(parts)
    )


def _short(value: float | None) -> str:
    return number(None) if value is None else short(value)


def _source(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _settings(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        data: object = yaml.safe_load(_text(path))
    except yaml.YAMLError:
        data = None
    if isinstance(data, dict):
        return cast(dict[str, Any], data)
    notes.append("run.yaml is missing or not readable, so the settings are not shown.")
    return {}


def _target(settings: Mapping[str, Any]) -> int | None:
    updates = settings.get("updates")
    return updates if isinstance(updates, int) else None


def _evaluation(path: Path, notes: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        notes.append("eval.json is damaged and not shown; `tailorpo eval` writes it anew.")
        return None
    if not isinstance(data, dict) or cast(dict[str, Any], data).get("schema") != 1:
        notes.append(
            "eval.json was written by another version of tailorpo and is not shown; `tailorpo eval` redoes it."
        )
        return None
    return cast(dict[str, Any], data)


def _picture(path: Path) -> dict[str, Any] | None:
    """An embedded picture with its size, None if the file cannot be read."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            kind = image.format
            if kind != "PNG" or max(image.size) > MAX_SIDE:
                image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                image.convert("RGB").save(buffer, format="JPEG", quality=90)
                kind, data = "JPEG", buffer.getvalue()
            width, height = image.size
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for damaged files
        return None
    uri = f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
    return {"uri": uri, "width": width, "height": height}


def _gallery(folder: Path, evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Before and after: per group the cards shown at once and those folded away, in the order of the lists."""
    sections: list[dict[str, Any]] = []
    for group in ("seen", "unseen"):
        entries = [entry for entry in evaluation["prompts"] if entry["group"] == group]
        cards = [_card(folder, entry) for entry in entries[:MAX_PROMPTS]]
        if cards:
            count = OPEN_PROMPTS[group]
            sections.append({"group": group, "total": len(entries), "open": cards[:count], "more": cards[count:]})
    return sections


def _card(folder: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    pictures = [
        {
            "seed": picture["seed"],
            "sides": {
                side: {
                    "image": _picture(folder / picture[side]),
                    "scores": {name: values[side] for name, values in picture["scores"].items()},
                }
                for side in ("base", "aligned")
            },
        }
        for picture in entry["pictures"][:MAX_SEEDS]
    ]
    return {"prompt": entry["prompt"], "metrics": entry["metrics"], "pictures": pictures}


def _table(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The evaluation table: per metric its rows for seen, unseen and all prompts, with the geometry of intervals."""
    table: list[dict[str, Any]] = []
    groups: Mapping[str, Any] = evaluation["groups"]
    for name, metric in evaluation["metrics"].items():
        found = {group: data["metrics"].get(name) for group, data in groups.items()}
        if len(groups) == 2:  # seen or unseen alone: "all" would repeat it
            found.pop("all")
        rows = {group: row for group, row in found.items() if row}
        if not rows:  # such as diversity with one seed
            continue
        ends = [abs(row[key]) for row in rows.values() for key in ("low", "high", "difference") if row[key] is not None]
        reach = max(ends, default=0.0) or 1.0
        judged, share = metric["role"] in JUDGED, metric["unit"] == "share"
        spread = metric.get("spread")
        shift = rows["all"]["difference"] / spread if spread and "all" in rows else None
        table.append(
            {
                "name": name,
                **metric,
                "about": ROLES[metric["role"]],
                "large_shift": metric["role"] == "alarm" and shift is not None and abs(shift) > 1,
                "unit": "per cent" if share else metric["unit"],
                "judged": judged,
                "rows": [_table_row(group, row, reach, judged=judged, share=share) for group, row in rows.items()],
            }
        )
    return table


JUDGED = ("trained", "member", "judge")
"""Roles in which higher is better, so that a change has a colour."""


SCALED = ("base", "aligned", "difference", "low", "high")


def _table_row(group: str, row: Mapping[str, Any], reach: float, *, judged: bool, share: bool) -> dict[str, Any]:
    def place(value: float) -> float:
        return round(50 + 46 * value / reach, 2)

    # A share reads better in per cent.
    shown = {key: value * 100 for key, value in row.items() if key in SCALED and value is not None} if share else {}
    shown = {**row, **shown}
    digits = digits_of(shown)
    ratio = f"{percent(row['ratio'])} [{percent(row['ratio_low'])}, {percent(row['ratio_high'])}]"
    return {
        "group": group,
        "n": row["n"],
        "base": number(shown["base"], digits=digits),
        "aligned": number(shown["aligned"], digits=digits),
        "change": change(shown),
        "tone": state(row) if judged else "flat",
        "point": place(row["difference"]),
        "ends": None if row["low"] is None or row["high"] is None else (place(row["low"]), place(row["high"])),
        "wins": percent(row["win_rate"]),
        "win_interval": f"[{percent(row['win_low'])}, {percent(row['win_high'])}]",
        "ratio": ratio if row["ratio_low"] is not None else "",
    }


def _pairs(folder: Path) -> list[dict[str, Any]]:
    """Ranked pairs of the first, a middle and the last recorded update: per trajectory its steps, noisy to clean."""
    files = sorted(folder.glob("update-*/pairs.json"))
    if len(files) > PAIR_UPDATES:
        last = len(files) - 1
        files = [files[round(index * last / (PAIR_UPDATES - 1))] for index in range(PAIR_UPDATES)]
    updates: list[dict[str, Any]] = []
    for file in files:
        try:
            records = cast(list[dict[str, Any]], json.loads(file.read_text(encoding="utf-8")))
            numbers = sorted({record["trajectory"] for record in records})
            trajectories = [
                [
                    {**record, **{side: _picture(file.parent / record[side]) for side in ("winner", "loser")}}
                    for record in sorted(records, key=lambda record: record["k"])
                    if record["trajectory"] == wanted
                ]
                for wanted in numbers[:PAIR_TRAJECTORIES]
            ]
        except (ValueError, KeyError, TypeError):  # written by a run that was killed, or edited
            continue
        if trajectories:
            updates.append({"number": int(file.parent.name.removeprefix("update-")), "trajectories": trajectories})
    return updates


def _cost(rows: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What the run took, as pairs of a name and a text."""
    cost: list[tuple[str, str]] = []
    if rows:
        last, count = rows[-1], len(rows)
        seconds = [value for row in rows if (value := finite(row.get("seconds"))) is not None]
        cost.append(("updates", f"{int(last['update']):,}"))
        for key, name in (
            ("forwards", "network evaluations (guided forwards of one latent)"),
            ("reward_queries", "pictures scored by the reward"),
        ):
            value = finite(last.get(key))
            if value is not None:
                cost.append((name, f"{value:,.0f} ({value / max(1, int(last['update'])):,.0f} per update)"))
        if seconds:
            cost.append(("training time", f"{duration(sum(seconds))} ({sum(seconds) / len(seconds):.2f} s per update)"))
        for key, name in (("ties", "ties"), ("invalid", "pairs with an invalid score")):
            cost.append((name, f"{sum(finite(row.get(key)) or 0 for row in rows):,.0f} in {count:,} updates"))
    cost += sentinel_cost(rows)
    if evaluation:
        spent = evaluation["cost"]
        cost.append(("evaluation", f"{spent['forwards']:,} network evaluations, {duration(spent['seconds'])}"))
    return cost
