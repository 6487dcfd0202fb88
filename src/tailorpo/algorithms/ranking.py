"""From candidates to something to train on: their order, its label, guidance, and where the walk goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tailorpo.algorithms.groups import Group
from tailorpo.algorithms.guided import move_pair
from tailorpo.algorithms.labels import pair_probability, stage_targets, temperature
from tailorpo.algorithms.misranks import misrank_at
from tailorpo.algorithms.pairs import CandidatePair, Pair
from tailorpo.algorithms.safeguard import loser_scale
from tailorpo.guidance import length
from tailorpo.noise import Noise
from tailorpo.policy import Policy
from tailorpo.rollout import Branch, Trajectories
from tailorpo.step_rewards import Score

if TYPE_CHECKING:
    from tailorpo.algorithms.tailorpo import TailorPO


@torch.no_grad()
def rank(
    algorithm: TailorPO,
    policy: Policy,
    branch: Branch,
    trajectories: Trajectories,
    *,
    score: Score,
    noise: Noise,
) -> Pair:
    """Label a branch of the algorithm's candidates; the result's class is what its loss needs."""
    batch, count, k = len(trajectories), algorithm.candidates, branch.k
    rows = torch.arange(batch, device=branch.latents.device)
    reward = branch.scored.reward.view(count, batch)
    # A candidate without a reward comes last; of equals the one drawn first comes first.
    order = reward.nan_to_num(nan=-torch.inf).argsort(dim=0, descending=True, stable=True) * batch + rows
    having = reward.isfinite().sum(dim=0)
    first, second = order[0], order.gather(0, (having - 1).clamp(min=1).unsqueeze(0))[0]
    reward_winner, reward_loser = branch.scored.reward[first], branch.scored.reward[second]
    present = having >= (count if algorithm.objective == "plackett_luce" else 2)
    tie = present & (reward_winner == reward_loser)

    gaussian = branch.step.detach().gaussian
    reference = policy.reference_step(branch.latents, k, trajectories.cond)
    kl = gaussian.kl(reference)
    moved = move_pair(algorithm.guidance, policy, branch, trajectories, first, second, score=score)
    noises = branch.noises.flatten(0, 1)
    noise_winner = noises[first] + moved.push / gaussian.std
    noise_loser = noises[second] + moved.push_loser / gaussian.std
    noise_difference = noise_winner - noise_loser
    gap, push = reward_winner - reward_loser, length(moved.push) / gaussian.std
    tau = temperature(algorithm.tau, reward, scales=trajectories.gaps, k=k)
    smoothing = _smoothing(algorithm, int(policy.schedule.time[k]))

    next_latents, next_step = moved.latents, moved.step
    if algorithm.continue_from != "winner":
        chosen = second
        if algorithm.continue_from == "random":
            draws = [noise.integer(count, *key, "step", k, "continue") for key in trajectories.keys]
            chosen = torch.tensor(draws, device=rows.device) * batch + rows
        scored = branch.scored
        next_latents, next_step = scored.latents[chosen], scored.step.rows(chosen) if scored.step else None
    extra = branch.scored.comparison.figures(first, second)
    if algorithm.guidance is not None:
        extra |= {"guidance_size": push, "guidance_accepted": moved.accepted.float()}
    if count > 2:  # of all of them, not of the two ends
        extra |= {"reward_mean": reward.mean(dim=0)}
    if algorithm.tau == "auto" and tau is not None:
        extra |= {"tau": tau}
    if algorithm.kl_mask is not None:
        extra |= {"kl_masked": (kl > algorithm.kl_mask).float()}
    pair = Pair(
        k=k,
        prompts=trajectories.prompts,
        latents=branch.latents,
        cond=trajectories.cond,
        noise_difference=noise_difference,
        probability=pair_probability(gap + moved.gain, tau=tau, smoothing=smoothing),
        valid=present & (~tie | (algorithm.labels == "soft")) & (kl <= (algorithm.kl_mask or torch.inf)),
        tie=tie,
        present=present,
        reward_winner=reward_winner,
        reward_loser=reward_loser,
        gap=gap,
        logit=gaussian.pair_logit(noise_difference, reference),
        kl=kl,
        log_ratio_winner=gaussian.log_ratio(gaussian.sample(noise_winner), reference),
        log_ratio_loser=gaussian.log_ratio(gaussian.sample(noise_loser), reference),
        push=push,
        extra=extra,
        pictures_winner=branch.scored.pictures[first],
        pictures_loser=branch.scored.pictures[second],
        step=branch.step if algorithm.update == "inline" else None,
        reference=reference,
        next_latents=next_latents,
        next_step=next_step,
        keep_reference=algorithm.kl_penalty > 0,
    )
    if algorithm.objective == "plackett_luce":
        placed = torch.cat([noise_winner.unsqueeze(0), noises[order[1:]]])
        ranked = branch.scored.reward[order]
        ranked[0] += moved.gain
        targets = stage_targets(ranked.T, tau=tau, smoothing=smoothing)
        return Group(**vars(pair), noise_differences=placed[:-1] - placed[-1], targets=targets)
    if algorithm.safeguard:
        winner, loser = gaussian.sample(noise_winner), gaussian.sample(noise_loser)
        pair.extra["safeguarded"] = (loser_scale(gaussian, winner, loser) < 1).float()
        return CandidatePair(**vars(pair), winner=winner, loser=loser)
    return pair


def _smoothing(algorithm: TailorPO, time: int) -> float:
    """The chance of a wrong order at a time of the network."""
    if algorithm.label_smoothing == "auto":
        return misrank_at(algorithm.misranks or "", time)
    return algorithm.label_smoothing
