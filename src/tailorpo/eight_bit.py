"""AdamW with its two moments in 8 bits (Dettmers et al. 2022, arXiv 2110.02861), by bitsandbytes, on a CPU or a GPU.

Each block of 256 values is kept as bytes and one float32 scale:

    bytes per parameter = 2 + 2 * 4 / 256,  where AdamW has 8

A parameter of fewer than `SMALLEST` values stays in float32: that is most of a LoRA of small rank, which gains little,
and next to nothing of a whole network. Measured against AdamW in tests/unit/test_eight_bit.py.

In a checkpoint the state is plain tensors under bitsandbytes' names (state1, absmax1, ...); the two tables of values
that the bytes stand for are the same for all and are made again.

Left out: paging to the memory of the CPU, and `torchao`, whose optimizer is compiled anew for each shape and keeps its
state in tensor subclasses.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from tailorpo.optimizer import Optimizer

SMALLEST, BLOCK = 4096, 256
_TABLES = ("qmap1", "qmap2")


def missing() -> str | None:
    """What has to be installed first, in words; None if nothing has."""
    if find_spec("bitsandbytes") is not None:
        return None
    return "adamw8bit needs bitsandbytes, which is not installed; `pip install 'tailorpo[8bit]'`"


def state_bytes(values: int) -> int:
    """Of a parameter of so many values."""
    return 8 * values if values < SMALLEST else 2 * values + 2 * 4 * -(-values // BLOCK)


def make_adamw8bit(parameters: list[nn.Parameter], config: Optimizer) -> torch.optim.Optimizer:
    """The optimizer; its state is made at the first step."""
    bitsandbytes: Any = import_module("bitsandbytes")
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
        parameters,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        min_8bit_size=SMALLEST,
    )
    return optimizer


def saved(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint keeps of one parameter's state."""
    return {name: value for name, value in state.items() if name not in _TABLES}


def restore(optimizer: Any, index: int, state: Mapping[str, Tensor]) -> None:
    """Give the parameter at `index` the state that `saved` kept."""
    (group,) = optimizer.param_groups
    parameter = group["params"][index]
    optimizer.init_state(group, parameter, 0, index)
    own: dict[str, Any] = optimizer.state[parameter]
    for name, value in state.items():
        if name == "step":
            own[name] = int(value)
        else:
            own[name].copy_(value)
