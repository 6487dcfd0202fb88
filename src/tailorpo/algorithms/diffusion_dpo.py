"""Diffusion-DPO (Wallace et al. 2024, arXiv 2311.12908): pairs of finished pictures, trained offline.

    L = -log sigmoid(-(beta / 2) [(E_w - E_w^ref) - (E_l - E_l^ref)]),     E = |y - o(x_t, t, c)|^2
    x_t = alpha_t x_0 + sigma_t e,     t ~ U{0..T-1},     e ~ N(0, I)

t and e are drawn once for a pair and are the same for winner and loser. o is the network's output without guidance, y
what it was trained to give: e for a model that predicts epsilon, alpha e - sigma x_0 for v, x_0 for the mixture. No
step of a sampler is taken, and the noise levels all weigh the same in units of y (the paper drops the weights of the
bound it starts from).

|.|^2 is the MEAN over the D dimensions of a latent (`reduction: mean`), the convention in which the official beta is
5000; the same loss in sums has beta / D. In sums the bracket times -1/2 is a difference of log-ratios, of the densities
N(y; o, I) and N(y; o_ref, I). E - E^ref is computed as the product (o - o_ref)(o + o_ref - 2 y): nothing cancels.

A pair's winner and loser may answer different prompts. Pairs are drawn with replacement: which pair, t and e a row of
an update has depends on the run's seed and the row's number alone. The prompts of the run serve its evaluation.

Left out: weights over t other than uniform, the supervised baseline, and replacing prompts by the empty one; only the
conditional prediction is trained, although guidance will use both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tailorpo.algorithms.base import Cost, Gather, Shown, Stored, Update, alone, common_problems
from tailorpo.algorithms.d3po import Reduction
from tailorpo.device import sent
from tailorpo.gaussian_step import per_sample_sum
from tailorpo.models import DiffusionModel
from tailorpo.noise import Key, Noise
from tailorpo.objectives import dpo
from tailorpo.pair_dataset import PairLatents, encode_pairs
from tailorpo.policy import Policy
from tailorpo.prediction import training_target
from tailorpo.rollout import Trajectories
from tailorpo.samplers import DDIM
from tailorpo.step_rewards import Score

# One data set is encoded once for a model, however many updates ask for it, and forgotten with the model.
_ENCODED: WeakKeyDictionary[DiffusionModel, dict[str, PairLatents]] = WeakKeyDictionary()


@dataclass(frozen=True)
class NoisedPairs:
    """B pairs at their noise levels, evaluated by policy and reference; every number is (B,).

    `gain_winner` is E - E^ref with its graph, a sum over the D dimensions; `error_*` are the four means without.
    """

    gain_winner: Tensor
    gain_loser: Tensor
    dimensions: int
    time: Tensor
    error_winner: Tensor
    error_loser: Tensor
    error_winner_reference: Tensor
    error_loser_reference: Tensor

    @property
    def k(self) -> None:
        """No step of the sampler: every pair has a time of its own."""
        return None

    @property
    def logit(self) -> Tensor:
        """Log-ratio of the winner minus that of the loser under unit Gaussians around the network's output, in nats of
        the sum, (B,)."""
        return (self.gain_loser - self.gain_winner) / 2

    def figures(self) -> dict[str, Tensor]:
        """What there is to log; `accuracy` is 1 where the policy denoises the winner better than the loser, both
        compared to the reference, and 1/2 where there is no difference."""
        return {
            "accuracy": (torch.sign(self.logit.detach()) + 1) / 2,
            "log_ratio_winner": -self.gain_winner.detach() / 2,
            "log_ratio_loser": -self.gain_loser.detach() / 2,
            "error_winner": self.error_winner,
            "error_loser": self.error_loser,
            "error_winner_reference": self.error_winner_reference,
            "error_loser_reference": self.error_loser_reference,
            "time": self.time.float(),
            "present": torch.ones_like(self.time, dtype=torch.bool),
        }

    def shown(self) -> Shown | None:
        """Nothing: the pictures are in the data set."""
        return None

    def stored(self, policy: Policy) -> Stored:
        """Impossible: a later epoch draws other noise, which is another row."""
        raise NotImplementedError("pairs are drawn anew for every update; update inline")


@dataclass(frozen=True, kw_only=True)
class DiffusionDPO:
    """The `algorithm` section of a run file, and the algorithm.

    `batch.trajectories` is the number of pairs of an update.

    Attributes:
        pairs: the file that lists the pairs; `pair_dataset` says what is in it.
        beta: strength of the tie to the reference; of the mean over dimensions or of the sum, by `reduction`.
        reduction: "mean" as in the official code, or "sum".
    """

    name: Literal["diffusion_dpo"] = "diffusion_dpo"
    pairs: str
    beta: float = 5000.0
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")

    @property
    def update(self) -> Update:
        """Pairs are there already; there is nothing to store first."""
        return "inline"

    @property
    def inner_epochs(self) -> int:
        """Every row once; further epochs are further updates."""
        return 1

    @property
    def minibatch(self) -> int:
        """There is no buffer."""
        return 1

    @property
    def accumulate(self) -> int:
        """There is no buffer."""
        return 1

    @property
    def needs_gradient(self) -> bool:
        """No reward is asked."""
        return False

    def problems(self, *, sampler: DDIM, differentiable: bool, trainable: bool) -> list[str]:
        """Everything about this algorithm that cannot work with the rest of the run, in words."""
        # The sampler only draws the evaluation's pictures, so a deterministic one is fine.
        return (
            [] if trainable else common_problems(sampler=DDIM(), trainable=trainable, update="inline", inner_epochs=1)
        )

    def trained_steps(self, steps: int, *, noise: Noise, update: int) -> tuple[int, ...]:
        """None of the sampler's, but one number per pair, which the loop counts as one step."""
        return (0,)

    def cost(self, steps: int, trained: Sequence[int]) -> Cost:
        """What one pair costs: two latents through policy and reference, and back through the policy."""
        return Cost(
            forwards=4,
            backwards=2,
            input_gradients=0,
            reward_queries=0,
            guided=False,
            references=2,
            scored_rows=0,
            graph_rows=2,
        )

    def load(self, model: DiffusionModel, *, on_picture: Callable[[int, int], None] | None = None) -> PairLatents:
        """The encoded data set; encoded when first asked for and kept as long as the model.

        Raises:
            UserError: all its mistakes.
        """
        encoded = _ENCODED.setdefault(model, {})
        if self.pairs not in encoded:
            encoded[self.pairs] = encode_pairs(Path(self.pairs).expanduser(), model, on_picture=on_picture)
        return encoded[self.pairs]

    def collect(
        self,
        policy: Policy,
        trajectories: Trajectories,
        *,
        trained: Sequence[int],
        score: Score,
        noise: Noise,
        on_step: Callable[[int], None] | None = None,
    ) -> Iterator[NoisedPairs]:
        """Yield one pair of the data set for every trajectory, of which only the key is used; nothing is finished."""
        trajectories.reward = trajectories.latents.new_full((len(trajectories),), math.nan)
        yield self.evaluate(policy, self.load(policy.model), trajectories.keys, noise=noise)
        if on_step:
            on_step(policy.schedule.steps)

    def evaluate(
        self, policy: Policy, pairs: PairLatents, keys: Sequence[tuple[Key, ...]], *, noise: Noise
    ) -> NoisedPairs:
        """Draw pair, time and noise of every key, and compare policy and reference there.

        Two network calls of 2 len(keys) latents each: winners, then losers; the policy's with its graph.
        """
        model, count = policy.model, len(keys)
        chosen = torch.tensor([noise.integer(len(pairs), *key, "pair") for key in keys])
        time = torch.tensor([noise.integer(len(model.alphas_cumprod), *key, "time") for key in keys])
        epsilon = sent(noise.normals(model.latent_shape, keys, "noise").repeat(2, 1, 1, 1), model.device)
        x0 = sent(pairs.pictures[torch.cat([pairs.winner[chosen], pairs.loser[chosen]])], model.device)
        prompts = [side[int(row)] for side in (pairs.prompts_winner, pairs.prompts_loser) for row in chosen]

        abar = model.alphas_cumprod[time].repeat(2).view(-1, 1, 1, 1)
        alpha, sigma, times = (
            sent(each, model.device) for each in (abar.sqrt().float(), (1 - abar).sqrt().float(), time.repeat(2))
        )
        noisy, cond = alpha * x0 + sigma * epsilon, model.encode(prompts)
        target = training_target(x0, epsilon, alpha=alpha, sigma=sigma, kind=model.prediction_type)
        with torch.enable_grad():
            output = policy.predict_plain(noisy, times, cond)
        with torch.no_grad(), model.reference():
            reference = policy.predict_plain(noisy, times, cond)

        # Squared distances to the target, (2B,): policy minus reference with its graph, and each for the log.
        dimensions = math.prod(model.latent_shape)
        gain = per_sample_sum((output - reference) * (output + reference - 2 * target))
        error = per_sample_sum((output.detach() - target) ** 2) / dimensions
        error_reference = per_sample_sum((reference - target) ** 2) / dimensions
        return NoisedPairs(
            gain_winner=gain[:count],
            gain_loser=gain[count:],
            dimensions=dimensions,
            time=time,
            error_winner=error[:count],
            error_loser=error[count:],
            error_winner_reference=error_reference[:count],
            error_loser_reference=error_reference[count:],
        )

    def prepare(
        self, stored: Sequence[Stored], memory: dict[str, list[float]], gather: Gather = alone
    ) -> Sequence[Stored]:
        """Nothing is stored."""
        return stored

    def loss(self, policy: Policy, sample: NoisedPairs) -> Tensor:
        """The loss of each pair, (B,)."""
        return dpo(sample.logit, beta=self.beta / (sample.dimensions if self.reduction == "mean" else 1))
