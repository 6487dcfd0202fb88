"""What the sentinels remember from look to look, and what an alarm does to the run.

The base is measured before the first update and kept with the best look in the checkpoints: a resumed run goes on with
the same comparisons. Every process holds the same numbers and comes to the same decision.

    warn         says so and goes on
    stop         the training ends after this update; evaluation and report follow
    rollback     it ends, and the weights are those of the look with the best judge that raised no alarm (the base model
                 counts as one); its checkpoint is kept in best/, where pruning does not reach it
    raise_beta   beta is multiplied from the next update on; again at the earliest after `confirm` more looks, and to
                 `BETA_LIMIT` times at most
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tailorpo._distributed import Processes
from tailorpo.meter import Meter
from tailorpo.noise import Noise
from tailorpo.policy import Policy
from tailorpo.prompts import load_prompts
from tailorpo.rewards import Scorer
from tailorpo.run import Run
from tailorpo.sentinels.config import Sentinels
from tailorpo.sentinels.measure import Cost, Probe, spread_evenly
from tailorpo.sentinels.rules import Finding, Look, difference, find, judged, ratio
from tailorpo.statistics import plain

BETA = "beta_factor"
"""The name in `Session.memory` under which what beta is multiplied by is kept."""
BETA_LIMIT = 64.0

Ended = dict[str, Any]
"""How the sentinels end a training: "action", "update", and under a rollback "restored", the update gone back to."""

RATIOS = ("distance", "vendi")
"""Measures that are compared as a share of the base's."""


@dataclass
class Memory:
    """What has to survive from look to look; plain data, saved with checkpoints."""

    base: Look | None = None
    best: Look | None = None
    streaks: dict[str, int] = field(default_factory=dict[str, int])
    looks: int = 0
    raised: int | None = None
    ended: Ended | None = None

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Memory:
        """Of `asdict`."""
        restored = cls(**state)
        restored.base, restored.best = (Look(**state[name]) if state[name] else None for name in ("base", "best"))
        return restored


class Watch:
    """The sentinels of one run in progress."""

    def __init__(self, config: Sentinels, probe: Probe) -> None:
        self.config = config
        self.probe = probe
        self.memory = Memory()

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return asdict(self.memory)

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        self.memory = Memory.from_state(state)

    @property
    def over(self) -> bool:
        """Whether an alarm has ended the training, and the settings still say that it should."""
        ended = self.memory.ended
        return ended is not None and ended["action"] == self.config.on_alarm

    def begin(self, step: Callable[[int, int], None]) -> None:
        """Measure the base model, which every later look is compared with."""
        self.memory.base, _ = self.probe.look(0, on_step=step)
        self.memory.best = self.memory.base if "judge" in self.memory.base.values else None

    def due(self, update: int) -> bool:
        """Whether there is a look after this update."""
        return update % self.config.every == 0

    def look(self, update: int, memory: dict[str, list[float]], step: Callable[[int, int], None]) -> dict[str, Any]:
        """Look, decide, and return the row's `sentinel`: state, reasons, measures, and what was done.

        Args:
            update: after how many updates.
            memory: the session's, in which "raise_beta" leaves its factor.
            step: hears of every batch.
        """
        started, mine = time.perf_counter(), self.memory
        mine.ended = None  # of a run that goes on although an alarm had ended it
        assert mine.base is not None
        now, cost = self.probe.look(update, on_step=step)
        mine.looks += 1
        findings = find(now, base=mine.base, best=mine.best, rules=self.config.rules, looks=mine.looks)
        state, alarms, mine.streaks = judged(findings, mine.streaks, confirm=self.config.rules.confirm)
        best = mine.best
        if best is not None and state != "hacking" and (now.mean("judge") or 0) > (best.mean("judge") or 0):
            mine.best = best = now
        row = self._row(now, cost, findings)
        row |= {"state": state, "alarms": alarms, "reasons": [found.text for found in findings]}
        if best is not None:
            row["best"] = {"update": best.update, "judge": plain(best.mean("judge")), "kl": best.kl}
        if alarms:
            row |= self._act(update, memory)
        row["seconds"] = time.perf_counter() - started
        return row

    @property
    def is_best(self) -> bool:
        """Whether the latest look, or the base before any, is the best."""
        best = self.memory.best
        return best is not None and best.update == self.memory.looks * self.config.every

    def _act(self, update: int, memory: dict[str, list[float]]) -> dict[str, Any]:
        action, mine = self.config.on_alarm, self.memory
        if action == "raise_beta":
            factor = memory.get(BETA, [1.0])[0]
            rested = mine.raised is None or mine.looks - mine.raised >= self.config.rules.confirm
            if rested and factor < BETA_LIMIT:
                mine.raised, factor = mine.looks, min(BETA_LIMIT, factor * self.config.beta_raise)
                memory[BETA] = [factor]
            return {"action": action, BETA: factor}
        if action == "warn":
            return {"action": action}
        mine.ended = {"action": action, "update": update}
        if action == "rollback":
            assert mine.best is not None
            mine.ended["restored"] = mine.best.update
        return {key: value for key, value in mine.ended.items() if key != "update"}

    def _row(self, now: Look, cost: Cost, findings: list[Finding]) -> dict[str, Any]:
        base, level = self.memory.base, self.config.rules.confidence
        assert base is not None
        measures: dict[str, Any] = {}
        for name in now.values:
            if name == "kl":
                continue
            measures[name] = measure = {"base": plain(base.mean(name)), "now": plain(now.mean(name))}
            compared = (ratio if name in RATIOS else difference)(now, base, name, confidence=level)
            if compared is not None:
                ends = {"low": plain(compared.low), "high": plain(compared.high)}
                measure |= {"ratio" if name in RATIOS else "difference": plain(compared.value), **ends}
            if base.spread.get(name):
                measure["spread"] = base.spread[name]
        return {
            "state": "ok",
            "alarms": [],
            "reasons": [],
            "findings": [found.rule for found in findings],
            "measures": measures,
            "kl": now.kl,
            "kl_by_step": now.kl_by_step,
            "cost": {"forwards": cost.forwards, "pictures": cost.pictures},
        }


def open_watch(run: Run, policy: Policy, score: Scorer, processes: Processes) -> Watch | None:
    """The sentinels of a run, their judge loaded; the training's own rewards serve them, too. None without the section.

    Raises:
        UserError: the judge or the prompts cannot be used.
    """
    config = run.sentinels
    if config is None:
        return None
    device = policy.model.device
    judge = config.judge_of(run.eval.judge)
    own_account = Scorer(score.members, on_invalid="skip", devices=[each or device for each in score.devices])
    meter = Meter(own_account, judge.load(device) if judge else None, held_out=judge is not None, device=device)
    prompts = spread_evenly(load_prompts(config.prompts or run.prompts), config.count)
    return Watch(
        config, Probe(config, policy.model, run.sampler, meter, prompts, noise=Noise(run.seed), processes=processes)
    )
