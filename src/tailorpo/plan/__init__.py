"""What a run will cost, before it is started: operations, memory, hours, money.

    operations = sum over kinds of calls of (how many, from Algorithm.cost) * (what one costs, counted on meta tensors)
    hours      = sum over kinds of operations / (peak of its dtype * efficiency) / 3600;    money = hours * price
    memory     = weights + adapter + its gradient + Adam's two moments + the most that an update or evaluation allocates

Nothing of a network but its config.json is read, so the plan of a model that is not on the disk works, too. What was
assumed and what is not counted is part of the plan. On the present machine (`measure_here`) calls are timed instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tailorpo.algorithms.base import Cost
from tailorpo.algorithms.diffusion_dpo import DiffusionDPO
from tailorpo.algorithms.reward_backprop import RewardBackprop
from tailorpo.algorithms.spo import SPO
from tailorpo.algorithms.tailorpo import TailorPO
from tailorpo.describe import trajectory_cost
from tailorpo.models import DType
from tailorpo.models.trained import Full
from tailorpo.optimizer import Optimizer
from tailorpo.plan.accounting import Calls, operations, peak_bytes, seconds, tensor_bytes, unit_costs
from tailorpo.plan.devices import this_device
from tailorpo.plan.estimate import Estimate, Phase, Plan, Work
from tailorpo.plan.networks import Architecture, Network, RewardNetwork, build_network, build_reward
from tailorpo.prompts import load_prompts
from tailorpo.run import Run

_UPDATES = 200
"""Updates that random trained steps are averaged over."""
_LONGEST = 60.0
"""Seconds that the calls may take on this machine to be timed one by one."""


def make_plan(run: Run, *, architecture: Architecture | None = None, measure: bool = False, cpu: bool = False) -> Plan:
    """Count what the run costs.

    Args:
        run: its weights need not be there.
        architecture: the networks to count instead of those in model.path.
        measure: load rewards whose architecture is not known, and count a call.
        cpu: whether it is to run on a CPU, whose convolutions need more memory.

    Raises:
        UserError: config.json files, prompts or a reward cannot be used.
    """
    parts = Parts.build(run, "meta", architecture=architecture, measure=measure)
    _, cost = trajectory_cost(run)
    units = unit_costs(parts.calls, operations, judge=parts.judge)
    rewards = [*parts.rewards, *([parts.judge] if parts.judge else [])]
    moments = {name: peak_bytes(phase, layouts=cpu) for name, phase in phases(run, parts.calls, cost).items()}
    memory = parts.standing_bytes(run.optimizer) | {"activations, at most": max(moments.values())}
    assumed = [parts.network.assumption, *(reward.assumption for reward in rewards)]
    return Plan(
        run,
        network=parts.network.title,
        picture=parts.calls.model.picture_shape[-1],
        cost=cost,
        work=_work(run, cost, units),
        memory=memory,
        moments=moments,
        assumptions=tuple(dict.fromkeys(line for line in assumed if line)),
        not_counted=_not_counted(run, rewards),
    )


def measure_here(
    plan: Plan, device: torch.device, *, architecture: Architecture | None = None, measure: bool = False
) -> Estimate:
    """Time the plan's own calls on this machine; a matrix product instead where they would take more than a minute."""
    here = this_device(device, plan.run.model.dtype)
    together = rows_together(plan)
    rough = sum(work.operations / here.peak[work.dtype] for work in plan.work) * max(together.values()) * 4
    if rough > _LONGEST:
        return plan.on(here)
    parts = Parts.build(plan.run, device, architecture=architecture, measure=measure)
    timed = unit_costs(parts.calls, lambda call: seconds(call, device), judge=parts.judge, **together)
    return plan.timed(here, timed)


def rows_together(plan: Plan) -> dict[str, int]:
    """How many rows a training call has: of the chain and the loss, and of what is scored; see `unit_costs`."""
    micro = plan.run.batch.micro
    return {"rows": micro * plan.cost.graph_rows, "scored": max(micro * plan.cost.scored_rows, 1)}


