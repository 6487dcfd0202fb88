"""What is logged of one update: means over its pairs, as a whole and by denoising step.

Averages are over pairs whose rewards were both present. `kl` is the exact KL of the trained steps, summed over a
trajectory's steps, in nats. `accuracy` is the share of pairs that the policy's own log-ratios already order as the
reward does; a logit of exactly zero counts half.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tailorpo.algorithms.tailorpo import Pair

SCALARS = ("reward_winner", "reward_loser", "gap", "log_ratio_winner", "log_ratio_loser", "kl", "accuracy")


class PairMetrics:
    """Gathers the pairs of one update and sums them up."""

    def __init__(self) -> None:
        self._rows: dict[int, list[dict[str, Tensor]]] = {}
        self._final: list[Tensor] = []

    def add(self, pair: Pair) -> None:
        """Take note of one batch of pairs."""
        row = {
            "reward_winner": pair.reward_winner,
            "reward_loser": pair.reward_loser,
            "gap": pair.gap,
            "log_ratio_winner": pair.log_ratio_winner,
            "log_ratio_loser": pair.log_ratio_loser,
            "kl": pair.kl,
            "accuracy": (torch.sign(pair.logit) + 1) / 2,
            "guidance_size": pair.push,
            "guidance_accepted": pair.accepted.float(),
            "present": pair.present,
            "tie": pair.tie,
        }
        self._rows.setdefault(pair.k, []).append({name: value.detach().cpu() for name, value in row.items()})

    def add_final(self, reward: Tensor) -> None:
        """Take note of the rewards of finished pictures, (B,)."""
        self._final.append(reward.detach().cpu())

    def summary(self, *, times: Tensor, guided: bool) -> dict[str, Any]:
        """The figures of the update; null where no pair had two rewards.

        Args:
            times: the network's time at each step, (K,).
            guided: whether the winners were moved.
        """
        by_step = {
            k: {name: torch.cat([row[name] for row in rows]) for name in rows[0]} for k, rows in self._rows.items()
        }
        every = {
            name: torch.cat([values[name] for values in by_step.values()]) for name in next(iter(by_step.values()))
        }
        result: dict[str, Any] = {name: _mean(every[name], every["present"]) for name in SCALARS}
        result["reward_mean"] = _mean(
            torch.cat([every["reward_winner"], every["reward_loser"]]), every["present"].repeat(2)
        )
        finals = torch.cat(self._final)
        result["reward_final"] = _mean(finals, finals.isfinite())
        step_kls = [_mean(values["kl"], torch.ones_like(values["present"])) for values in by_step.values()]
        result["kl"] = sum(value for value in step_kls if value is not None)
        if guided:
            result["guidance_size"] = _mean(every["guidance_size"], every["present"])
            result["guidance_accepted"] = _mean(every["guidance_accepted"], every["present"])
        result["pairs"] = len(every["present"])
        result["ties"] = int(every["tie"].sum())
        result["invalid"] = int((~every["present"]).sum())
        result["by_step"] = [
            {
                "k": k,
                "time": int(times[k]),
                "pairs": len(values["present"]),
                "reward": _mean(
                    torch.cat([values["reward_winner"], values["reward_loser"]]), values["present"].repeat(2)
                ),
                **{name: _mean(values[name], values["present"]) for name in ("gap", "kl", "accuracy")},
            }
            for k, values in sorted(by_step.items())
        ]
        return result


def _mean(values: Tensor, present: Tensor) -> float | None:
    chosen = values[present]
    return float(chosen.double().mean()) if len(chosen) else None
