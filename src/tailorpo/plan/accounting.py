"""What one call of each kind costs: floating-point operations, bytes, or seconds, by running it.

    backward = (forward and backward) - forward,      input gradient = (forward and gradient of the input) - forward

The same calls are made under three meters. Operations are torch's own count of matrix products, convolutions and
attention (a multiply-add is two), on the meta device, where nothing is computed. Bytes are the storages alive at the
same time, noted at every operation. Seconds are those of this machine.

Attention counts as the fused kernels of GPUs do it: no matrix of scores in memory, and the scores computed a second
time in a backward pass. Left out: element-wise work, normalisations and the optimizer, which cost time but few
operations.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tailorpo.plan.devices import anything
from tailorpo.plan.networks import Network, RewardNetwork

Gradient = Literal["none", "weights", "input"]
_TIME = 500
"""The network's time does not change what a call costs."""
_ATEN: Any = torch.ops.aten
_CONVOLUTIONS: dict[Any, int] = {_ATEN.convolution.default: 1, _ATEN.convolution_backward.default: 2}
"""Where among the arguments the weight is."""


@contextmanager
def fused_attention() -> Generator[None]:
    """On the meta device: attention as one fused kernel with its own backward, as GPUs run it.

    The function itself is replaced; a TorchFunctionMode would be off inside a backward, where checkpointed layers run
    again.
    """
    original: Any = F.scaled_dot_product_attention

    def fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if query.device.type != "meta" or enable_gqa:
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        return _ATEN._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, gradient, 0.0, is_causal, scale=scale
        )[0]

    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


