"""What is trained of a denoising network, and the frozen network it is compared with.

    LoRA    two small matrices beside each target, kept in float32; in a bfloat16 network they compute in bfloat16. The
            reference is the same network with them switched off. No copy.
    full    every parameter, kept in float32; the reference is a frozen copy.

Full fine-tuning in bfloat16 keeps float32 master weights and computes under autocast; the copy is stored in bfloat16
and runs under the same autocast. The masters start from the values rounded to bfloat16, so that policy and reference
agree to the last bit before the first update. Bytes per parameter: 4 (weight) + 4 (gradient) + 8 (AdamW) + 2 (copy)
and, during a forward, 2 for autocast's own copy; in float32 4 + 4 + 8 + 4. Either way 20: 17 GB for SD 1.5, 51 GB for
SDXL, activations not counted.

Left out: float16 for full fine-tuning (its gradients need a loss scale), and a reference on the CPU
(docs/decisions/0005).
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoraConfig
from peft import get_peft_model_state_dict as get_peft_state  # pyright: ignore[reportUnknownVariableType]
from peft import set_peft_model_state_dict as set_peft_state  # pyright: ignore[reportUnknownVariableType]
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from tailorpo.errors import UserError
from tailorpo.models import LoRA
from tailorpo.models.loading import quiet
from tailorpo.noise import Noise

LORA_FILE = "pytorch_lora_weights.safetensors"
UNET_CONFIG = "config.json"
ADAPTER = "default"
ATTENTION_MODULES = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTION_MODULES = ["conv1", "conv2"]


class Trained(Protocol):
    """A denoising network of which something is trained.

    Attributes:
        unet: the network that predicts now: within `reference` the frozen one.
    """

    unet: UNet2DConditionModel

    @property
    def networks(self) -> Sequence[nn.Module]:
        """All that is ever called."""
        ...

    def precision(self) -> AbstractContextManager[Any]:
        """Within it the network is called."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Within it `unet` is the frozen model that training started from."""
        ...


class Frozen:
    """Nothing is trained: a model that is only sampled."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet = unet

    @property
    def networks(self) -> Sequence[nn.Module]:
        return (self.unet,)

    def precision(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def reference(self) -> AbstractContextManager[None]:
        raise UserError("a model of which nothing is trained has no reference: set model.lora, or model.full")


class Adapter:
    """A LoRA on the network."""

    def __init__(self, unet: UNet2DConditionModel, lora: LoRA, *, seed: int) -> None:
        self.unet = unet
        self.lora = lora
        self._attach(seed)

    @property
    def networks(self) -> Sequence[nn.Module]:
        return (self.unet,)

    def precision(self) -> AbstractContextManager[Any]:
        return nullcontext()

    @contextmanager
    def reference(self) -> Generator[None]:
        self.unet.disable_adapters()
        try:
            yield
        finally:
            self.unet.enable_adapters()

    def save(self, folder: Path) -> None:
        """Write diffusers' standard file."""
        # diffusers reads a LoRA without alpha as alpha = rank, so the scale goes into the "up" matrices.
        state: dict[str, nn.Module | Tensor] = {**self._scaled_state()}
        StableDiffusionLoraLoaderMixin.save_lora_weights(str(folder), unet_lora_layers=state, safe_serialization=True)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            UserError: there is none, or it has other shapes.
        """
        path = folder / LORA_FILE
        if not path.is_file():
            raise UserError(f"there is no LoRA at {path}")
        found = {name.removeprefix("unet."): value for name, value in load_file(path).items()}
        expected = self._scaled_state()
        wrong = [name for name in expected if name not in found or found[name].shape != expected[name].shape]
        if wrong or len(found) != len(expected):
            raise UserError(
                f"the LoRA in {path} does not fit this model and model.lora (rank {self.lora.rank}, targets"
                f" {self.lora.targets}): {len(found)} tensors, of which {len(expected) - len(wrong)} of the"
                f" {len(expected)} expected ones"
            )
        scale = self._scaling()
        state = {name: value / scale if ".lora_B." in name else value for name, value in found.items()}
        set_peft_state(self.unet, state, adapter_name=ADAPTER)

    def _scaling(self) -> float:
        return 1.0 if self.lora.alpha is None else self.lora.alpha / self.lora.rank

    def _scaled_state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = get_peft_state(self.unet, adapter_name=ADAPTER)
        scale = self._scaling()
        return {
            name: (value * scale if ".lora_B." in name else value).detach().cpu().contiguous()
            for name, value in state.items()
        }

    def _attach(self, seed: int) -> None:
        targets = ATTENTION_MODULES + (CONVOLUTION_MODULES if self.lora.targets == "attention+conv" else [])
        alpha: Any = self.lora.alpha or self.lora.rank  # peft's annotation says int, its arithmetic does not care
        config = LoraConfig(r=self.lora.rank, lora_alpha=alpha, target_modules=targets)
        place: Any = self.unet.device
        # peft draws its own initialisation from torch's global generator of the device.
        with torch.random.fork_rng([place] if place.type == "cuda" else []):
            self.unet.add_adapter(config, adapter_name=ADAPTER)
        noise = Noise(seed)
        with torch.no_grad():
            for name, parameter in self.unet.named_parameters():
                if not parameter.requires_grad:
                    continue
                parameter.data = parameter.data.float()
                if ".lora_A." in name:
                    # Variance 1 / (3 fan_in), as peft's default initialisation, but drawn from the run's own streams.
                    fan_in = parameter[0].numel()
                    parameter.copy_(noise.normal(parameter.shape, "lora", name) / (3 * fan_in) ** 0.5)
        if self.unet.dtype == torch.bfloat16:  # in float16 small gradients would be lost
            for layer in self.unet.modules():
                if isinstance(layer, LoraLayer):
                    compute_in_bfloat16(layer)


class _Linear(nn.Linear):
    """Half of a LoRA in float32 that computes in the type of what comes in."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype))


