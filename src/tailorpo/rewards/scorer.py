"""What a reward is, and the Scorer that training and evaluation call.

A reward maps pictures (B, 3, H, W) in [0, 1] and their prompts to (B,) numbers, higher is better. The Scorer adds
several up, counts, and stands between the library and code it does not control: whatever a reward does wrong ends here,
as one RewardError that names the reward, says what it was given and what came back, and how to go on.

Left out: normalising the scores (a pair compares two pictures under the same prompt, so a shift cancels; scales belong
to gaps, which `ensemble` knows), and retrying a reward that failed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, Self, cast, runtime_checkable

import torch
from torch import Tensor

from tailorpo.errors import DivergedError, RewardError
from tailorpo.rewards.refusals import describe, diverged, no_gradient, no_graph, not_finite, raised, wrong_result


class Reward(Protocol):
    """Anything that scores pictures; a plain object with these three members will do."""

    @property
    def name(self) -> str:
        """What messages, metrics and tables call it."""
        ...

    @property
    def differentiable(self) -> bool:
        """Whether the gradient of the score with respect to the pictures exists and is worth following."""
        ...

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1] against their prompts: a floating (B,) tensor, higher is better."""
        ...


@runtime_checkable
class StepAware(Protocol):
    """A reward that scores the predicted clean picture of a noisy step otherwise than a finished one."""

    def at(self, time: int, /) -> Self:
        """The same reward, told that the pictures are predictions at the network's time (0 is finished)."""
        ...


