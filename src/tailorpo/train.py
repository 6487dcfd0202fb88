"""The training loop: collect -> loss -> update, once for every algorithm.

A method is two functions. `collect` walks a batch of trajectories from noise to picture and yields samples (say, a
ranked pair of one step); `loss` turns a sample into numbers with a gradient. Inline, the loss of a sample is run while
the graph of the sampling forward is still there; buffered, samples are stored and trained in shuffled minibatches
afterwards.

Every random number is addressed by (seed, trajectory number, step), so a resumed run needs its parameters, its
optimizer state and its counters, and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from tailorpo._distributed import pick_device
from tailorpo.algorithms.base import Algorithm, Stored
from tailorpo.algorithms.diffusion_dpo import DiffusionDPO
from tailorpo.checkpoint import load_latest_checkpoint, save_checkpoint
from tailorpo.metrics import UpdateMetrics
from tailorpo.models import DiffusionModel
from tailorpo.noise import Noise
from tailorpo.optimizer import Learner
from tailorpo.pair_gallery import PairGallery, gallery_updates
from tailorpo.policy import Policy
from tailorpo.prompts import load_prompts, prompt_order
from tailorpo.rewards import Scorer, load_scorer
from tailorpo.rollout import Trajectories, start_trajectories
from tailorpo.run import Run
from tailorpo.rundir import RunDirectory
from tailorpo.tracking import open_trackers
from tailorpo.trained import export


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


def train(run: Run, directory: RunDirectory, *, reporter: Reporter) -> DiffusionModel:
    """Train from the last checkpoint in `directory`, or from the start, to `run.updates`.

    Returns:
        The trained model; what was trained is also at lora/ in the directory, or unet/ for the whole network.

    Raises:
        UserError: the model, the prompts or the reward cannot be used.
        DivergedError: the loss stopped being a number; the last checkpoint is kept.
        StorageError: the disk refused a write; what was saved before is kept.
    """
    reporter.phase("loading the model and the reward")
    device = pick_device()
    policy = Policy(run.model.load(device, seed=run.seed), run.sampler)
    score = load_scorer(run.reward, device, on_invalid=run.on_invalid_reward)
    if isinstance(run.algorithm, DiffusionDPO):
        reporter.phase("encoding the pairs")
        run.algorithm.load(policy.model, on_picture=reporter.step)
    learner = Learner(policy.model.trainable(), run.optimizer)
    session = Session(run, policy, score=score, learner=learner, directory=directory, reporter=reporter)
    finished = session.restore()
    directory.truncate_metrics(finished)
    trackers = open_trackers(run, directory)
    reporter.phase("training")
    try:
        for update in range(finished, run.updates):
            started = time.perf_counter()
            metrics = session.update(update)
            metrics["seconds"] = time.perf_counter() - started
            directory.append_metrics(metrics)
            trackers.log(metrics, step=update + 1)
            reporter.update(metrics)
            if (update + 1) % run.checkpoint_every == 0 or update + 1 == run.updates:
                session.save(update + 1)
    finally:
        trackers.close()
    return policy.model


class Session:
    """One run in progress: everything that lives from one update to the next."""

    def __init__(
        self, run: Run, policy: Policy, *, score: Scorer, learner: Learner, directory: RunDirectory, reporter: Reporter
    ) -> None:
        self.run = run
        self.algorithm: Algorithm = run.algorithm
        self.policy = policy
        self.score = score
        self.learner = learner
        self.directory = directory
        self.reporter = reporter
        self.noise = Noise(run.seed)
        self.memory: dict[str, list[float]] = {}
        self.prompts = load_prompts(run.prompts)
        self._galleries = gallery_updates(run.updates)

    def update(self, update: int) -> dict[str, Any]:
        """Collect the samples of one batch of trajectories, train on them, and return what there is to log."""
        run, policy, algorithm = self.run, self.policy, self.algorithm
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
            metrics.add_final(self.final_reward(trajectories))

        if algorithm.update == "inline":
            self.learner.step()
        else:
            for minibatches in self.minibatches(algorithm.prepare(stored, self.memory), update):
                for minibatch in minibatches:
                    self.learner.backward(algorithm.loss(policy, minibatch).mean() / len(minibatches))
                self.learner.step()

        if update + 1 in self._galleries:
            gallery.save()
        return {
            "update": update + 1,
            **self.learner.take_metrics(),
            **metrics.summary(times=policy.schedule.time),
            "forwards": policy.forwards,
            "reward_queries": self.score.queries,
        }

    def trajectories(self, update: int) -> Iterator[tuple[int, Trajectories]]:
        """The trajectories of an update in batches of `batch.micro`, each with its first trajectory's place in the
        update."""
        total, micro = self.run.batch.trajectories, self.run.batch.micro
        for first in range(0, total, micro):
            numbers = [update * total + place for place in range(first, min(first + micro, total))]
            prompts = [prompt_order(self.prompts, self.noise, number) for number in numbers]
            keys = [("train", number) for number in numbers]
            yield first, start_trajectories(self.policy, prompts, noise=self.noise, keys=keys)

    @torch.no_grad()
    def final_reward(self, trajectories: Trajectories) -> Tensor:
        """The reward of the finished pictures, (B,): the method's own if it has scored them."""
        if trajectories.reward is not None:
            return trajectories.reward
        return self.score(self.policy.model.decode(trajectories.latents), trajectories.prompts)

    def minibatches(self, stored: Sequence[Stored], update: int) -> Iterator[list[Stored]]:
        """The buffer in shuffled minibatches of rows of one step each, once per inner epoch, in groups that make one
        optimizer step."""
        algorithm = self.algorithm
        for epoch in range(algorithm.inner_epochs):
            chunks: list[Stored] = []
            for number, rows in enumerate(stored):
                order = self.noise.permutation(len(rows), "minibatch", update, epoch, number)
                chunks += [
                    rows.rows(torch.tensor(order[start : start + algorithm.minibatch]))
                    for start in range(0, len(rows), algorithm.minibatch)
                ]
            shuffled = [chunks[i] for i in self.noise.permutation(len(chunks), "minibatches", update, epoch)]
            for start in range(0, len(shuffled), algorithm.accumulate):
                yield shuffled[start : start + algorithm.accumulate]

    def save(self, update: int) -> None:
        """Write a checkpoint after `update` updates, and what was trained in diffusers' format."""
        state = {
            "steps": self.learner.steps,
            "evaluations": self.policy.evaluations,
            "reward_queries": self.score.queries,
            "memory": self.memory,
        }
        save_checkpoint(self.directory.path / "checkpoints", update=update, tensors=self.learner.tensors(), state=state)
        export(self.policy.model, self.run.model, self.directory)

    def restore(self) -> int:
        """Load the latest sound checkpoint, if there is one, and return how many updates it has behind it."""
        checkpoint = load_latest_checkpoint(self.directory.path / "checkpoints", note=self.reporter.note)
        if checkpoint is None:
            return 0
        self.learner.load_tensors(checkpoint.tensors, steps=int(checkpoint.state["steps"]))
        self.policy.evaluations = int(checkpoint.state["evaluations"])
        self.score.queries = int(checkpoint.state["reward_queries"])
        self.memory = dict(checkpoint.state["memory"])
        # A kill between a checkpoint and its export leaves the export of the checkpoint before.
        export(self.policy.model, self.run.model, self.directory)
        return checkpoint.update

    def _on_step(self, first: int) -> Callable[[int], None]:
        batches = -(-self.run.batch.trajectories // self.run.batch.micro)
        before = first // self.run.batch.micro * self.policy.schedule.steps
        total = batches * self.policy.schedule.steps

        def on_step(done: int) -> None:
            self.reporter.step(before + done, total)

        return on_step
