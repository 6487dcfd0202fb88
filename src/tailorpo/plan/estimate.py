"""A plan and what follows from it: totals, hours on a device, plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tailorpo.algorithms.base import Cost
from tailorpo.models import DType
from tailorpo.plan.devices import EFFICIENCY, Device
from tailorpo.run import Run

HEADROOM = 0.9
"""A run is said to fit where it needs no more than this share of the device's memory."""
Phase = Literal["training", "evaluation", "once"]


@dataclass(frozen=True)
class Work:
    """Calls of one kind.

    Attributes:
        kind: as in `accounting.unit_costs`.
        phase: when; "once" is at the start.
        count: rows of it, per trajectory in training, otherwise in the whole run.
        operations: of one row.
        dtype: what it computes in.
    """

    kind: str
    phase: Phase
    count: float
    operations: float
    dtype: DType

    @property
    def total(self) -> float:
        """Operations per trajectory, or in the whole run."""
        return self.count * self.operations


@dataclass(frozen=True)
class Estimate:
    """Hours on one device.

    Attributes:
        hours: by phase.
        efficiency: share of the peak, by dtype; None where calls were timed.
        fits: whether the memory suffices; None where one of the two is not known.
        problem: why it cannot run there, in words.
    """

    device: Device
    hours: dict[Phase, float]
    efficiency: dict[DType, float] | None
    fits: bool | None
    problem: str | None = None

    @property
    def total(self) -> float:
        """Hours of the whole run."""
        return sum(self.hours.values())


@dataclass(frozen=True)
class Plan:
    """What a run costs.

    Attributes:
        network: title of the architecture.
        picture: width of its pictures.
        cost: of one trajectory.
        work: everything that is counted.
        memory: bytes by what they hold; activations are the most of any moment.
        moments: the most bytes allocated in each phase of an update, and in evaluation.
        assumptions: in words.
        not_counted: in words.
    """

    run: Run
    network: str
    picture: int
    cost: Cost
    work: tuple[Work, ...]
    memory: dict[str, int]
    moments: dict[str, int]
    assumptions: tuple[str, ...]
    not_counted: tuple[str, ...]

    @property
    def trajectories(self) -> int:
        """Of the whole run."""
        return self.run.updates * self.run.batch.trajectories

    @property
    def peak_bytes(self) -> int:
        """The most memory at once."""
        return sum(self.memory.values())

    def operations(self, phase: Phase) -> float:
        """Of the whole run."""
        times = self.trajectories if phase == "training" else 1
        return times * sum(work.total for work in self.work if work.phase == phase)

    def on(self, device: Device, *, efficiency: float | None = None) -> Estimate:
        """Hours on a device, at an assumed share of its peak."""
        shares: dict[DType, float] = {dtype: efficiency or share for dtype, share in EFFICIENCY.items()}
        missing = {work.dtype for work in self.work if work.count} - device.peak.keys()
        fits = None if device.memory is None else self.peak_bytes <= HEADROOM * device.memory
        if missing:
            return Estimate(device, {}, shares, fits, f"no {', '.join(sorted(missing))}")
        return self._estimate(
            device, lambda work: work.operations / (device.peak[work.dtype] * shares[work.dtype]), shares, fits
        )

    def timed(self, device: Device, seconds_of: dict[str, float]) -> Estimate:
        """Hours on the present machine, where a row of each kind of call takes so many seconds."""
        fits = None if device.memory is None else self.peak_bytes <= HEADROOM * device.memory
        return self._estimate(device, lambda work: seconds_of[work.kind], None, fits)

    def _estimate(
        self,
        device: Device,
        seconds_of: Callable[[Work], float],
        efficiency: dict[DType, float] | None,
        fits: bool | None,
    ) -> Estimate:
        hours: dict[Phase, float] = {"once": 0.0, "training": 0.0, "evaluation": 0.0}
        for work in self.work:
            times = self.trajectories if work.phase == "training" else 1
            hours[work.phase] += times * work.count * seconds_of(work) / 3600
        return Estimate(device, hours, efficiency, fits)


def to_dict(plan: Plan, estimates: list[Estimate], *, price: float | None) -> dict[str, Any]:
    """The plan as plain data, for `--json`."""
    phases: tuple[Phase, ...] = ("once", "training", "evaluation")
    return {
        "network": plan.network,
        "picture": plan.picture,
        "dtype": plan.run.model.dtype,
        "updates": plan.run.updates,
        "trajectories": plan.trajectories,
        "work": [asdict(work) for work in plan.work if work.count],
        "operations": {phase: plan.operations(phase) for phase in phases},
        "memory_bytes": {**plan.memory, "total": plan.peak_bytes},
        "activations_bytes": plan.moments,
        "devices": [
            {
                "device": each.device.name,
                "peak": each.device.peak,
                "measured": each.device.measured,
                "efficiency": each.efficiency,
                "hours": {**each.hours, "total": each.total} if each.hours else None,
                "money": each.total * price if price is not None and each.hours else None,
                "fits": each.fits,
                "problem": each.problem,
            }
            for each in estimates
        ],
        "assumptions": plan.assumptions,
        "not_counted": plan.not_counted,
    }
