"""What the README shows of the demo, from a finished run: its evaluation, its times, and the before-and-after picture.

    python benchmarks/demo_results.py runs/emoji_tailorpo_g [--note "one core, otherwise idle"]

Writes benchmarks/results/demo_eval.json (eval.json without the lists of pictures), benchmarks/results/demo_time.json
and docs/img/demo.webp: the first seed of twelve prompts, evenly spaced in the order of evaluation. The whole time is
that between the first and the last file that the run wrote (run.yaml and report.html), so the run must not have been
resumed, evaluated or reported again since.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from common import RESULTS, save
from PIL import Image

from tailorpo.errors import UserError
from tailorpo.rundir import RunDirectory

PICTURE = Path(__file__).parents[1] / "docs" / "img" / "demo.webp"
SHOWN, SIDE, GAP = 12, 64, 4


def times(path: Path, evaluation: dict[str, Any]) -> dict[str, Any]:
    """The times of a finished run, in seconds."""
    metrics = RunDirectory.open(path).metrics()
    seconds = [float(row["seconds"]) for row in metrics]
    first, last = ((path / name).stat().st_mtime for name in ("run.yaml", "report.html"))
    return {
        "updates": len(seconds),
        "training_seconds": round(sum(seconds), 1),
        "update_seconds_median": round(median(seconds), 2),
        "evaluation_seconds": evaluation["cost"]["seconds"],
        "start_to_report_seconds": round(last - first, 1),
        "forwards_training": metrics[-1]["forwards"],
        "reward_queries_training": metrics[-1]["reward_queries"],
    }


def picture(path: Path, evaluation: dict[str, Any]) -> list[str]:
    """Draw base pictures above the aligned ones from the same noise; returns their prompts."""
    prompts = evaluation["prompts"]
    chosen = [round(i * (len(prompts) - 1) / (SHOWN - 1)) for i in range(SHOWN)]
    sheet = Image.new("RGB", (SHOWN * (SIDE + GAP) - GAP, 2 * SIDE + GAP), "white")
    for column, index in enumerate(chosen):
        for row, side in enumerate(("base", "aligned")):
            shown = Image.open(path / prompts[index]["pictures"][0][side]).convert("RGB")
            sheet.paste(
                shown.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (column * (SIDE + GAP), row * (SIDE + GAP))
            )
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(PICTURE, quality=90)
    return [prompts[index]["prompt"] for index in chosen]


def main() -> None:
    """Measure, draw and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--note", default="", help="what the machine was doing, for example 'one core, otherwise idle'")
    options = parser.parse_args()
    missing = [f for f in ("run.yaml", "metrics.jsonl", "eval.json", "report.html") if not (options.run / f).is_file()]
    if missing:
        raise SystemExit(f"{options.run} is not finished: {', '.join(missing)} missing")
    try:
        evaluation = json.loads((options.run / "eval.json").read_text(encoding="utf-8"))
        save("demo_time", {"run": options.run.name, "note": options.note, **times(options.run, evaluation)})
    except UserError as error:
        raise SystemExit(str(error)) from error
    print("shown in docs/img/demo.webp:", ", ".join(picture(options.run, evaluation)))
    kept = {key: value for key, value in evaluation.items() if key != "prompts"}
    (RESULTS / "demo_eval.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print("written to benchmarks/results/demo_eval.json")


if __name__ == "__main__":
    main()
