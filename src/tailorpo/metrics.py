"""What is logged of one update: means of its samples' figures, as a whole and by denoising step.

Averages are over rows whose rewards were present. `kl` is the exact KL of the trained steps to the loss's reference,
summed over a trajectory's steps, in nats; `kl_trajectory` that of all steps to the base model, and `kl_by_step` its
parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from tailorpo.algorithms.base import Sample

_BY_STEP = {"reward": "reward_mean", "gap": "gap", "kl": "kl", "accuracy": "accuracy"}
"""Names in `by_step`, and the figures they are means of."""
_MEMBERS_BY_STEP = ("gap:", "agreement:", "scale:", "abstained")
"""What of an ensemble's figures is there under their own names."""


class UpdateMetrics:
    """Gathers the samples of one update and sums them up."""

    def __init__(self) -> None:
        self._rows: dict[int | None, list[dict[str, Tensor]]] = {}
        self._final: list[Mapping[str, Tensor]] = []
        self._kl: dict[int, list[Tensor]] = {}

    def add(self, sample: Sample) -> None:
        """Take note of one batch; the numbers stay on the device until `cpu`, so that nothing waits for it."""
        figures = {name: value.detach() for name, value in sample.figures().items()}
        if figures:
            self._rows.setdefault(sample.k, []).append(figures)

    def add_final(self, rewards: Mapping[str, Tensor]) -> None:
        """Take note of the rewards of finished pictures, (B,) each, by the names they are logged under."""
        self._final.append({name: reward.detach() for name, reward in rewards.items()})

    def add_kl(self, by_step: Mapping[int, Tensor]) -> None:
        """Take note of the KL to the base model at some steps, (n,) each."""
        for k, kl in by_step.items():
            self._kl.setdefault(k, []).append(kl.detach())

    def cpu(self) -> Self:
        """The same, on the CPU."""
        moved = type(self)()
        for k, rows in self._rows.items():
            moved._rows[k] = [{name: torch.cat([row[name] for row in rows]).cpu() for name in rows[0]}]
        moved._final = [{name: torch.cat([each[name] for each in self._final]).cpu() for name in self._final[0]}]
        moved._kl = {k: [torch.cat(parts).cpu()] for k, parts in self._kl.items()}
        return moved

    @classmethod
    def joined(cls, parts: Iterable[Self]) -> Self:
        """What several processes have gathered, as if one had, the first part first."""
        whole = cls()
        for part in parts:
            for k, rows in part._rows.items():
                whole._rows.setdefault(k, []).extend(rows)
            whole._final += part._final
            for k, kls in part._kl.items():
                whole._kl.setdefault(k, []).extend(kls)
        return whole

    def summary(self, *, times: Tensor) -> dict[str, Any]:
        """The figures of the update; null where no row had its rewards.

        Args:
            times: the network's time at each step, (K,).
        """
        by_step = {
            k: {name: torch.cat([row[name] for row in rows]) for name in rows[0]} for k, rows in self._rows.items()
        }
        names = next(iter(by_step.values())).keys()
        every = {name: torch.cat([values[name] for values in by_step.values()]) for name in names}
        present = every.pop("present")
        ties = every.pop("tie", None)
        result: dict[str, Any] = {name: _mean(values, present) for name, values in every.items()}
        for name in self._final[0]:
            finals = torch.cat([rewards[name] for rewards in self._final])
            result[name] = _mean(finals, finals.isfinite())
        if "kl" in every:
            step_kls = [_mean(values["kl"], torch.ones_like(values["present"])) for values in by_step.values()]
            result["kl"] = sum(value for value in step_kls if value is not None)
        if self._kl:
            walked = {k: float(torch.cat(parts).double().mean()) for k, parts in self._kl.items()}
            result["kl_trajectory"] = sum(walked[k] for k in sorted(walked))
            result["kl_by_step"] = [walked.get(k) for k in range(len(times))]
        result["pairs"] = len(present)
        if ties is not None:
            result["ties"] = int(ties.sum())
        result["invalid"] = int((~present).sum())
        result["by_step"] = [
            {
                "k": k,
                "time": int(times[k]),
                "pairs": len(values["present"]),
                **{name: _mean(values[key], values["present"]) for name, key in _BY_STEP.items() if key in values},
                **({"gap_rms": _rms(values["gap"], values["present"])} if "gap" in values else {}),
                **{
                    name: _mean(each, values["present"])
                    for name, each in values.items()
                    if name.startswith(_MEMBERS_BY_STEP)
                },
            }
            for k, values in sorted((k, values) for k, values in by_step.items() if k is not None)
        ]
        return result


def _rms(values: Tensor, present: Tensor) -> float | None:
    square = _mean(values.double() ** 2, present)
    return None if square is None else math.sqrt(square)


def _mean(values: Tensor, present: Tensor) -> float | None:
    chosen = values[present]
    return float(chosen.double().mean()) if len(chosen) else None
