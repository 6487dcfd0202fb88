"""What the training loop needs of a method, and what the methods share.

A method is a frozen dataclass, at once the `algorithm` section of a run file and the implementation, with two
functions: `collect` walks a batch of trajectories and yields what to train on, step by step; `loss` turns that into
numbers with a gradient. The rest says what would go wrong and what it costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, TypeVar

from torch import Tensor

from tailorpo.noise import Noise
from tailorpo.policy import Policy
from tailorpo.rollout import Trajectories
from tailorpo.samplers import DDIM
from tailorpo.step_rewards import Score

Update = Literal["inline", "buffered"]
T = TypeVar("T")


class Gather(Protocol):
    """Makes the values of all processes known to each of them, in order of rank."""

    def __call__(self, value: T, /) -> list[T]: ...


def alone(value: T, /) -> list[T]:
    """The `Gather` of one process."""
    return [value]


@dataclass(frozen=True)
class Cost:
    """What one trajectory costs.

    Attributes:
        forwards: guided network evaluations of one latent.
        backwards: backward passes through the network for the loss.
        input_gradients: backward passes to the latents for guidance.
        reward_queries: pictures decoded and scored, the finished one included.
        finished: of the reward queries, finished pictures, which are decoded in full; those of a trained last step are
            not counted.
        guided: whether forwards and backwards are under the sampler's guidance; without it two are worth one.
        references: of the forwards, those of the reference.
        picture_gradients: of the reward queries, those that are differentiated with respect to the latents.
        scored_rows: latents that are scored in one call.
        graph_rows: latents in a forward that is differentiated for the loss; of one row of a minibatch if buffered.
        graphs: such forwards whose graphs are in memory at the same time.
    """

    forwards: int
    backwards: int
    input_gradients: int
    reward_queries: int
    finished: int = 1
    guided: bool = True
    references: int = 0
    picture_gradients: int = 0
    scored_rows: int = 1
    graph_rows: int = 1
    graphs: int = 1


@dataclass(frozen=True)
class Shown:
    """Two pictures that were compared, for people to look at; everything has B rows."""

    prompts: Sequence[str]
    winner: Tensor
    loser: Tensor
    reward_winner: Tensor
    reward_loser: Tensor
    guided: Tensor


class Stored(Protocol):
    """What a minibatch of a buffered update is cut from: rows of one denoising step, without a graph."""

    def __len__(self) -> int: ...

    def rows(self, index: Tensor) -> Self:
        """A selection of the batch."""
        ...


class Sample(Protocol):
    """What `collect` yields: one batch of things to train on, all of step `k`, or of no step of the sampler (None)."""

    @property
    def k(self) -> int | None: ...

    def stored(self, policy: Policy) -> Stored:
        """What a later minibatch needs of it."""
        ...

    def figures(self) -> dict[str, Tensor]:
        """What there is to log, (B,) each; "present" (bool) says which rows count."""
        ...

    def shown(self) -> Shown | None:
        """The pictures that were compared, if it has any."""
        ...


class Algorithm(Protocol):
    """A method, as the training loop sees it.

    Attributes:
        update: "inline": the loss of a sample is run while the graph of the rollout is there, one optimizer step per
            update; "buffered": samples are stored first and trained in shuffled minibatches.
        inner_epochs: passes over the buffer.
        minibatch: rows of a minibatch of the buffer.
        accumulate: minibatches whose gradients make one optimizer step.
        needs_gradient: whether the reward must be differentiable.
    """

    @property
    def name(self) -> str: ...
    @property
    def update(self) -> Update: ...
    @property
    def inner_epochs(self) -> int: ...
    @property
    def minibatch(self) -> int: ...
    @property
    def accumulate(self) -> int: ...
    @property
    def needs_gradient(self) -> bool: ...

    def problems(self, *, sampler: DDIM, differentiable: bool, trainable: bool) -> list[str]:
        """Everything about this method that cannot work with the rest of the run, in words."""
        ...

    def trained_steps(self, steps: int, *, noise: Noise, update: int) -> tuple[int, ...]:
        """The trained steps of one update, ascending."""
        ...

    def cost(self, steps: int, trained: Sequence[int]) -> Cost:
        """What one trajectory costs with the given trained steps."""
        ...

    def collect(
        self,
        policy: Policy,
        trajectories: Trajectories,
        *,
        trained: Sequence[int],
        score: Score,
        noise: Noise,
        on_step: Callable[[int], None] | None = None,
    ) -> Iterator[Sample]:
        """Walk the trajectories and yield what to train on; sets `trajectories.reward` where it scores their ends."""
        ...

    # Each method takes back what its own `collect` yielded, which a protocol without type parameters cannot say.
    def prepare(self, stored: Sequence[Any], memory: dict[str, list[float]], gather: Gather, /) -> Sequence[Stored]:
        """The whole buffer of an update before its first epoch.

        Args:
            stored: everything that was collected, by this process.
            memory: numbers that the method keeps from update to update, the same in all processes; saved with
                checkpoints.
            gather: for what depends on the samples of all processes.
        """
        ...

    def loss(self, policy: Policy, sample: Any, /) -> Tensor:
        """The loss of each row, (B,)."""
        ...


def common_problems(*, sampler: DDIM, trainable: bool, update: Update, inner_epochs: int) -> list[str]:
    """What no method can work with."""
    found: list[str] = []
    if sampler.eta == 0:
        found.append("sampler.eta is 0: a deterministic sampler has no density to train; use eta 1")
    if update == "inline" and inner_epochs > 1:
        found.append("algorithm.inner_epochs needs update: buffered; an inline update uses each sample once")
    if not trainable:
        found.append(
            "model.lora is null: the reference is the model with its LoRA switched off, so there is none; set"
            " model.lora, or model.full: true to train the whole network"
        )
    return found


def check_counts(method: Algorithm) -> None:
    """Refuse counts below one.

    Raises:
        ValueError: names what was got.
    """
    counts = (method.inner_epochs, method.minibatch, method.accumulate)
    if min(counts) < 1:
        raise ValueError("inner_epochs, minibatch and accumulate must be at least 1, got {}, {} and {}".format(*counts))
