"""Keeps a few ranked pairs as pictures, so that people can see what the algorithm was told to prefer.

samples/pairs/update-000001/pairs.json    one entry per pair: prompt, step, rewards, file names
samples/pairs/update-000001/*.png         the predicted clean pictures of both candidates
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from tailorpo._distributed import ALONE, Processes
from tailorpo.algorithms.base import Sample
from tailorpo.files import atomic_write, storage_errors
from tailorpo.images import png_bytes

TRAJECTORIES = 2


class PairGallery:
    """Records the pairs of the first trajectories of one update.

    Args:
        folder: where the galleries of a run go.
        update: number of the update, counted from 1.
        times: the network's time at each step, (K,).
    """

    def __init__(self, folder: Path, *, update: int, times: Tensor) -> None:
        self._folder = folder / f"update-{update:06d}"
        self._times = times
        self._entries: list[dict[str, Any]] = []
        self._files: dict[str, bytes] = {}

    def add(self, sample: Sample, *, first_trajectory: int) -> None:
        """Record the pairs of a batch that belong to the update's first trajectories; `first_trajectory` is row 0's
        number."""
        shown = sample.shown()
        if shown is None or sample.k is None:
            return
        for row in range(min(len(shown.prompts), TRAJECTORIES - first_trajectory)):
            stem = f"trajectory-{first_trajectory + row}-step-{sample.k:02d}"
            files = {"winner": f"{stem}-winner.png", "loser": f"{stem}-loser.png"}
            self._files[files["winner"]] = png_bytes(shown.winner[row])
            self._files[files["loser"]] = png_bytes(shown.loser[row])
            self._entries.append(
                {
                    "prompt": shown.prompts[row],
                    "trajectory": first_trajectory + row,
                    "k": sample.k,
                    "time": int(self._times[sample.k]),
                    "reward_winner": _number(shown.reward_winner[row]),
                    "reward_loser": _number(shown.reward_loser[row]),
                    "guided": bool(shown.guided[row]),
                    **files,
                }
            )

    def save(self, processes: Processes = ALONE) -> None:
        """Write the pictures of all processes, and then their list, if there are any."""
        gathered = processes.gather((self._entries, self._files))
        entries = sorted(
            (entry for part, _ in gathered for entry in part), key=lambda entry: (entry["trajectory"], entry["k"])
        )
        if not entries or not processes.main:
            return
        with storage_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        for _, files in gathered:
            for name, data in files.items():
                atomic_write(self._folder / name, data)
        atomic_write(self._folder / "pairs.json", json.dumps(entries, indent=1))


def gallery_updates(updates: int) -> set[int]:
    """The updates (counted from 1) whose pairs are kept: first, last, and three between."""
    return {1 + round(i * (updates - 1) / 4) for i in range(5)} if updates > 0 else set()


def _number(reward: Tensor) -> float | None:
    return float(reward) if bool(reward.isfinite()) else None
