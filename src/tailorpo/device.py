"""A CUDA GPU as this library uses it: never waited for where it need not be, and the same bits for the same seed.

Copies. A plain copy from ordinary memory is begun only when everything queued before it is done, and returns when it is
done itself, so that a GPU runs dry at every draw of noise. From page-locked memory a copy is queued like a kernel.

Bits. Some kernels add numbers up in whatever order they come: the backward passes of attention and, by cuDNN's choice,
of convolutions. torch has others that do not, and refuses operations for which there is none. Between GPUs of different
kinds, or versions of torch, bits differ all the same.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor

from tailorpo.errors import UserError


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`, queued after what that device has to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def repeat_bits(device: torch.device, *, wanted: bool = True) -> None:
    """From now on let this process use, or not insist on, kernels of a CUDA GPU that give the same bits every time."""
    if device.type != "cuda":
        return
    # What cuBLAS asks for; read when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    # Memory that nobody has written to is never read here, so filling it would only cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def refusals_in_words() -> Generator[None]:
    """Say what can be done about an operation that torch refuses, because no kernel of it repeats its bits.

    Raises:
        UserError: instead of that RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        operation, refused, _ = str(error).partition(" does not have a deterministic implementation")
        if not refused:
            raise
        raise UserError(
            f"{operation} has no implementation on this device that gives the same bits every time. If it belongs to a"
            " reward of yours, there may be another way to write it; otherwise set model.deterministic: false, and runs"
            " with the same seed will differ a little"
        ) from error
