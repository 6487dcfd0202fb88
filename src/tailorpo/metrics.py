"""What is logged of one update: means of its samples' figures, as a whole and by denoising step.

Averages are over rows whose rewards were present. `kl` is the exact KL of the trained steps to the loss's reference,
summed over a trajectory's steps, in nats; `kl_trajectory` that of all steps to the base model, and `kl_by_step` its
parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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
        self._tables: dict[tuple[str, int | None], list[Mapping[str, Tensor]]] = {}
        """Batches of figures, by what they are of ("sample", "final", "kl") and the step."""

    def add(self, sample: Sample) -> None:
        """Take note of one batch; the numbers stay on the device until `cpu`, so that nothing waits for it."""
        self._add("sample", sample.k, sample.figures())

    def add_final(self, rewards: Mapping[str, Tensor]) -> None:
        """Take note of the rewards of finished pictures, (B,) each, by the names they are logged under."""
        self._add("final", None, rewards)

    def add_kl(self, by_step: Mapping[int, Tensor]) -> None:
        """Take note of the KL to the base model at some steps, (n,) each."""
        for k, kl in by_step.items():
            self._add("kl", k, {"kl": kl})

    def _add(self, kind: str, k: int | None, figures: Mapping[str, Tensor]) -> None:
        if figures:
            batch = {name: values.detach() for name, values in figures.items()}
            self._tables.setdefault((kind, k), []).append(batch)

    def cpu(self) -> Self:
        """The same, on the CPU."""
        moved = type(self)()
        for key, batches in self._tables.items():
            moved._tables[key] = [{name: values.cpu() for name, values in _whole(batches).items()}]
        return moved

    @classmethod
    def joined(cls, parts: Iterable[Self]) -> Self:
        """What several processes have gathered, as if one had, the first part first."""
        joined = cls()
        for part in parts:
            for key, batches in part._tables.items():
                joined._tables.setdefault(key, []).extend(batches)
        return joined

    def summary(self, *, times: Tensor) -> dict[str, Any]:
        """The figures of the update; null where no row had its rewards.

        Args:
            times: the network's time at each step, (K,).
        """
        tables = {key: _whole(batches) for key, batches in self._tables.items()}
        by_step = {k: table for (kind, k), table in tables.items() if kind == "sample"}
        names = next(iter(by_step.values())).keys()
        every = {name: torch.cat([values[name] for values in by_step.values()]) for name in names}
        present = every.pop("present")
        ties = every.pop("tie", None)
        result: dict[str, Any] = {name: _mean(values, present) for name, values in every.items()}
        for name, finals in tables.get(("final", None), {}).items():
            result[name] = _mean(finals, finals.isfinite())
        if "kl" in every:
            step_kls = [_mean(values["kl"], torch.ones_like(values["present"])) for values in by_step.values()]
            result["kl"] = sum(value for value in step_kls if value is not None)
        walked = {k: float(table["kl"].double().mean()) for (kind, k), table in tables.items() if kind == "kl"}
        if walked:
            kls = [walked.get(k) for k in range(len(times))]
            result |= {"kl_trajectory": sum(kl for kl in kls if kl is not None), "kl_by_step": kls}
        result["pairs"] = len(present)
        if ties is not None:
            result["ties"] = int(ties.sum())
        result["invalid"] = int((~present).sum())
        shown = _BY_STEP | {name: name for name in every if name.startswith(_MEMBERS_BY_STEP)}
        result["by_step"] = [
            {
                "k": k,
                "time": int(times[k]),
                "pairs": len(values["present"]),
                **{name: _mean(values[key], values["present"]) for name, key in shown.items() if key in values},
                **({"gap_rms": _rms(values["gap"], values["present"])} if "gap" in values else {}),
            }
            for k, values in sorted((k, values) for k, values in by_step.items() if k is not None)
        ]
        return result


def _whole(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def _rms(values: Tensor, present: Tensor) -> float | None:
    square = _mean(values.double() ** 2, present)
    return None if square is None else math.sqrt(square)


def _mean(values: Tensor, present: Tensor) -> float | None:
    chosen = values[present]
    return float(chosen.double().mean()) if len(chosen) else None
