"""From candidates to something to train on: their order, its label, guidance, and where the walk goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tailorpo.algorithms.groups import group_of
from tailorpo.algorithms.guided import move_pair, unmoved
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
    algorithm: TailorPO, policy: Policy, branch: Branch, trajectories: Trajectories, *, score: Score, noise: Noise
) -> Pair:
    """Label a branch of the algorithm's candidates; the result's class is what its loss needs."""
    batch, count, k, scored = len(trajectories), algorithm.candidates, branch.k, branch.scored
    rows = torch.arange(batch, device=branch.latents.device)
    reward = scored.reward.view(count, batch)
    # A candidate without a reward comes last; of equals the one drawn first comes first.
    order = reward.nan_to_num(nan=-torch.inf).argsort(dim=0, descending=True, stable=True) * batch + rows
    having = reward.isfinite().sum(dim=0)
    best, worst = order[0], order.gather(0, (having - 1).clamp(min=1).unsqueeze(0))[0]
    reward_winner, reward_loser = scored.reward[best], scored.reward[worst]
    present = having >= (count if algorithm.objective == "plackett_luce" else 2)
    gap, tied = reward_winner - reward_loser, reward_winner == reward_loser

    gaussian = branch.step.detach().gaussian
    reference = policy.reference_step(branch.latents, k, trajectories.cond)
    kl = gaussian.kl(reference)
    if algorithm.guidance is None:
        moved = unmoved(branch, best)
    else:
        moved = move_pair(algorithm.guidance, policy, branch, trajectories, best, worst, score=score)
    noises = branch.noises.flatten(0, 1)
    noise_winner = noises[best] + moved.push / gaussian.std
    noise_loser = noises[worst] + moved.push_loser / gaussian.std
    noise_difference, push = noise_winner - noise_loser, length(moved.push) / gaussian.std
    winner, loser = gaussian.sample(noise_winner), gaussian.sample(noise_loser)
    next_latents, next_step = moved.latents, moved.step
    if algorithm.continue_from != "winner":
        random = algorithm.continue_from == "random"
        next_latents, next_step = scored.rows(branch.random_rows(noise, trajectories) if random else worst)

    tau = None if algorithm.tau is None else temperature(algorithm.tau, reward, scales=trajectories.gaps, k=k)
    smoothing = algorithm.label_smoothing
    if smoothing == "auto":
        smoothing = misrank_at(algorithm.misranks or "", int(policy.schedule.time[k]))
    extra = scored.comparison.figures(best, worst)
    if algorithm.guidance is not None:
        extra |= {"guidance_size": push, "guidance_accepted": moved.accepted.float()}
    if count > 2:  # of all of them, not of the two ends
        extra |= {"reward_mean": reward.mean(dim=0)}
    if tau is not None and algorithm.tau == "auto":
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
        valid=present & (~tied | (algorithm.labels == "soft")) & (kl <= (algorithm.kl_mask or torch.inf)),
        present=present,
        reward_winner=reward_winner,
        reward_loser=reward_loser,
        logit=gaussian.pair_logit(noise_difference, reference),
        kl=kl,
        log_ratio_winner=gaussian.log_ratio(winner, reference),
        log_ratio_loser=gaussian.log_ratio(loser, reference),
        push=push,
        extra=extra,
        pictures_winner=scored.pictures[best],
        pictures_loser=scored.pictures[worst],
        step=branch.step if algorithm.update == "inline" else None,
        reference=reference,
        next_latents=next_latents,
        next_step=next_step,
        keep_reference=algorithm.kl_penalty > 0,
    )
    if algorithm.objective == "plackett_luce":
        ranked = scored.reward[order]
        ranked[0] += moved.gain
        targets = stage_targets(ranked.T, tau=tau, smoothing=smoothing)
        return group_of(pair, torch.cat([noise_winner.unsqueeze(0), noises[order[1:]]]), targets=targets)
    if algorithm.safeguard:
        pair.extra["safeguarded"] = (loser_scale(gaussian, winner, loser) < 1).float()
        return CandidatePair(**vars(pair), winner=winner, loser=loser)
    return pair
