"""The optimizer of a run: AdamW with gradient clipping and a linear warm-up, whose whole state is named tensors.

The state goes into checkpoints as plain tensors, never as a pickle; restored, the next step is bit for bit the one
that would have followed.

Left out: learning-rate decay, which runs that can be extended later have no end for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tailorpo import eight_bit
from tailorpo._distributed import ALONE, Processes
from tailorpo.errors import CheckpointError, DivergedError
from tailorpo.settings import check_fields

if TYPE_CHECKING:
    from tailorpo._zero import Divided

Decay = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The `optimizer` section of a run file: AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101).

    Attributes:
        name: "adamw", or "adamw8bit" with moments in 8 bits, a quarter of the memory, which needs bitsandbytes.
        lr: learning rate after the warm-up.
        betas: decay of the two moments.
        weight_decay: decoupled decay per step, times lr.
        eps: added to the root of the second moment.
        grad_clip: largest norm of the whole gradient; null for no clipping.
        warmup: optimizer steps over which the learning rate rises linearly.
    """

    name: Literal["adamw", "adamw8bit"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-4
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    eps: Annotated[float, Field(gt=0)] = 1e-8
    grad_clip: Annotated[float, Field(gt=0)] | None = 1.0
    warmup: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        check_fields(self)

    def missing(self) -> str | None:
        """What has to be installed first, in words; None if nothing has."""
        return eight_bit.missing() if self.name == "adamw8bit" else None

    def state_bytes(self, values: int) -> int:
        """Bytes of both moments of a parameter of so many values."""
        return eight_bit.state_bytes(values) if self.name == "adamw8bit" else 8 * values

    def make(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of these parameters, in one group."""
        if self.name == "adamw8bit":
            return eight_bit.make_adamw8bit(parameters, self)
        return torch.optim.AdamW(parameters, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay, eps=self.eps)


class Learner:
    """Applies gradients to the trained parameters.

    Args:
        parameters: the trained parameters by name.
        config: the optimizer section.
        processes: those that share the gradient; all of them step together.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: Optimizer, processes: Processes = ALONE) -> None:
        self.parameters = dict(parameters)
        self.processes = processes
        self.config = config
        self.steps = 0
        self._adamw = config.make(list(self.parameters.values()))
        trained, zero = list(self.parameters.values()), processes.zero
        self._divided = None if zero is None else zero.divide(trained, self._adamw, config.grad_clip)
        self._parts: list[Tensor] = []
        self._losses: list[float] = []
        self._norms: list[float] = []

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar loss."""
        if self._divided is None:
            loss.backward()
        else:
            self._divided.backward(loss)
        self._parts.append(loss.detach())  # read in `step`: to read it here would wait for the device

    def step(self) -> None:
        """One optimizer step with the gradient gathered so far, by all processes; none without any gradient (under
        DeepSpeed AdamW makes one even so, by its momentum).

        Raises:
            DivergedError: the loss or the gradient is not finite; the parameters are left as they were.
            ProcessError: another process is gone.
        """
        own = sum((float(part) for part in self._parts), 0.0)
        self._parts = []
        loss = self.processes.reduce_gradients(list(self.parameters.values()), own)
        norm = self._step(loss) if self._divided is None else self._step_divided(self._divided, loss)
        self._losses.append(loss)
        self._norms.append(norm)

    def _step(self, loss: float) -> float:
        from tailorpo._sharding import whole

        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        clip = self.config.grad_clip or math.inf
        norm = float(whole(torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), clip)))
        if gradients and not (math.isfinite(loss) and math.isfinite(norm)):
            raise DivergedError(_diverged(loss, norm))
        if norm > 0:  # where nothing pulls (every pair masked or tied) Adam would coast on its momentum
            self.steps += 1
            for group in self._adamw.param_groups:
                group["lr"] = self.lr
            self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        return norm

    def _step_divided(self, divided: Divided, loss: float) -> float:
        if not math.isfinite(loss):
            raise DivergedError(_diverged(loss, math.nan))
        self.steps += 1
        norm = divided.step(self.lr)
        if not math.isfinite(norm):
            self.steps -= 1
            raise DivergedError(_diverged(loss, norm))
        return norm

    @property
    def lr(self) -> float:
        """Learning rate of the latest step."""
        return self.config.lr * min(1.0, self.steps / max(self.config.warmup, 1))

    def take_metrics(self) -> dict[str, float]:
        """Loss and gradient norm before clipping, averaged over the steps since the last call."""
        count = max(len(self._losses), 1)
        metrics = {"loss": sum(self._losses) / count, "grad_norm": sum(self._norms) / count, "lr": self.lr}
        self._losses, self._norms = [], []
        return metrics

    def tensors(self, *, keep: bool = True) -> dict[str, Tensor]:
        """Parameters and optimizer state under names that do not change, whole, on the CPU.

        Args:
            keep: whether the caller wants them. Where parameters or the state are in parts all processes have to call
                this together, and usually one alone has a use for the result.
        """
        from tailorpo._sharding import whole

        state: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            found = {f"parameter/{name}": parameter.detach()}
            moments = self._state(parameter)
            found |= {f"optimizer/{key}/{name}": torch.as_tensor(value) for key, value in moments.items()}
            for key, value in found.items():
                gathered = whole(value.detach())
                if keep:
                    state[key] = gathered.cpu().contiguous()
        return state

    def _state(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        if self._divided is None:
            return eight_bit.saved(self._adamw.state.get(parameter, {}))
        return self._divided.state(parameter) if self.steps else {}

    def load_tensors(self, tensors: Mapping[str, Tensor], *, steps: int) -> None:
        """Take over what `tensors` of an equal run returned after `steps` optimizer steps.

        Raises:
            CheckpointError: the tensors are those of other parameters.
        """
        from tailorpo._sharding import cut_like

        names = {name.removeprefix("parameter/") for name in tensors if name.startswith("parameter/")}
        if names != self.parameters.keys() or any(
            tensors[f"parameter/{name}"].shape != parameter.shape for name, parameter in self.parameters.items()
        ):
            raise CheckpointError(
                "the checkpoint holds other parameters than this run trains; the model section was changed"
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(cut_like(tensors[f"parameter/{name}"], parameter))
        state: dict[str, dict[str, Tensor]] = {}
        for key_name, value in tensors.items():
            kind, _, rest = key_name.partition("/")
            if kind == "optimizer":
                key, _, name = rest.partition("/")
                state.setdefault(name, {})[key] = value
        self.steps = steps
        if self._divided is not None:
            self._divided.load(self.parameters, state)
            return
        self._adamw.state.clear()
        for index, (name, parameter) in enumerate(self.parameters.items()):
            if name in state and self.config.name == "adamw8bit":
                eight_bit.restore(self._adamw, index, state[name])
            elif name in state:
                for key, value in state[name].items():
                    placed = value.clone() if key == "step" else cut_like(value.clone(), parameter)
                    self._adamw.state[parameter][key] = placed


def _diverged(loss: float, norm: float) -> str:
    return (
        f"training has diverged: loss {loss}, gradient norm {norm}. No step was taken with it and the"
        " last checkpoint is kept; a smaller optimizer.lr, a larger algorithm.beta or less guidance may help"
    )
