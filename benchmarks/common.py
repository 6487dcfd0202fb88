"""What the benchmarks share: a training session built as `train` builds it, its model calls observed, and results."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from tailorpo.environment import environment
from tailorpo.optimizer import Learner
from tailorpo.policy import Policy
from tailorpo.rewards import Reward, Scorer, load_scorer
from tailorpo.run import Run
from tailorpo.rundir import RunDirectory
from tailorpo.train import Session

RESULTS = Path(__file__).parent / "results"


class Silent:
    """A reporter that says nothing."""

    def phase(self, text: str) -> None:
        """Say nothing."""

    def step(self, done: int, total: int) -> None:
        """Say nothing."""

    def update(self, metrics: dict[str, Any]) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""


@dataclass
class Call:
    """One raw call of a model: what went in (of a reward: pictures, prompts, the reward), and how it was used.

    `gradient` is None for a call without a backward, "weights" for the backward of a loss, "input" for a gradient with
    respect to what went in; `reference` says that the adapter was off, `draft` that the tiny decoder decoded.
    """

    kind: Literal["unet", "decode", "reward"]
    inputs: tuple[Any, ...]
    gradient: Literal["weights", "input"] | None = None
    reference: bool = False
    draft: bool = False

    @property
    def items(self) -> int:
        """Rows in the batch."""
        return len(self.inputs[0])


@dataclass
class Watch:
    """Where calls are noted, while it is on."""

    calls: list[Call] = field(default_factory=list[Call])
    on: bool = True

    def note(self, call: Call, output: Tensor, *inputs: Tensor) -> None:
        """Append a call, and set its `gradient` once a backward pass has gone through its output."""
        if not self.on:
            return
        self.calls.append(call)
        if output.requires_grad:
            gradient: Literal["weights", "input"] = "input" if any(x.requires_grad for x in inputs) else "weights"

            def backward(_: Tensor) -> None:
                call.gradient = gradient

            output.register_hook(backward)


@dataclass(frozen=True)
class Observed:
    """A training session, and the raw model calls it makes, in their order."""

    session: Session
    directory: RunDirectory
    watch: Watch

    @property
    def model(self) -> Any:
        """The Stable Diffusion adapter, with its `unet` and `vae`."""
        return self.session.policy.model


class _ObservedReward:
    """A reward that notes its calls."""

    def __init__(self, reward: Reward, watch: Watch) -> None:
        self.name = reward.name
        self.differentiable = reward.differentiable
        self._reward = reward
        self._watch = watch

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        score = self._reward(images, prompts)
        self._watch.note(Call("reward", (images.detach(), prompts, self._reward)), score, images)
        return score


def observe(run: Run, folder: Path) -> Observed:
    """Load model and rewards as `train` does, with hooks on the UNet, the decoder and the rewards."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    return observe_model(run, folder, run.model.load(device, seed=run.seed), load_scorer(run.reward, device).members)


def observe_model(run: Run, folder: Path, model: Any, members: Sequence[tuple[Reward, float]]) -> Observed:
    """The same with a model and (reward, weight) pairs that are there already."""
    policy = Policy(model, run.sampler)
    watch = Watch()
    watched = [(_ObservedReward(reward, watch), weight) for reward, weight in members]
    directory = RunDirectory.create(folder, run)
    session = Session(
        run,
        policy,
        score=Scorer(watched, on_invalid=run.on_invalid_reward),
        learner=Learner(model.trainable(), run.optimizer),
        directory=directory,
        reporter=Silent(),
    )
    adapters = [module for module in model.unet.modules() if isinstance(module, BaseTunerLayer)]

    def unet(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor]) -> None:
        sample, time = args
        call = Call("unet", (sample.detach(), time, kwargs["encoder_hidden_states"].detach()))
        call.reference = any(adapter.disable_adapters for adapter in adapters)
        watch.note(call, output[0], sample)

    def decoder(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        watch.note(Call("decode", (args[0].detach(),), draft=module is not model.vae.decoder), output, args[0])

    model.unet.register_forward_hook(unet, with_kwargs=True)
    for vae in (model.vae, model.tiny_vae):
        if vae is not None:
            vae.decoder.register_forward_hook(decoder)
    return Observed(session, directory, watch)


def save(name: str, result: dict[str, Any], device: torch.device | str = "cpu") -> None:
    """Write results/NAME.json with the kind of machine it was measured on."""
    RESULTS.mkdir(exist_ok=True)
    machine = {**environment(device), "cores": os.cpu_count() or 0, "load_average": round(os.getloadavg()[1], 1)}
    text = json.dumps({"benchmark": name, "machine": machine, **result}, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(f"written to benchmarks/results/{name}.json")
