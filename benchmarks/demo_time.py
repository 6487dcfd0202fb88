"""How long a finished run took, from its own files: training, evaluation, and everything from start to report.

    python benchmarks/demo_time.py runs/emoji_tailorpo_g

The whole time is that between the first and the last file the run wrote (run.yaml and report.html), so the run must not
have been resumed, evaluated or reported again since.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from common import save

from tailorpo.errors import UserError
from tailorpo.rundir import RunDirectory


def measure(path: Path) -> dict[str, Any]:
    """The times of a finished run, in seconds."""
    directory = RunDirectory.open(path)
    files = {name: path / name for name in ("run.yaml", "metrics.jsonl", "eval.json", "report.html")}
    missing = [name for name, file in files.items() if not file.is_file()]
    if missing:
        raise UserError(f"{path} is not finished: {', '.join(missing)} missing")
    metrics = directory.metrics()
    seconds = [float(row["seconds"]) for row in metrics]
    evaluation = json.loads(files["eval.json"].read_text(encoding="utf-8"))
    changed = {name: file.stat().st_mtime for name, file in files.items()}
    return {
        "updates": len(seconds),
        "training_seconds": round(sum(seconds), 1),
        "update_seconds_median": round(median(seconds), 2),
        "evaluation_seconds": evaluation.get("cost", {}).get("seconds"),
        "start_to_report_seconds": round(changed["report.html"] - changed["run.yaml"], 1),
        "forwards_training": metrics[-1]["forwards"],
        "reward_queries_training": metrics[-1]["reward_queries"],
    }


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--note", default="", help="what the machine was doing, for example 'one core, otherwise idle'")
    options = parser.parse_args()
    try:
        result = measure(options.run)
    except UserError as error:
        raise SystemExit(str(error)) from error
    print("\n".join(f"{name}: {value}" for name, value in result.items()))
    save("demo_time", {"run": options.run.name, "note": options.note, **result})


if __name__ == "__main__":
    main()