class _Conv2d(nn.Conv2d):
    """The same of a convolution's LoRA."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.conv2d(
            input, self.weight.to(input.dtype), None, self.stride, self.padding, self.dilation, self.groups
        )


def compute_in_bfloat16(layer: LoraLayer) -> None:
    """Let a LoRA in float32 compute in bfloat16, as the layer that it is added to.

    peft would turn what comes in into float32: four bytes for every two that are kept for the backward pass, and matrix
    products without tensor cores. The sum is rounded to bfloat16 either way.
    """
    layer.cast_input_dtype_enabled = False
    halves: list[Any] = [layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]]
    for half in halves:
        half.__class__ = {nn.Linear: _Linear, nn.Conv2d: _Conv2d}[type(half)]


class Full:
    """Every parameter of the network, and a frozen copy of it."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self._dtype = next(unet.parameters()).dtype
        self._reference = copy.deepcopy(unet)
        self.unet: UNet2DConditionModel = unet.float().requires_grad_(True)

    @property
    def networks(self) -> Sequence[nn.Module]:
        return (self.unet, self._reference)

    @property
    def reference_bytes(self) -> int:
        """What the frozen copy takes."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self._reference.parameters())

    def precision(self) -> AbstractContextManager[Any]:
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(next(self.unet.parameters()).device.type, dtype=self._dtype)

    @contextmanager
    def reference(self) -> Generator[None]:
        trained, self.unet = self.unet, self._reference
        try:
            yield
        finally:
            self.unet = trained

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the network with the given values, by name, as a folder in diffusers' format, in float32."""
        with torch.device("meta"):
            unet: Any = UNet2DConditionModel.from_config(self.unet.config)
        unet.load_state_dict(weights, assign=True)
        unet.save_pretrained(str(folder), safe_serialization=True)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            UserError: there is none, or it is another network.
        """
        if not (folder / UNET_CONFIG).is_file():
            raise UserError(f"there is no trained network at {folder}")
        try:
            with quiet():
                saved = UNet2DConditionModel.from_pretrained(folder, use_safetensors=True, local_files_only=True)
            self.unet.load_state_dict(saved.state_dict())
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"the network in {folder} does not fit this model: {error}") from error
