"""The training loop: collect -> loss -> update, once for every algorithm.

A method is two functions. `collect` walks a batch of trajectories from noise to picture and yields samples (say, a
ranked pair of one step); `loss` turns a sample into numbers with a gradient. Inline, the loss of a sample is run while
the graph of the sampling forward is still there; buffered, samples are stored and trained in shuffled minibatches
afterwards.

Every random number is addressed by (seed, trajectory number, step), so a resumed run needs its parameters, its
optimizer state and its counters, and nothing else; and several processes may share the batches of an update, each
running this loop on its part (`_distributed`). The main process alone writes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from tailorpo._distributed import ALONE, Processes, pick_device
from tailorpo.algorithms.base import Algorithm, Stored
from tailorpo.algorithms.diffusion_dpo import DiffusionDPO
from tailorpo.algorithms.labels import GAP_DECAY
from tailorpo.algorithms.tailorpo import TailorPO
from tailorpo.control import adapted, observe
from tailorpo.device import refusals_in_words, sent
from tailorpo.keeping import begin_watch, end, look, restore, save
from tailorpo.metrics import UpdateMetrics
from tailorpo.models import DiffusionModel
from tailorpo.moving_reference import MovingReference, ParameterCopy
from tailorpo.noise import Noise
from tailorpo.optimizer import Learner
from tailorpo.pair_gallery import PairGallery, gallery_updates
from tailorpo.policy import Policy
from tailorpo.prompts import load_prompts, prompt_order
from tailorpo.rewards import EnsembleScorer, Scorer, load_scorer
from tailorpo.rewards.ensemble import GapScales
from tailorpo.rollout import Trajectories, start_trajectories
from tailorpo.run import Run
from tailorpo.rundir import RunDirectory
from tailorpo.sentinels.watch import Watch, open_watch
from tailorpo.sharing import check_shares
from tailorpo.tracking import open_trackers


class Reporter(Protocol):
    """Hears what training is doing; the progress display is one."""

    def phase(self, text: str) -> None:
        """A new phase begins, such as loading or training."""
        ...

    def step(self, done: int, total: int) -> None:
        """Progress within an update or an evaluation."""
        ...

    def update(self, metrics: dict[str, Any]) -> None:
        """An update is done; `metrics` is its line of metrics.jsonl."""
        ...

    def note(self, text: str) -> None:
        """Something a person should read."""
        ...


def train(run: Run, directory: RunDirectory, *, reporter: Reporter, processes: Processes = ALONE) -> DiffusionModel:
    """Train from the last checkpoint in `directory`, or from the start, to `run.updates`.

    Args:
        run: what to train, and how.
        directory: where the main process writes; the others do not touch it.
        reporter: hears what this process is doing.
        processes: those that share the work, all of which call this.

    Returns:
        The trained model; what was trained is also at lora/ in the directory, or unet/ for the whole network.

    Raises:
        UserError: the model, the prompts or the reward cannot be used.
        DivergedError: the loss stopped being a number; the last checkpoint is kept.
        StorageError: the disk refused a write; what was saved before is kept.
        ProcessError: another process is gone.
    """
    reporter.phase("loading the model and the reward")
    with processes.together():
        check_shares(run, processes)
        device = pick_device()
        policy = Policy(run.model.load(device, seed=run.seed), run.sampler)
        score = load_scorer(run.reward, device, on_invalid=run.on_invalid_reward, ensemble=run.ensemble)
        if isinstance(run.algorithm, DiffusionDPO):
            reporter.phase("encoding the pairs")
            run.algorithm.load(policy.model, on_picture=reporter.step)
        in_words = processes.shard(policy.model.networks())
        watch = open_watch(run, policy, score, processes)
    if in_words:
        reporter.note(in_words)
    learner = Learner(policy.model.trainable(), run.optimizer, processes)
    session = Session(
        run,
        policy,
        score=score,
        learner=learner,
        directory=directory,
        reporter=reporter,
        processes=processes,
        watch=watch,
    )
    finished = restore(session)
    if watch is not None and watch.over:
        reporter.note("the sentinels have ended this run; `tailorpo resume RUN sentinels.on_alarm=warn` trains on")
        return policy.model
    with processes.together():
        trackers = open_trackers(run, directory if processes.main else None)
        if processes.main:
            directory.truncate_metrics(finished)
    begin_watch(session)
    reporter.phase("training")
    try:
        for update in range(finished, run.updates):
            started = time.perf_counter()
            with processes.computing(), refusals_in_words():
                metrics = session.update(update)
            metrics["seconds"] = time.perf_counter() - started
            ended = look(session, update + 1, metrics)
            if processes.main:
                directory.append_metrics(metrics)
            trackers.log(metrics, step=update + 1)
            reporter.update(metrics)
            if ended is not None:
                end(session, ended)
                break
            if (update + 1) % run.checkpoint_every == 0 or update + 1 == run.updates:
                save(session, update + 1)
    finally:
        trackers.close()
    return policy.model


class Session:
    """One run in progress: everything that lives from one update to the next."""

    def __init__(
        self,
        run: Run,
        policy: Policy,
        *,
        score: Scorer,
        learner: Learner,
        directory: RunDirectory,
        reporter: Reporter,
        processes: Processes = ALONE,
        watch: Watch | None = None,
    ) -> None:
        self.run = run
        self.algorithm: Algorithm = run.algorithm
        self.policy = policy
        self.score = score
        score.patient = True
        self.learner = learner
        self.directory = directory
        self.reporter = reporter
        self.processes = processes
        self.watch = watch
        self.noise = Noise(run.seed)
        self.memory: dict[str, list[float]] = {}
        self.prompts = load_prompts(run.prompts)
        self._firsts = processes.share(range(0, run.batch.trajectories, run.batch.micro))
        self._galleries = gallery_updates(run.updates)
        self.scales = score.scales if isinstance(score, EnsembleScorer) else None
        method = run.algorithm
        labels_by_gaps = isinstance(method, TailorPO) and method.tau == "auto"
        self.gaps = GapScales(GAP_DECAY, self.memory) if labels_by_gaps else None
        if isinstance(method, TailorPO) and processes.sharding is not None:
            # Only the process that holds the first trajectory would call the base model.
            self.algorithm = method = replace(method, kl_measured=0)
        self._measured = method.kl_measured if isinstance(method, TailorPO) else 0
        if isinstance(method, TailorPO) and isinstance(method.reference, MovingReference):
            policy.moving = ParameterCopy(learner.parameters, method.reference)

    def update(self, update: int) -> dict[str, Any]:
        """Collect the samples of one batch of trajectories, train on them, and return what there is to log."""
        run, policy, algorithm = self.run, self.policy, self.algorithm_at(update)
        trained = algorithm.trained_steps(policy.schedule.steps, noise=self.noise, update=update)
        gallery = PairGallery(self.directory.path / "samples/pairs", update=update + 1, times=policy.schedule.time)
        metrics, stored = UpdateMetrics(), list[Stored]()

        for first, trajectories in self.trajectories(update):
            for sample in algorithm.collect(
                policy, trajectories, trained=trained, score=self.score, noise=self.noise, on_step=self._on_step(first)
            ):
                if algorithm.update == "inline":
                    loss = algorithm.loss(policy, sample)
                    self.learner.backward(loss.sum() / (run.batch.trajectories * len(trained)))
                else:
                    stored.append(sample.stored(policy))
                metrics.add(sample)
                if update + 1 in self._galleries:
                    gallery.add(sample, first_trajectory=first)
                del sample  # lets go of the graph before the walk goes on
            metrics.add_kl(trajectories.kl)
            metrics.add_final(self.final_reward(trajectories))

        self.score.settle()
        if algorithm.update == "inline":
            self.learner.step()
        else:
            buffer = algorithm.prepare(stored, self.memory, self.processes.gather)
            for minibatches, count in self.minibatches(buffer, update):
                for minibatch in minibatches:
                    self.learner.backward(algorithm.loss(policy, minibatch).mean() / count)
                self.learner.step()

        if policy.moving:
            policy.moving.follow(update + 1)
        if update + 1 in self._galleries:
            gallery.save(self.processes)
        figures = UpdateMetrics.joined(self.processes.gather(metrics.cpu())).summary(times=policy.schedule.time)
        return {
            "update": update + 1,
            **self.learner.take_metrics(),
            **figures,
            **observe(self.algorithm, self.memory, figures, policy),
            **self.spent(),
        }

    def spent(self) -> dict[str, int]:
        """Since the start of the run, by all processes: guided forwards of training, those that only measured the KL,
        and pictures scored."""
        total, worth = self.processes.total, self.run.sampler.evaluations_per_forward
        measuring = {"forwards_measuring": total(self.policy.measuring) // worth} if self._measured else {}
        return {
            "forwards": total(self.policy.evaluations) // worth,
            **measuring,
            "reward_queries": total(self.score.queries),
        }

    def algorithm_at(self, update: int) -> Algorithm:
        """The algorithm with this update's numbers: those of its own plan, and those that depend on what was seen."""
        planned = self.algorithm.at(update) if isinstance(self.algorithm, TailorPO) else self.algorithm
        return adapted(planned, self.memory)

    def trajectories(self, update: int) -> Iterator[tuple[int, Trajectories]]:
        """This process's trajectories of an update in batches of `batch.micro`, each with its first trajectory's place
        in the update."""
        for known in (self.scales, self.gaps):
            if known is not None:
                # What the updates before have gathered; they stand still within this one.
                known.settle(self.processes.gather)
        total, micro = self.run.batch.trajectories, self.run.batch.micro
        for first in self._firsts:
            numbers = [update * total + place for place in range(first, min(first + micro, total))]
            prompts = [prompt_order(self.prompts, self.noise, number) for number in numbers]
            keys = [("train", number) for number in numbers]
            trajectories = start_trajectories(self.policy, prompts, noise=self.noise, keys=keys)
            trajectories.gaps = self.gaps
            trajectories.measured = max(0, min(self._measured - first, len(numbers)))
            yield first, trajectories

    @torch.no_grad()
    def final_reward(self, trajectories: Trajectories) -> dict[str, Tensor]:
        """The reward of the finished pictures, (B,), the method's own if it has scored them, and that of each member of
        an ensemble, by the names they are logged under; nothing where the method does not finish its pictures."""
        reward, members = trajectories.reward, trajectories.members
        if reward is None and not trajectories.finished:
            return {}
        if reward is None:
            pictures = self.policy.model.decode(trajectories.latents)
            if self.scales is None:
                reward = self.score(pictures, trajectories.prompts)
            else:
                reward, members = self.score.total_and_each(pictures, trajectories.prompts)
        return {"reward_final": reward, **{f"reward_final:{name}": each for name, each in members.items()}}

    def minibatches(self, stored: Sequence[Stored], update: int) -> Iterator[tuple[list[Stored], int]]:
        """The buffer of all processes in shuffled minibatches of rows of one step each, once per inner epoch, in groups
        that make one optimizer step: those minibatches whose rows this process holds, and how many there are in all."""
        algorithm, device = self.algorithm, self.policy.model.device
        sizes = self.processes.gather([len(rows) for rows in stored])
        before = sum(map(len, sizes[: self.processes.rank]))
        owners = [rank for rank, part in enumerate(sizes) for _ in part]
        for epoch in range(algorithm.inner_epochs):
            chunks: list[tuple[int, list[int]]] = []
            for number, size in enumerate(size for part in sizes for size in part):
                order = self.noise.permutation(size, "minibatch", update, epoch, number)
                chunks += [
                    (number - before, order[start : start + algorithm.minibatch])
                    for start in range(0, size, algorithm.minibatch)
                ]
            shuffled = [chunks[i] for i in self.noise.permutation(len(chunks), "minibatches", update, epoch)]
            for start in range(0, len(shuffled), algorithm.accumulate):
                group = shuffled[start : start + algorithm.accumulate]
                here = [(at, sent(torch.tensor(rows), device)) for at, rows in group if 0 <= at < len(stored)]
                own = [stored[at].rows(rows) for at, rows in here]
                if self.processes.in_step:
                    most = max(Counter(owners[before + at] for at, _ in group).values())
                    self._keep_pace(most - len(own))
                yield own, len(group)

    def _keep_pace(self, calls: int) -> None:
        """Forwards and backwards that count for nothing, while other processes have minibatches and this one has none:
        theirs exchange something with this one."""
        model = self.policy.model
        x = torch.zeros(1, *model.latent_shape, device=model.device)
        for _ in range(calls):
            time = int(self.policy.schedule.time[0])
            scale = self.run.sampler.guidance_scale
            self.learner.backward(0 * model.predict(x, time, model.encode([""]), guidance_scale=scale).sum())

    def _on_step(self, first: int) -> Callable[[int], None]:
        steps = self.policy.schedule.steps
        before, total = self._firsts.index(first) * steps, len(self._firsts) * steps

        def on_step(done: int) -> None:
            self.reporter.step(before + done, total)

        return on_step