class Operations(TorchDispatchMode):
    """Floating-point operations, by torch's own formulas; a `FlopCounterMode` that does not ask which module it is in,
    which makes it several times faster."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=output)
        return output


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive, and the most there were.

    Storages that were there before (weights, inputs) are not counted. Workspaces inside a kernel are not seen, except,
    with `layouts`, a convolution's: on a CPU, oneDNN copies what goes in and the weight into a layout of its own, and
    what comes out back from it when the first two copies are gone.
    """

    def __init__(self, *, layouts: bool = False) -> None:
        super().__init__()
        self._layouts = layouts
        self.now = 0
        self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor):
                self._note(given, made=False)
        output = func(*args, **(kwargs or {}))
        for made in tree_leaves(output):
            if isinstance(made, Tensor):
                self._note(made, made=True)
        copies = 0
        if self._layouts and func in _CONVOLUTIONS:
            made = [each for each in tree_leaves(output) if isinstance(each, Tensor)]
            copies = max(tensor_bytes((args[0], args[_CONVOLUTIONS[func]])), tensor_bytes(made))
        self.peak = max(self.peak, self.now + copies)
        return output

    def _note(self, tensor: Tensor, *, made: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes() if made else 0
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.now += size


class Calls:
    """The calls that training is made of, each with as many rows as asked for."""

    def __init__(self, network: Network, rewards: list[RewardNetwork], *, guidance_scale: float) -> None:
        self.network = network
        self.model = network.model
        self.rewards = rewards
        self.guidance_scale = guidance_scale

    def latents(self, rows: int, *, gradient: bool = False) -> Tensor:
        """Anything of the right shape."""
        return anything(rows, *self.model.latent_shape, device=self.model.device).requires_grad_(gradient)

    def forward(self, rows: int, gradient: Gradient = "none", *, reference: bool = False) -> Tensor:
        """The guided network output, with the graph that the gradient needs."""
        context: AbstractContextManager[None] = self.model.reference() if reference else nullcontext()
        x, cond = self.latents(rows, gradient=gradient == "input"), self.network.conditioning(rows)
        with context, torch.set_grad_enabled(gradient != "none"):
            output = self.model.predict(x, _TIME, cond, guidance_scale=self.guidance_scale)
        if gradient == "weights":
            output.sum().backward()
        elif gradient == "input":
            torch.autograd.grad(output.sum(), x)
        return output

    def decode(self, rows: int, *, draft: bool = False, gradient: bool = False) -> None:
        """Pictures, by the decoder for pictures on the way if they are a draft, and the gradient of the latents."""
        x = self.latents(rows, gradient=gradient)
        _scalar(self.model.decode_draft if draft else self.model.decode, x, gradient=gradient)

    def score(self, reward: RewardNetwork, rows: int, *, gradient: bool = False) -> None:
        """One reward of pictures, and the gradient of the pictures."""
        shape, device = (rows, *self.model.picture_shape), "cpu" if reward.loaded else self.model.device
        gradient = gradient and reward.differentiable
        pictures = anything(*shape, device=device).requires_grad_(gradient)
        if reward.score is not None:
            _scalar(reward.score, pictures, gradient=gradient)

    def scoring(self, rows: int, *, pictures: bool, latents: bool, draft: bool) -> None:
        """A step's candidates scored in one go: network, decoder, rewards, and back as far as asked for."""
        x = self.latents(rows, gradient=latents)
        with torch.set_grad_enabled(latents):
            clean = self.model.predict(x, _TIME, self.network.conditioning(rows), guidance_scale=self.guidance_scale)
        if not latents:
            x = clean = clean.detach().requires_grad_(pictures)
        with torch.set_grad_enabled(pictures):
            images = self.model.decode_draft(clean) if draft else self.model.decode(clean)
            total = images.flatten(1).mean(1)
            for reward in self.rewards:
                if reward.score is not None and not reward.loaded:
                    total = total + reward.score(images)
            if pictures:
                torch.autograd.grad(total.sum(), x)


def _scalar(function: Callable[[Tensor], Tensor], x: Tensor, *, gradient: bool) -> None:
    with torch.set_grad_enabled(gradient):
        output = function(x)
        if gradient:
            torch.autograd.grad(output.sum(), x)


def operations(call: Callable[[], object]) -> float:
    """Floating-point operations of a call."""
    meter = Operations()
    # Attention that runs on a CPU is counted by its matrix products; the formulas do not know its fused kernel.
    with sdpa_kernel(SDPBackend.MATH), fused_attention(), meter:
        call()
    return float(meter.total)


def peak_bytes(call: Callable[[], object], *, layouts: bool = False) -> int:
    """The most bytes alive at once that a call allocates; `layouts`: with a CPU's copies, see `LiveBytes`."""
    meter = LiveBytes(layouts=layouts)
    with fused_attention(), meter:
        call()
    return meter.peak


def seconds(call: Callable[[], object], device: torch.device, *, repeats: int = 3) -> float:
    """Wall-clock seconds of a call: the least of some repeats after one that warms up."""
    times: list[float] = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def unit_costs(
    calls: Calls,
    measure: Callable[[Callable[[], object]], float],
    *,
    rows: int = 1,
    scored: int = 1,
    judge: RewardNetwork | None = None,
) -> dict[str, float]:
    """What `measure` says of one row of each kind of call.

    Args:
        calls: the run's.
        measure: of a call.
        rows: that go through the network together on the way, on which the time of a row depends.
        scored: that are scored together, and differentiated with respect to the latent.
        judge: the evaluation's, if it has one.
    """

    def per_row(call: Callable[[int], object], count: int) -> float:
        return measure(lambda: call(count)) / count

    def of(rewards: list[RewardNetwork], *, gradient: bool = False) -> float:
        known = [reward for reward in rewards if reward.score is not None]
        return sum(per_row(lambda n, one=reward: calls.score(one, n, gradient=gradient), scored) for reward in known)

    with torch.no_grad():
        found = {
            "forward": per_row(calls.forward, rows),
            "reference forward": per_row(lambda n: calls.forward(n, reference=True), rows),
            "text": measure(calls.network.encode),
            "decode": per_row(calls.decode, scored),
            "draft decode": per_row(lambda n: calls.decode(n, draft=True), scored),
            "reward": of(calls.rewards),
            "judge": of([judge] if judge else []),
        }
        among_scored = found["forward"] if scored == rows else per_row(calls.forward, scored)
    for parameter in calls.model.trainable().values():
        parameter.grad = torch.zeros_like(parameter)
    trains = bool(calls.model.trainable())
    with_weights = per_row(lambda n: calls.forward(n, "weights"), rows) if trains else found["forward"]
    decoded = per_row(lambda n: calls.decode(n, gradient=True), scored)
    drafted = per_row(lambda n: calls.decode(n, draft=True, gradient=True), scored)
    return found | {
        "backward": with_weights - found["forward"],
        "input gradient": per_row(lambda n: calls.forward(n, "input"), scored) - among_scored,
        "decode gradient": decoded - found["decode"],
        "draft decode gradient": drafted - found["draft decode"],
        "reward gradient": of(calls.rewards, gradient=True) - found["reward"],
    }


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of weights."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