class Scorer:
    """The weighted sum of one or more rewards, checked and counted.

    A gradient is "asked for" when gradients are enabled and `images.requires_grad`; then every member has to be
    differentiable and its score has to depend on the pictures. In every other case the members run without a graph.
    """

    def __init__(
        self,
        members: Sequence[tuple[Reward, float]],
        *,
        on_invalid: Literal["stop", "skip"] = "stop",
        devices: Sequence[torch.device] = (),
    ) -> None:
        """Take (reward, weight) pairs; `on_invalid` says what a NaN or infinite score does: stop, or become a NaN row;
        `devices` where each reward wants its pictures, if not where they are.

        Raises ValueError without members or with a weight that is not finite.
        """
        if not members:
            raise ValueError("a Scorer needs at least one reward")
        for reward, weight in members:
            if not math.isfinite(weight):
                raise ValueError(f"the weight of reward {reward.name!r} has to be a finite number, not {weight}")
        self.members = tuple(members)
        self.devices: tuple[torch.device | None, ...] = tuple(devices) or (None,) * len(members)
        self.on_invalid: Literal["stop", "skip"] = on_invalid
        self.queries = 0
        """Pictures scored so far (a picture scored by several members counts once)."""
        self.invalid = 0
        """Pictures whose score was NaN or infinite so far; only `on_invalid="skip"` lets this grow."""
        self.patient = False
        """Whether scores of pictures on the way are only looked at when the next are asked for, or by `settle`: a GPU
        would run dry at each look."""
        self._unread: tuple[tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor, Sequence[str]], ...] = ()

    @property
    def differentiable(self) -> bool:
        """Whether every member is."""
        return all(reward.differentiable for reward, _ in self.members)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1] against B prompts: (B,) float32, the weighted sum, NaN where skipped.

        Raises RewardError if a member raises, returns the wrong thing, has no gradient where one is asked for, or
        (under "stop") returns a number that is not finite; ValueError if images and prompts do not fit together.
        """
        return self._sum(self._scores(images, prompts, None))

    def at(self, time: int, /) -> Callable[[Tensor, Sequence[str]], Tensor]:
        """The same for predicted clean pictures at the network's time: members that are StepAware are told it."""

        def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
            return self._sum(self._scores(images, prompts, time))

        return score

    def _sum(self, scores: Sequence[Tensor]) -> Tensor:
        total = scores[0] * self.members[0][1]
        for score, (_, weight) in zip(scores[1:], self.members[1:], strict=True):
            total = total + score * weight
        return total

    def total_and_each(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """What `__call__` and `each` return, from one scoring."""
        scores = self._scores(images, prompts, None)
        return self._sum(scores), dict(zip(self.names, scores, strict=True))

    @property
    def names(self) -> tuple[str, ...]:
        """The members', each once: "name", "name#2", ..."""
        names: list[str] = []
        for reward, _ in self.members:
            label, number = reward.name, 1
            while label in names:
                number += 1
                label = f"{reward.name}#{number}"
            names.append(label)
        return tuple(names)

    def each(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score as `__call__` does, but return every member's own unweighted (B,) by its name in `names`."""
        return self.total_and_each(images, prompts)[1]

    def _scores(self, images: Tensor, prompts: Sequence[str], time: int | None) -> list[Tensor]:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"expected floating images (B, 3, H, W), got {describe(images)}")
        if len(prompts) != len(images):
            raise ValueError(f"{len(images)} pictures came with {len(prompts)} prompts")
        self.settle()
        gradient = torch.is_grad_enabled() and images.requires_grad
        rewards = [reward for reward, _ in self.members]
        if time is not None:
            rewards = [reward.at(time) if isinstance(reward, StepAware) else reward for reward in rewards]
        # A reward may well give a broken picture a number (JPEG does), so the pictures themselves are looked at, too.
        broken = ~torch.isfinite(images.detach()).flatten(1).all(1)
        try:
            scores = [
                _score(reward, images, tuple(prompts), gradient=gradient, device=device)
                for reward, device in zip(rewards, self.devices, strict=True)
            ]
        except RewardError:
            self._refuse_broken(broken, prompts)  # then the reward is not to blame
            raise
        wrong = [~torch.isfinite(score.detach()) for score in scores]
        bad = torch.stack([broken, *wrong]).any(dim=0)
        self.queries += len(images)
        self._unread = ((bad.sum(), broken, [score.detach() for score in scores], wrong, images.detach(), prompts),)
        if time is None or not self.patient:
            self.settle()
        # A row that is infinite in one member is NaN in all: no ranking can be built on half of a sum.
        return [score.masked_fill(bad, math.nan) for score in scores]

    def settle(self) -> None:
        """Count, or refuse, what the last call found that was not a number.

        Raises what `__call__` does of numbers that are not finite.
        """
        unread, self._unread = self._unread, ()
        for count, broken, scores, wrong, images, prompts in unread:
            invalid = int(count)  # waits for the device
            if invalid and self.on_invalid == "stop":
                self._refuse_broken(broken, prompts)
                self._refuse_scores(scores, wrong, images, prompts)
            self.invalid += invalid

    def _refuse_broken(self, broken: Tensor, prompts: Sequence[str]) -> None:
        if self.on_invalid == "stop" and bool(broken.any()):
            raise DivergedError(diverged(broken, prompts))

    def _refuse_scores(
        self, scores: Sequence[Tensor], wrong: Sequence[Tensor], images: Tensor, prompts: Sequence[str]
    ) -> None:
        for (reward, _), score, rows in zip(self.members, scores, wrong, strict=True):
            if bool(rows.any()):
                raise RewardError(not_finite(reward.name, score.detach(), rows, images, prompts))


def _score(
    reward: Reward, images: Tensor, prompts: tuple[str, ...], *, gradient: bool, device: torch.device | None
) -> Tensor:
    """One member's (B,) float32 scores on the device of the images."""
    if gradient and not reward.differentiable:
        raise RewardError(no_gradient(reward.name))
    given = (images if gradient else images.detach()).to(device or images.device)
    try:
        with torch.set_grad_enabled(gradient):
            score = cast(object, reward(given, prompts))  # which may be anything
    except RewardError:
        raise
    except Exception as error:  # whatever a user's reward raises; KeyboardInterrupt and SystemExit pass
        raise RewardError(raised(reward.name, error, images, prompts)) from error
    if not isinstance(score, Tensor) or score.shape != (len(images),) or not score.is_floating_point():
        raise RewardError(wrong_result(reward.name, score, images, prompts))
    if gradient and not score.requires_grad:
        raise RewardError(no_graph(reward.name))
    return score.to(device=images.device, dtype=torch.float32)
