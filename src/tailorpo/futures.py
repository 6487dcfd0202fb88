"""Step rewards that look further ahead than the predicted clean picture: lookahead and continuations.

A candidate x_k, k steps behind it and K - k left, is worth Q(x_k) = E[r(x_0) | x_k]. TailorPO takes r(x0hat(x_k)) for
it (`step_rewards`). Two estimates that cost more evaluations of the network:

    lookahead n       deterministic DDIM (eta 0) from x_k through n later levels of the schedule, which divide the rest
                      evenly, k < j_1 < .. < j_n < K with j_i = k + floor(i (K - k) / (n + 1)):
                          x_j' = alpha_j' x0hat(x_j) + sigma_j' epsilon(x_j)
                      and the reward of the last prediction, x0hat(x_{j_n}). Where fewer steps are left it goes through
                      all of them, which is DDIM with eta 0 to the end: n' = min(n, K - 1 - k) further evaluations.
    continuations n   the mean reward of the ends of n chains of the run's own sampler from x_k. All candidates of one
                      x_{k-1} share the noise of each chain: what ranks them is the DIFFERENCE of their values, and
                      the noise of single chains is many times larger. A chain may be cut after m steps and closed by
                      its predicted clean picture: n min(m, K - 1 - k) further evaluations.

The first evaluation, at x_k itself, is the one that the next denoising step needs, and is reused there in all cases.
After the last step (k = K) both are the reward of the finished picture. The noises have streams of their own, so that
the walk draws what it would have drawn without.

Lookahead is one end of a coupling and no mean, so it is biased for Q under a sampler with noise; it takes away the blur
of early predictions, for which a reward may not have been made. Continuations are unbiased where they are not cut.

Left out: gradients of either (guidance follows the predicted picture's reward, and mixing the two would rank by one
number and push along another), the control variate r(x0hat) + mean[r(end) - r(x0hat along the chain)], and ensembles
of rewards, whose running scales belong to predictions at each step's own time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tailorpo.models import Conditioning
from tailorpo.policy import Policy, PolicyStep

Draw = Callable[[int, int], Tensor]
"""(number of the chain, step) -> standard normal noise of the latents' shape, the same for all siblings."""


@dataclass(frozen=True)
class End:
    """Where a look ahead ends: `clean`, (B, C, h, w), predicted at the network's `time`, or finished where that is
    None."""

    clean: Tensor
    time: int | None


@dataclass(frozen=True, kw_only=True)
class Lookahead:
    """The reward of the clean picture predicted after deterministic steps ahead.

    Attributes:
        lookahead: further network evaluations per candidate, at least 1; at most those that are left are made.
    """

    lookahead: int

    def __post_init__(self) -> None:
        if self.lookahead < 1:
            raise ValueError(
                f"lookahead must be at least 1, got {self.lookahead}; without one it is step_reward: predicted"
            )

    @property
    def ends(self) -> int:
        """Pictures per candidate."""
        return 1

    def evaluations(self, left: int) -> int:
        """Further network evaluations of one candidate with `left` steps left, at least 1."""
        return min(self.lookahead, left - 1)

    def finished(self, left: int) -> int:
        """How many of its pictures are finished ones."""
        return 0

    def look(self, policy: Policy, latents: Tensor, first: PolicyStep, *, k: int, cond: Conditioning) -> End:
        """Walk ahead from x_k = latents (B, C, h, w), whose step is `first`."""
        schedule, here, step, x = policy.schedule, k, first, latents
        left = schedule.steps - k
        count = self.evaluations(left)
        for i in range(1, count + 1):
            to = k + i * left // (count + 1)
            epsilon = (x - float(schedule.alpha[here]) * step.x0) / float(schedule.sigma[here])
            x = float(schedule.alpha[to]) * step.x0 + float(schedule.sigma[to]) * epsilon
            here, step = to, policy.step(x, to, cond)
        return End(step.x0, int(schedule.time[here]))


@dataclass(frozen=True, kw_only=True)
class Continuations:
    """The mean reward of several chains from the candidate on, under noises that its siblings share.

    Attributes:
        continuations: chains per candidate, at least 1.
        cut: steps after which a chain ends and its predicted clean picture is scored; null for chains to the end.
    """

    continuations: int
    cut: int | None = None

    def __post_init__(self) -> None:
        if self.continuations < 1:
            raise ValueError(f"continuations must be at least 1, got {self.continuations}")
        if self.cut is not None and self.cut < 1:
            raise ValueError(f"cut must be at least 1, or null for chains to the end; got {self.cut}")

    @property
    def ends(self) -> int:
        """Pictures per candidate."""
        return self.continuations

    def evaluations(self, left: int) -> int:
        """Further network evaluations of one candidate with `left` steps left, at least 1."""
        return self.continuations * min(left if self.cut is None else self.cut, left - 1)

    def finished(self, left: int) -> int:
        """How many of its pictures are finished ones."""
        return self.continuations if self.cut is None or self.cut >= left else 0

    def look(
        self, policy: Policy, latents: Tensor, first: PolicyStep, *, k: int, cond: Conditioning, draw: Draw
    ) -> Iterator[End]:
        """The end of each chain from x_k = latents (n B, C, h, w), whose step is `first`; `draw` gives B rows."""
        schedule = policy.schedule
        for number in range(self.continuations):
            here, step, x = k, first, latents
            while True:
                noise = draw(number, here)
                x = step.gaussian.sample(noise.repeat(len(x) // len(noise), 1, 1, 1))
                here += 1
                if here == schedule.steps:
                    yield End(x, None)
                    break
                step = policy.step(x, here, cond)
                if here - k == self.cut:
                    yield End(step.x0, int(schedule.time[here]))
                    break


StepReward = Literal["predicted"] | Lookahead | Continuations
"""What a candidate is ranked by."""
