"""How much `tailorpo jensen` measures, at which steps, and what that costs.

Costs are exact and counted by a test: F are guided network evaluations of one latent, B backward passes through the
network, pictures are decoded and scored (by every reward), gradients go from a reward back to a latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tailorpo.errors import UserError
from tailorpo.samplers import DDIM

DEFAULT_STEPS = 8
"""Steps that are measured if none are named."""
POWER_ITERATIONS = 2
"""Of the reward's Hessian, for the smooth bound."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured.

    Attributes:
        states: trajectories, each of which gives one pair of siblings at every step.
        continuations: of each sibling, with noises that the two share; their mean is taken for the truth.
        lookahead: deterministic steps of the lookahead, each one more evaluation.
        plain_states: trajectories of the unguided network, for posterior variance and bounds; 0 leaves both out.
        probes: random vectors per state for the trace of the Jacobian.
        batch: latents at once; changes memory and speed, and results by rounding only.
    """

    states: int = 64
    continuations: int = 4
    lookahead: int = 1
    plain_states: int = 24
    probes: int = 2
    batch: int = 48

    def __post_init__(self) -> None:
        least = {"states": 4, "continuations": 2, "lookahead": 1, "plain_states": 0, "probes": 1, "batch": 2}
        problems = [
            f"--{name.replace('_', '-')} must be at least {low}, got {getattr(self, name)}"
            for name, low in least.items()
            if getattr(self, name) < low
        ]
        if 0 < self.plain_states < 4:
            problems.append(f"--plain-states must be at least 4, or 0 for none, got {self.plain_states}")
        if problems:
            raise UserError("\n".join(problems))

    @property
    def group(self) -> int:
        """States at once, so that all their continuations fit into a batch."""
        return max(1, self.batch // (2 * self.continuations))

    @property
    def plain_group(self) -> int:
        """States of the posterior part at once: its graphs take a few times the memory of a forward."""
        return max(1, self.batch // 4)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a measurement takes.

    Attributes:
        forwards: guided network evaluations.
        plain_forwards: evaluations without guidance; under guidance two of them are one guided evaluation.
        backwards: through the network, to its input.
        pictures: decoded and scored.
        reward_gradients: from a reward to a latent, of each differentiable reward.
    """

    forwards: int
    plain_forwards: int
    backwards: int
    pictures: int
    reward_gradients: int


def cost(sizes: Sizes, steps: Sequence[int], *, sampler: DDIM, differentiable: int) -> Cost:
    """Of a measurement from its beginning.

    Args:
        sizes: how much.
        steps: the measured ones.
        sampler: the run's.
        differentiable: rewards that have a gradient.
    """
    total, n = sampler.steps, sizes.continuations
    ahead = [total - k - 1 for k in steps]  # steps between a sibling and the end
    open_ = [left for left in ahead if left]
    pair = sum(2 + 2 * min(sizes.lookahead, left - 1) + 2 * n * (left - 1) for left in open_)
    scored = sum(2 * (2 + n) if left else 2 for left in ahead)
    plain = total + 2 * len(open_) if sizes.plain_states else 0
    probes = sizes.probes + differentiable
    gradients = differentiable * (1 + 2 * sizes.probes + 2 * POWER_ITERATIONS)
    return Cost(
        forwards=sizes.states * (total + pair),
        plain_forwards=sizes.plain_states * plain,
        backwards=sizes.plain_states * len(open_) * probes,
        pictures=sizes.states * (1 + scored) + sizes.plain_states * (1 + len(open_)),
        reward_gradients=sizes.plain_states * len(open_) * gradients,
    )


def chosen_steps(text: str | None, *, steps: int) -> tuple[int, ...]:
    """What `--steps` means: `all`, numbers with commas, or (None) about eight evenly spaced with both ends.

    Raises:
        UserError: it is something else, or a number out of range.
    """
    if text is None:
        count = min(DEFAULT_STEPS, steps)
        return tuple(dict.fromkeys(round(i * (steps - 1) / max(count - 1, 1)) for i in range(count)))
    if text.strip() == "all":
        return tuple(range(steps))
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UserError(f"--steps takes `all` or whole numbers with commas, such as 0,4,9,14; got {text!r}") from None
    wrong = [number for number in numbers if not 0 <= number < steps]
    if wrong:
        raise UserError(f"--steps: there is no step {wrong[0]}; a run of {steps} steps has 0 to {steps - 1}")
    return tuple(numbers)