@dataclass(frozen=True)
class Parts:
    """Networks of a run with random weights, and the calls that are made of them."""

    network: Network
    rewards: list[RewardNetwork]
    judge: RewardNetwork | None
    calls: Calls

    @classmethod
    def build(cls, run: Run, device: torch.device | str, *, architecture: Architecture | None, measure: bool) -> Parts:
        network = build_network(run.model, device, architecture=architecture)
        rewards = [build_reward(entry.reward, device, load=measure) for entry in run.reward]
        judge = build_reward(run.eval.judge, device, load=measure) if run.eval.judge else None
        scale = run.sampler.guidance_scale
        return cls(network, rewards, judge, Calls(network, rewards, guidance_scale=scale))

    def standing_bytes(self, optimizer: Optimizer) -> dict[str, int]:
        """What is in memory all the time, by what it holds."""
        model, judge = self.network.model, [self.judge] if self.judge else []
        trained = tensor_bytes(model.trainable().values())
        frozen = tensor_bytes(model.unet.parameters()) - trained
        if isinstance(model.trained, Full):  # then the frozen network is a copy
            frozen = model.trained.reference_bytes
        modules = [module for reward in [*self.rewards, *judge] for module in reward.modules]
        return {
            "denoising network": frozen,
            "VAE": tensor_bytes([*model.vae.parameters(), *(model.tiny_vae.parameters() if model.tiny_vae else ())]),
            "text encoders": sum(tensor_bytes(encoder.parameters()) for encoder in model.parts.text_encoders),
            "rewards": sum(tensor_bytes(module.parameters()) for module in modules),
            "what is trained, its gradient, Adam's moments": 2 * trained
            + sum(optimizer.state_bytes(parameter.numel()) for parameter in model.trainable().values()),
        }


def _work(run: Run, cost: Cost, units: dict[str, float]) -> tuple[Work, ...]:
    """How many calls of each kind there are."""
    # Where the trained steps are drawn anew for every update, these are means over updates.
    trained, costs = zip(
        *(trajectory_cost(run, update=update) for update in range(min(run.updates, _UPDATES))), strict=True
    )
    measuring = sum(_measuring(run, steps) for steps in trained) / len(trained)

    def mean(number: Callable[[Cost], int]) -> float:
        return sum(map(number, costs)) / len(costs)

    # Without guidance a forward is worth as much less as fewer latents go through the network.
    worth = 1 if cost.guided else run.sampler.evaluations_per_forward
    seen = load_prompts(run.eval.prompts_seen or run.prompts)
    unseen = load_prompts(run.eval.prompts_unseen) if run.eval.prompts_unseen else ()
    pictures = 2 * (len(seen) + len(unseen)) * run.eval.seeds
    forwards = pictures // 2 * run.sampler.steps
    queries, gradients = mean(lambda each: each.reward_queries), mean(lambda each: each.picture_gradients)
    # With a tiny VAE the pictures on the way are drafts; those of a trained last step are taken for drafts, too.
    draft = run.model.tiny_vae is not None and cost.scored_rows > 0
    drafts, draft_gradients = (queries - mean(lambda each: each.finished), gradients) if draft else (0.0, 0.0)
    texts = len({"", *load_prompts(run.prompts), *seen, *unseen})

    def work(kind: str, phase: Phase, count: float, *, dtype: DType = run.model.dtype) -> Work:
        return Work(kind, phase, count, units[kind], dtype)

    return (
        work("text", "once", texts),
        work("forward", "training", mean(lambda each: each.forwards - each.references) / worth),
        work("reference forward", "training", mean(lambda each: each.references) / worth + measuring),
        work("backward", "training", mean(lambda each: each.backwards) / worth),
        work("input gradient", "training", mean(lambda each: each.input_gradients) * cost.scored_rows),
        work("draft decode", "training", drafts),
        work("draft decode gradient", "training", draft_gradients),
        work("decode", "training", queries - drafts),
        work("decode gradient", "training", gradients - draft_gradients),
        work("reward", "training", queries, dtype="float32"),
        work("reward gradient", "training", gradients, dtype="float32"),
        work("forward", "evaluation", forwards),
        work("reference forward", "evaluation", forwards),
        work("decode", "evaluation", pictures),
        work("reward", "evaluation", pictures, dtype="float32"),
        # The judge also gives the features that diversity is measured in.
        work("judge", "evaluation", 2 * pictures if run.eval.judge else 0, dtype="float32"),
    )


