"""What an ensemble of rewards cannot do together with a method, in words."""

from __future__ import annotations

from collections.abc import Sequence

from tailorpo.algorithms.base import Algorithm
from tailorpo.algorithms.d3po import D3PO
from tailorpo.algorithms.spo import SPO
from tailorpo.algorithms.tailorpo import TailorPO
from tailorpo.guidance import TargetGuidance
from tailorpo.rewards import Ensemble, RewardEntry


def ensemble_problems(ensemble: Ensemble, rewards: Sequence[RewardEntry], algorithm: Algorithm) -> list[str]:
    """Everything that cannot work, one line each."""
    problems: list[str] = []
    if len(rewards) < 2:
        problems.append("ensemble: there is one reward and nothing to combine; list several under reward, or drop it")
    if not all(entry.weight for entry in rewards):
        problems.append("ensemble: a reward of weight 0 has no say; leave it out of the list")
    if isinstance(algorithm, TailorPO):
        guidance = algorithm.guidance
        if guidance is not None and not ensemble.differentiable:
            problems.append(
                f"ensemble.rule is {ensemble.rule}, a count of votes, whose gradient is zero, and algorithm.guidance"
                " needs one; take another rule (soft_vote has a gradient) or guidance: null"
            )
        if guidance is not None and guidance.accept_reject:
            problems.append(
                "algorithm.guidance.accept_reject asks whether one picture's reward has risen, and an ensemble knows"
                " only which of two siblings is better; leave accept_reject or ensemble out"
            )
        if isinstance(guidance, TargetGuidance) and guidance.target is not None:
            problems.append(
                "algorithm.guidance.target is a reward to reach, and under an ensemble a picture alone has none;"
                " use delta, or form sigma"
            )
        if algorithm.step_reward != "predicted":
            problems.append(
                "ensemble normalises each step's gaps by those of predicted pictures at that step, which"
                " algorithm.step_reward replaces; use step_reward: predicted, or leave ensemble out"
            )
    if isinstance(algorithm, SPO | TailorPO) and ensemble.rule == "pareto" and algorithm.candidates > 2:
        problems.append(
            "ensemble.rule is pareto, but the best and the worst of several candidates need not dominate one another;"
            " use algorithm.candidates 2 or another rule"
        )
    if not isinstance(algorithm, TailorPO | SPO | D3PO):
        problems.append(
            f"ensemble compares siblings, and {algorithm.name} has none to compare: leave ensemble out (rewards are"
            " then added up by weight), or use tailorpo, spo or d3po"
        )
    return problems


def gate_problems(algorithm: Algorithm | None, ensemble: Ensemble | None) -> list[str]:
    """What `algorithm.gated_kl` lacks."""
    if not isinstance(algorithm, TailorPO) or algorithm.gated_kl == 0:
        return []
    problems: list[str] = []
    if ensemble is None:
        problems.append(
            "algorithm.gated_kl weighs the KL by how much the rewards of an ensemble disagree, and there is none: list"
            " several rewards and set ensemble, or gated_kl: 0"
        )
    if algorithm.update != "inline":
        problems.append("algorithm.gated_kl needs update: inline: a stored pair keeps nothing of what the rewards said")
    return problems
