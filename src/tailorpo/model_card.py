"""The README.md of an export: what was trained, what it did, how to load it, and what is not known.

Every number on it is from the run directory; what was not measured is said to be so. The licence is the publisher's to
choose, so the card names what binds them and leaves the field open. Paths are cut to their last part.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from tailorpo import __version__
from tailorpo.algorithms.diffusion_dpo import DiffusionDPO
from tailorpo.base_model import BaseModel
from tailorpo.errors import UserError
from tailorpo.evaluation_result import SCHEMA
from tailorpo.files import atomic_write
from tailorpo.lora_metadata import method_name, reward_name
from tailorpo.report.verdict import change, digits_of, judge_run, number, percent
from tailorpo.run import Run
from tailorpo.rundir import RunDirectory

if TYPE_CHECKING:
    from tailorpo.export import Format

SHEET = "before_after.png"
PAGES = {"rewards": ("trained", "member", "judge"), "other": ("diversity", "alarm")}
ROLES = {"trained": "trained reward", "member": "part of the trained reward", "judge": "held-out judge"}


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a card is made from.

    Attributes:
        directory: of the run.
        base: the model it started from.
        base_id: its id on the hub, None if not known.
        updates: how many updates are exported.
        format: what is exported.
        dtype: of its weights.
        file: the LoRA's file, None for a merged model.
    """

    directory: RunDirectory
    base: BaseModel
    base_id: str | None
    updates: int
    format: Format
    dtype: str
    file: str | None


def write_card(card: ModelCard, folder: Path) -> None:
    """Write README.md, and the contact sheet of the evaluation if the run has one."""
    sheet = card.directory.samples / "eval" / "side_by_side.png"
    if sheet.is_file():
        shutil.copy(sheet, folder / SHEET)
    atomic_write(folder / "README.md", render_card(card, sheet=sheet.is_file()))


def render_card(card: ModelCard, *, sheet: bool) -> str:
    """The text of the card: Markdown with the hub's YAML front matter."""
    run, rows = card.directory.run, card.directory.metrics()
    evaluation = _evaluation(card.directory)
    one, many = ("pair", "pairs") if isinstance(run.algorithm, DiffusionDPO) else ("trajectory", "trajectories")
    count = run.batch.trajectories
    pages = Environment(
        loader=PackageLoader("tailorpo", "."),
        autoescape=False,  # Markdown; what is not ours goes through `cell` and code spans
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    pages.filters.update(percent=percent, cell=_cell)
    return pages.get_template("model_card.md.j2").render(
        card=card,
        front=yaml.safe_dump(_front_matter(card), sort_keys=False, allow_unicode=True),
        run=run,
        lora=run.model.lora,
        method=method_name(run.algorithm),
        reward=reward_name(run),
        batch=f"{count} {one if count == 1 else many}",
        name=card.directory.path.resolve().name,
        version=__version__,
        verdict=judge_run(evaluation, rows, target=run.updates),
        evaluation=evaluation,
        tables={page: _table(evaluation, roles) if evaluation else [] for page, roles in PAGES.items()},
        prompt=evaluation["prompts"][0]["prompt"] if evaluation else "a cat",
        forwards=rows[-1].get("forwards") if rows else None,
        settings=_settings(run),
        sheet=SHEET if sheet else None,
    )


def _evaluation(directory: RunDirectory) -> dict[str, Any] | None:
    if not (directory.path / "eval.json").is_file():
        return None
    evaluation: dict[str, Any] = directory.read_json("eval.json")
    if evaluation.get("schema") != SCHEMA:
        raise UserError(f"{directory.path / 'eval.json'} is of another version; `tailorpo eval` writes it anew")
    return evaluation


def _front_matter(card: ModelCard) -> dict[str, Any]:
    merged = card.format == "merged"
    tags = ["text-to-image", "diffusers", *([] if merged else ["lora"]), "tailorpo", "preference-alignment"]
    base = {"base_model": card.base_id, "base_model_relation": "finetune" if merged else "adapter"}
    front = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": tags}
    return {**(base if card.base_id else {}), **front, **({} if merged else {"instance_prompt": None})}


def _table(evaluation: Mapping[str, Any], roles: Sequence[str]) -> list[dict[str, Any]]:
    """Per measure a row for all prompts, and one for those that training never saw; shares in per cent."""
    groups: Mapping[str, Any] = evaluation["groups"]
    names = {"all": "", "unseen": " never seen in training"}
    shown = ["all", "unseen"] if len(groups) == 3 else ["all"]
    table: list[dict[str, Any]] = []
    for name, metric in evaluation["metrics"].items():
        for group in shown if metric["role"] in roles else ():
            row = groups[group]["metrics"].get(name)
            if not row:
                continue
            factor = 100 if metric["unit"] == "share" else 1
            keys = ("base", "aligned", "difference", "low", "high")
            scaled = {**row, **{key: row[key] * factor for key in keys if row[key] is not None}}
            digits = digits_of(scaled)
            unit = "%" if metric["unit"] == "share" else metric["unit"]
            label = metric["label"] if unit in metric["label"] else f"{metric['label']}, {unit}"
            interval = f" [{percent(row['ratio_low'])}, {percent(row['ratio_high'])}]"
            table.append(
                {
                    "label": label,
                    "role": ROLES.get(metric["role"], ""),
                    "group": f"{row['n']}{names[group]}",
                    "base": number(scaled["base"], digits=digits),
                    "aligned": number(scaled["aligned"], digits=digits),
                    "change": change(scaled),
                    "wins": f"{row['wins']} of {row['n']}",
                    "ratio": percent(row["ratio"]) + (interval if row["ratio_low"] is not None else ""),
                }
            )
    return table


def _settings(run: Run) -> str:
    """The run file, with paths cut to their last part: the rest is nobody's business."""
    return yaml.safe_dump(_portable(run.to_dict()), sort_keys=False, allow_unicode=True, width=120)


def _portable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _portable(each) for key, each in cast(dict[str, Any], value).items()}
    if isinstance(value, list):
        return [_portable(each) for each in cast(list[Any], value)]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _cell(text: str) -> str:
    """Text that cannot end a cell of a table or a line."""
    return " ".join(text.split()).replace("|", "\\|")
