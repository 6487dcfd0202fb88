"""DeepSpeed's ZeRO stage 2: each process keeps a part of the optimizer's state, and of the gradients; the only place
that imports deepspeed.

After Rajbhandari et al. 2020 (arXiv 1910.02054). The trained parameters are laid end to end and cut into as many equal
parts as there are processes, process r with part r:

    backward    adds the gradients up among the processes, in float32, and keeps part r of the sum
    step        clips by the norm over all parts, takes AdamW's step on part r, and gathers the parameters

deepspeed's engine does this around a module that holds the trained parameters and passes a loss on. The network itself
is not given to it: forwards, guidance and references are as ever, and the parameters are whole on every process. What
tailorpo decides (micro-batches, accumulation, clipping, learning rate, precision) it tells the engine; gradients are
added up and not averaged, since the loss is divided by the size of the whole batch already.

Left out, and refused: stages 0, 1 and 3, offloading, fp16 and bf16 of deepspeed's (trained parameters are float32
here), its optimizers and schedules, and optimizers with another state than AdamW's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn

from tailorpo.errors import CheckpointError, UserError

BUCKET = 1 << 26
"""Most numbers that are added up or gathered at once, unless the configuration says otherwise: 256 MB."""

_HONOURED = ("reduce_bucket_size", "allgather_bucket_size", "overlap_comm", "contiguous_gradients", "reduce_scatter")
_WITHOUT_EFFECT = ("steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer")
_DECIDED = {
    "train_batch_size": "batch.trajectories",
    "train_micro_batch_size_per_gpu": "batch.micro",
    "fp16": "model.dtype",
    "bf16": "model.dtype",
    "optimizer": "the optimizer section",
    "scheduler": "optimizer.warmup",
}
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Zero:
    """ZeRO stage 2 as a configuration asks for it.

    Attributes:
        settings: what it says of buckets and communication, in deepspeed's words.
        clipping: largest norm of a gradient that it names, if it names one.
    """

    settings: Mapping[str, Any]
    clipping: float | None = None

    @staticmethod
    def read(config: Mapping[str, Any]) -> Zero:
        """What a deepspeed configuration asks for, accelerate's "auto" being what tailorpo decides.

        Raises:
            UserError: it asks for something that tailorpo does not do; says all of it at once.
        """
        problems: list[str] = []
        section = config.get("zero_optimization")
        if not isinstance(section, Mapping):
            raise UserError(
                f"accelerate's DeepSpeed configuration: zero_optimization has to be a mapping, got {section!r}"
            )
        zero = {name: value for name, value in cast(dict[str, Any], section).items() if value != "auto"}
        if zero.pop("stage", 0) != 2:
            problems.append("zero_optimization.stage has to be 2 (`accelerate launch --zero_stage 2`)")
        for name in ("offload_optimizer", "offload_param"):
            asked: Any = zero.pop(name, None) or {}
            device = cast(dict[str, Any], asked).get("device", "none") if isinstance(asked, dict) else asked
            if device not in ("none", None):
                problems.append(f"zero_optimization.{name}.device has to be none; offloading has not been tried here")
        clipping = config.get("gradient_clipping", "auto")
        if clipping != "auto" and not (isinstance(clipping, int | float) and clipping >= 0):
            problems.append(f"gradient_clipping has to be auto or a number, got {clipping!r}")
        unknown = [
            f"zero_optimization.{name}" for name in zero if name not in _HONOURED and not name.startswith("stage3")
        ]
        for name, value in config.items():
            off = value == "auto" or (isinstance(value, Mapping) and value.get("enabled") in (False, "auto"))  # pyright: ignore[reportUnknownMemberType]
            if off or name in ("zero_optimization", "gradient_clipping", *_WITHOUT_EFFECT):
                continue
            if name == "gradient_accumulation_steps":
                if value != 1:
                    problems.append(f"{name} {value}: the run file decides (batch.micro); say auto, or 1")
            elif name in _DECIDED:
                problems.append(f"{name}: {_DECIDED[name]} in the run file decides; leave it out, or say auto")
            else:
                unknown.append(name)
        if unknown:
            problems.append(f"{', '.join(unknown)}: not known to tailorpo; leave out what is not needed")
        if problems:
            raise UserError("\n  - ".join(["accelerate's DeepSpeed configuration cannot be used:", *problems]))
        settings = {name: zero[name] for name in _HONOURED if name in zero}
        return Zero(settings, None if clipping == "auto" else float(clipping))

    def missing(self) -> str | None:
        """What has to be installed first, in words; None if nothing has."""
        if find_spec("deepspeed") is not None:
            return None
        return "accelerate is configured with DeepSpeed, which is not installed; `pip install 'tailorpo[deepspeed]'`"

    def divide(self, parameters: Sequence[nn.Parameter], adamw: torch.optim.Optimizer, clip: float | None) -> Divided:
        """Divide the state of an optimizer that has not made a step among the processes, all of which call this."""
        return Divided(
            parameters, adamw, {"gradient_clipping": clip or 0.0, "zero_optimization": self._stage(parameters)}
        )

    def _stage(self, parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
        # The buffer is made in full at every backward, whatever there is to put into it.
        size = min(BUCKET, 2 * sum(parameter.numel() for parameter in parameters))
        return {"reduce_bucket_size": size, "allgather_bucket_size": size, "overlap_comm": False} | {
            "stage": 2,
            **self.settings,
        }


class Divided:
    """An AdamW of which this process keeps a part. All processes call every method, in the same order."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], adamw: torch.optim.Optimizer, config: Mapping[str, Any]
    ) -> None:
        deepspeed: Any = import_module("deepspeed")
        self._tools: Any = import_module("deepspeed.utils")
        self._adamw = adamw
        deepspeed.init_distributed(torch.distributed.get_backend(), dist_init_required=False, verbose=False)
        self._engine: Any = deepspeed.initialize(
            model=_Trained(parameters),
            optimizer=adamw,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_allreduce_op": "sum",
                "managed_gradient_accumulation": False,  # `step` says when, not a count of backwards
                "zero_allow_untested_optimizer": True,
                **config,
            },
            dist_init_required=False,
        )[0]
        # A step of size 0 along a gradient of 0 leaves the parameters alone and makes the state, which is set after.
        self.backward(0 * torch.stack([parameter.sum() for parameter in parameters]).sum())
        self.step(0.0)
        self._count.zero_()

    @property
    def _count(self) -> Tensor:
        """How many steps AdamW believes that it has made: one number, since the parameters are one vector to it."""
        (state,) = self._adamw.state.values()
        return state["step"]

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar loss, summed over the processes."""
        self._engine.backward(self._engine(loss), scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        """One step of size `lr`, and the norm of the whole gradient before clipping; where that is not finite the
        parameters are left as they were."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._engine.step()
        return float(self._engine.get_global_grad_norm()) if self._engine.was_step_applied() else math.inf

    def state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The state of a parameter, whole, under AdamW's names."""
        whole = {key: self._tools.safe_get_full_optimizer_state(parameter, key) for key in _MOMENTS}
        return {"step": self._count.clone(), **whole}

    def load(self, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over the values of the parameters, and whole states by the same names; none is that of no step.

        Raises:
            CheckpointError: the parameters have made unequal numbers of steps.
        """
        counts = {float(each["step"]) for each in state.values()} or {0.0}
        if len(counts) > 1:
            raise CheckpointError(
                "the parameters of this checkpoint have had unequal numbers of steps, which DeepSpeed cannot go on"
                " from; resume without it"
            )
        for name, parameter in parameters.items():
            self._tools.safe_set_full_fp32_param(parameter, parameter.detach())
            for key in _MOMENTS:
                known = state[name][key] if name in state else torch.zeros_like(parameter)
                self._tools.safe_set_full_optimizer_state(parameter, known.to(parameter.device), key)
        self._count.fill_(counts.pop())


class _Trained(nn.Module):
    """The trained parameters, as deepspeed wants to see them: a module that makes a loss."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.parameters_in_order = nn.ParameterList(parameters)

    def forward(self, loss: Tensor) -> Tensor:
        return loss.clone()
