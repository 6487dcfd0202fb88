"""What settings of TailorPO cannot mean together, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tailorpo.algorithms.labels import label_problems
from tailorpo.guidance import SigmaGuidance
from tailorpo.step_choice import AutoSteps, Steps

if TYPE_CHECKING:
    from tailorpo.algorithms.tailorpo import TailorPO


def setting_problems(algorithm: TailorPO, *, steps: int, differentiable: bool) -> list[str]:
    """All of them.

    Args:
        algorithm: the settings.
        steps: of the sampler.
        differentiable: whether the reward has a gradient.
    """
    found: list[str] = []
    wanted = algorithm.train_steps
    if isinstance(wanted, int):
        if not 1 <= wanted <= steps:
            found.append(f"algorithm.train_steps must be in 1..{steps} (sampler.steps), got {wanted}")
    elif isinstance(wanted, AutoSteps):
        found += wanted.problems(steps)
    elif isinstance(wanted, Steps):
        if not (0 <= wanted.first <= wanted.last < steps and 1 <= wanted.count <= wanted.last - wanted.first + 1):
            found.append(
                f"algorithm.train_steps: need 0 <= first <= last < {steps} (sampler.steps) and count in"
                f" 1..last-first+1, got first {wanted.first}, last {wanted.last}, count {wanted.count}"
            )
    elif not wanted or len(set(wanted)) < len(wanted) or not all(0 <= k < steps for k in wanted):
        found.append(
            f"algorithm.train_steps must be different whole numbers in 0..{steps - 1} (sampler.steps - 1),"
            f" got {list(wanted)}"
        )
    if algorithm.offset == "random" and not isinstance(wanted, int):
        found.append("algorithm.offset: random needs train_steps to be a count")
    found += label_problems(
        labels=algorithm.labels,
        tau=algorithm.tau,
        label_smoothing=algorithm.label_smoothing,
        misranks=algorithm.misranks,
    )
    if algorithm.safeguard and (
        algorithm.objective != "dpo" or algorithm.labels == "soft" or algorithm.label_smoothing != 0
    ):
        found.append(
            "algorithm.safeguard keeps one winner's likelihood from falling, and other losses than dpo with hard"
            " labels lower it on purpose once it has gone too far; set algorithm.objective to dpo, labels to hard"
            " and label_smoothing to 0, or leave safeguard out"
        )
    found += _kl_problems(algorithm, steps)
    if algorithm.guidance is not None and not differentiable:
        found.append(
            "algorithm.guidance (TailorPO-G) needs the gradient of the reward, and this reward is not"
            " differentiable; use guidance: null (TailorPO) or a differentiable reward"
        )
    if algorithm.guidance is not None and algorithm.step_reward != "predicted":
        found.append(
            "algorithm.guidance follows the gradient of the predicted picture's reward, and algorithm.step_reward"
            " ranks by another number; use step_reward: predicted, or guidance: null"
        )
    symmetric = isinstance(algorithm.guidance, SigmaGuidance) and algorithm.guidance.symmetric
    if symmetric and algorithm.objective == "plackett_luce":
        found.append(
            "algorithm.guidance.symmetric moves the two of a pair, and a list has more: set algorithm.objective to"
            " dpo or ipo, or symmetric to false"
        )
    if (
        isinstance(algorithm.guidance, SigmaGuidance)
        and algorithm.guidance.corrected_beta
        and (algorithm.labels == "soft" or algorithm.objective != "dpo")
    ):
        found.append(
            "algorithm.guidance.corrected_beta is for dpo with hard labels: soft ones grow with the push"
            " themselves, and their optimum lies where it did; set labels to hard or corrected_beta to false"
        )
    return found


def _kl_problems(algorithm: TailorPO, steps: int) -> list[str]:
    found: list[str] = []
    if algorithm.beta == "auto" and algorithm.labels == "hard":
        found.append(
            "algorithm.beta: auto needs labels: soft; with hard labels beta sets a speed and not a KL (docs/kl.md)"
        )
    if algorithm.beta == "auto" and algorithm.kl_target is None:
        found.append("algorithm.beta: auto needs algorithm.kl_target, the nats of a trajectory it is computed for")
    if algorithm.beta == "auto" and algorithm.tau == "auto":
        found.append(
            "algorithm.beta: auto needs a tau in units of the reward; with tau: auto every trained step rests at"
            " 1 / (4 beta^2) nats, so set beta itself"
        )
    if algorithm.kl_target is not None and algorithm.kl_measured == 0:
        found.append("algorithm.kl_target needs the KL of all steps: set algorithm.kl_measured to 1 or more")
    if algorithm.kl_target is not None and not algorithm.finish:
        found.append(
            "algorithm.kl_target needs the KL of all steps, also after the last trained: set algorithm.finish to true"
        )
    if algorithm.kl_target is not None and algorithm.reference != "base":
        found.append(
            "algorithm.kl_target holds the KL to the base model, which a moving reference lets go of; leave one of"
            " kl_target and reference out"
        )
    if algorithm.kl_steps is not None and algorithm.controlled != "kl_penalty" and algorithm.kl_penalty == 0:
        found.append("algorithm.kl_steps has no effect without algorithm.kl_penalty; set one or leave both out")
    if not all(0 <= k < steps for k in algorithm.kl_steps or ()):
        found.append(
            f"algorithm.kl_steps must be in 0..{steps - 1} (sampler.steps - 1), got {list(algorithm.kl_steps or ())}"
        )
    return found