def _measuring(run: Run, trained: Sequence[int]) -> float:
    """Evaluations of the base model for the KL that is logged, per trajectory."""
    method = run.algorithm
    if not isinstance(method, TailorPO):
        return 0.0
    measured = min(method.kl_measured, run.batch.trajectories)
    return measured * method.measured_between(run.sampler.steps, trained) / run.batch.trajectories


def phases(run: Run, calls: Calls, cost: Cost) -> dict[str, Callable[[], None]]:
    """The parts of a run whose memory differs, each a function that holds together what training holds together."""
    algorithm, micro = run.algorithm, run.batch.micro
    trainable = list(calls.model.trainable().values())
    guided = Calls(calls.network, calls.rewards, guidance_scale=calls.guidance_scale if cost.guided else 1.0)
    for parameter in trainable:  # counted among what is always there
        parameter.grad = torch.zeros_like(parameter)

    def graph(rows: int) -> torch.Tensor:
        with torch.enable_grad():
            x, cond = guided.latents(rows), calls.network.conditioning(rows)
            return calls.model.predict(x, 0, cond, guidance_scale=guided.guidance_scale)

    def score() -> None:
        if cost.scored_rows:
            latents = cost.input_gradients > 0
            rows = micro * cost.scored_rows
            calls.scoring(rows, pictures=cost.picture_gradients > 0, latents=latents, draft=True)

    def inline() -> None:
        graphs = [graph(micro * cost.graph_rows) for _ in range(cost.graphs)]
        score()
        while graphs:
            graphs.pop().sum().backward()

    def minibatch() -> None:
        rows = min(algorithm.minibatch, micro)  # minibatches are cut from what was collected at once
        graph(rows * cost.graph_rows).sum().backward()

    def evaluation() -> None:
        with torch.no_grad():
            calls.scoring(run.eval.batch_size, pictures=False, latents=False, draft=False)

    if algorithm.update == "inline":
        return {"evaluation": evaluation, "collect and train": inline if trainable else score}
    return {"evaluation": evaluation, "collect": score, "train": minibatch}


def _not_counted(run: Run, rewards: list[RewardNetwork]) -> tuple[str, ...]:
    """What the plan leaves out, in words."""
    unknown = [reward.name for reward in rewards if not reward.known]
    lines = [f"reward {name}: its size is not known before it is loaded; --measure does that" for name in unknown]
    if isinstance(run.algorithm, DiffusionDPO):
        lines.append("encoding the pictures of the pairs, once at the start")
    if isinstance(run.algorithm, SPO) and run.algorithm.update == "buffered":
        lines.append("nothing is saved for pairs below algorithm.threshold: every pair is taken to be trained")
    if isinstance(run.algorithm, RewardBackprop) and run.algorithm.last_steps > 1:
        lines.append("the gradient of the latents between the differentiated steps")
    lines += [
        "operations: element-wise work, normalisations, the optimizer, a reward's text tower (once per prompt)",
        "memory: the device's context, kernels' workspaces, fragmentation",
        "time: loading, checkpoints, pictures written to the disk, rewards without a network",
    ]
    return tuple(lines)


__all__ = ["Estimate", "Parts", "Phase", "Plan", "Work", "make_plan", "measure_here", "phases", "rows_together"]
