"""What each step of the miniature teaches, for `train_steps: {auto: K, measured: emoji_preference}`.

Turns the sibling gaps of `results.json` (`evaluate.sibling_gaps`, guidance 1.5, 90 pairs a step) into the format of
`tailorpo jensen`. With D the true gap and N the noise of its measurement,

    V = (std(measured gap)^2 - std(N)^2) / 2,   rho = correlation / sqrt(1 - std(N)^2 / std(measured gap)^2)
    misrank = arccos(rho) / pi

and the same for both ends of the correlation's interval. The last step is not in it: its candidates are finished.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from tailorpo.experiments.measurement import base_policy
from tailorpo.files import atomic_write
from tailorpo.models.source import assets
from tailorpo.run import Run

ROOT = Path(__file__).parent.parent


def signals() -> list[dict[str, float]]:
    """One object per measured step."""
    policy = base_policy(Run.load(ROOT / "recipes/emoji_tailorpo.yaml"))
    measured = json.loads((ROOT / "miniature/results.json").read_text())["siblings"]["1.5"]
    found: list[dict[str, float]] = []
    for key, row in measured.items():
        k = int(key)
        spread, noise = row["std_of_true_gap"] ** 2, row["noise_of_true_gap"] ** 2
        reliability = 1 - noise / spread
        low, rho, high = (
            max(-1.0, min(1.0, each / math.sqrt(reliability)))
            for each in (row["interval_95"][0], row["correlation"], row["interval_95"][1])
        )
        numbers = {
            "v": (spread - noise) / 2,
            "correlation": rho,
            "misrank": math.acos(rho) / math.pi,
            "misrank_low": math.acos(high) / math.pi,
            "misrank_high": math.acos(low) / math.pi,
            "noise_weight": policy.sampler.noise_weight(policy.schedule, k, kind=policy.model.prediction_type),
        }
        found.append({"k": k, "time": row["time"], **{name: round(value, 6) for name, value in numbers.items()}})
    return found


if __name__ == "__main__":
    content = {"source": "miniature/results.json, by python -m miniature.step_signals", "steps": signals()}
    atomic_write(assets("jensen") / "emoji_preference.json", json.dumps(content, indent=1) + "\n")
