"""Networks in shards: a process keeps a part of each parameter and gathers a block's whole ones while it computes.

This is FSDP2, torch's `fully_shard` (after Zhao et al. 2023, arXiv 2304.11277), as accelerate's configuration asks for
it. What it cuts:

    LoRA    the frozen network alone. The adapter stays whole on every process, so that its gradients are reduced,
            clipped and saved as ever.
    full    the trained network with its gradients and the optimizer's moments, and the frozen copy. torch adds up the
            gradients of every backward among the processes and hands each its part; they are not averaged, because
            the loss is divided by the size of the whole batch already.

Since a forward gathers, all processes have to make the same forwards and backwards in the same order.
`sharing.check_shares` refuses what would not; `Session.minibatches` and the evaluation fill up with calls that count
for nothing.

Left out, and refused: FSDP 1, parameters on the CPU, and FSDP's own recomputation (model.gradient_checkpointing does
that). The VAE, text encoders and rewards stay whole: they are small, or frozen networks that people put on a device of
their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tailorpo.errors import UserError


@dataclass(frozen=True)
class Sharding:
    """How networks are cut.

    Attributes:
        blocks: says of a network which of its modules are gathered one at a time; what is in none of them is gathered
            for the whole of a forward.
        reshard: whether a forward lets go of what it gathered; otherwise that stays until the backward.
    """

    blocks: Callable[[nn.Module], Callable[[nn.Module], bool]]
    reshard: bool

    def shard(self, networks: Sequence[nn.Module], count: int) -> None:
        """Cut networks in place among `count` processes, all of which call this; they are on their device already.

        Raises:
            UserError: a network has a layout that cannot be cut.
        """
        for network in networks:
            parameters = list(network.parameters())
            # A trained adapter stays whole; a network that is trained as a whole has nothing that is not.
            trained = {parameter for parameter in parameters if parameter.requires_grad}
            ignored = trained if len(trained) < len(parameters) else set[nn.Parameter]()
            mesh = init_device_mesh(parameters[0].device.type, (count,))
            is_block = self.blocks(network)
            blocks = [module for module in network.modules() if module is not network and is_block(module)]
            # From the inside out, and the network itself last: it takes what no block has taken.
            for module in (*reversed(blocks), network):
                try:
                    cut = fully_shard(module, mesh=mesh, reshard_after_forward=self.reshard, ignored_params=ignored)
                except NotImplementedError as error:
                    raise UserError(
                        f"the network cannot be cut into shards: {error}; leave model.channels_last out"
                    ) from error
                cut.set_gradient_divide_factor(1.0)
                cut.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def in_shards(tensor: Tensor) -> bool:
    """Whether this process holds a part of it only."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Where it is in shards, all processes have to ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut_like(value: Tensor, tensor: Tensor) -> Tensor:
    """A whole value, which every process has, on the device of `tensor` and in shards as that is."""
    placed = value.to(tensor.device)
    if not isinstance(tensor, DTensor):
        return placed
    return distribute_tensor(placed, tensor.device_mesh, tensor.placements, src_data_rank=None)


def held_bytes(network: nn.Module) -> int:
    """Bytes of parameters that this process holds between two forwards."""
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in network.parameters())
    return sum(part.numel() * part.element_size() for part in parts)
