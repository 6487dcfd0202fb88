"""Stable Diffusion 1.x and 2.x, and every model in the same diffusers folder format (such as the bundled miniature).

The guided output is m = m_uncond + w (m_cond - m_uncond) (Ho and Salimans 2022, arXiv 2207.12598); both halves are one
network call, and gradients flow through both. The reference is the same network with its LoRA switched off: no second
copy.

The decoder's output is clamped to [0, 1] with a straight-through gradient: a plain clamp has gradient zero on white
and black, which are most of a clean picture, and would stop a reward's gradient there.

Left out: the safety checker (it judges finished pictures and has no part in training), and training of the text
encoder.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from peft import get_peft_model_state_dict as get_peft_state  # pyright: ignore[reportUnknownVariableType]
from peft import set_peft_model_state_dict as set_peft_state  # pyright: ignore[reportUnknownVariableType]
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from tailorpo.errors import UserError
from tailorpo.models import Conditioning, LoRA, ModelConfig
from tailorpo.noise import Noise
from tailorpo.prediction import PredictionType
from tailorpo.schedule import Schedule, ddpm_schedule

LORA_FILE = "pytorch_lora_weights.safetensors"
BUNDLED = ("emoji",)
ADAPTER = "default"
ATTENTION_MODULES = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTION_MODULES = ["conv1", "conv2"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class StableDiffusion:
    """A Stable Diffusion with a LoRA; see `tailorpo.models.DiffusionModel` for the meaning of each member."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        *,
        text_encoder: CLIPTextModel,
        tokenizer: Any,
        scheduler: DDIMScheduler,
        lora: LoRA | None,
        seed: int,
    ) -> None:
        self.unet = unet.eval().requires_grad_(False)
        self.vae = vae.eval().requires_grad_(False)
        self.text_encoder = text_encoder.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.scheduler = scheduler
        self.lora = lora
        self.device = next(unet.parameters()).device
        self.dtype = next(unet.parameters()).dtype
        self.prediction_type: PredictionType = scheduler.config["prediction_type"]
        size = int(unet.config["sample_size"])
        self.latent_shape = (int(unet.config["in_channels"]), size, size)
        factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        self.picture_shape: tuple[int, int, int] = (3, size * factor, size * factor)
        self.alphas_cumprod = scheduler.alphas_cumprod.double()
        self.evaluations = 0
        self._encoded: dict[str, Tensor] = {}
        if lora is not None:
            self._attach(lora, seed=seed)

    @classmethod
    def load(cls, config: ModelConfig, device: torch.device, *, seed: int = 0) -> StableDiffusion:
        """Load a diffusers folder from the local disk; nothing is downloaded.

        Raises:
            UserError: the folder is missing, or holds something else than a Stable Diffusion 1.x / 2.x.
        """
        folder = model_folder(config.path)
        try:
            with _quiet():
                unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", local_files_only=True)
                vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", local_files_only=True)
                text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", local_files_only=True)
                tokenizer: Any = CLIPTokenizer.from_pretrained(  # pyright: ignore[reportUnknownVariableType]
                    folder, subfolder="tokenizer", local_files_only=True
                )
                # Whatever sampler the folder names, its noise schedule reads as DDIM's.
                settings: Any = DDIMScheduler.load_config(folder, subfolder="scheduler", local_files_only=True)
                scheduler: Any = DDIMScheduler.from_config(settings)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"the model in {folder} cannot be loaded: {error}") from error
        for network in (unet, vae, text_encoder):
            nn.Module.to(network, device, DTYPES[config.dtype])
        return cls(
            unet,
            vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
            lora=config.lora,
            seed=seed,
        )

    def schedule(self, steps: int) -> Schedule:
        settings = self.scheduler.config
        return ddpm_schedule(
            self.alphas_cumprod,
            steps,
            spacing="trailing" if settings["timestep_spacing"] == "trailing" else "leading",
            steps_offset=int(settings["steps_offset"]),
            final_alpha_cumprod=1.0 if settings["set_alpha_to_one"] else None,
        )

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        new = [prompt for prompt in dict.fromkeys(("", *prompts)) if prompt not in self._encoded]
        if new:
            tokens = self.tokenizer(
                new,
                padding="max_length",
                max_length=self.tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            embeddings = self.text_encoder(tokens.input_ids.to(self.device))[0]
            self._encoded.update(zip(new, embeddings, strict=True))
        positive = torch.stack([self._encoded[prompt] for prompt in prompts])
        return Conditioning(positive, self._encoded[""].expand_as(positive))

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        posterior = self.vae.encode((2 * images - 1).to(self.device, self.dtype), return_dict=False)[0]
        return posterior.mode().float() * self.vae.config["scaling_factor"]

    def predict(self, latents: Tensor, time: int | Tensor, cond: Conditioning, *, guidance_scale: float) -> Tensor:
        self.evaluations += len(latents)
        x = latents.to(self.dtype)
        if isinstance(time, int):  # filled on the device: a number would be copied there, and the copy waited for
            time = torch.full((1,), time, device=self.device)
        if guidance_scale == 1.0:
            return self.unet(x, time, encoder_hidden_states=cond.positive, return_dict=False)[0].float()
        embeddings = torch.cat([cond.negative, cond.positive])
        times = time.repeat(2) if len(time) > 1 else time
        output = self.unet(torch.cat([x, x]), times, encoder_hidden_states=embeddings, return_dict=False)[0].float()
        unconditional, conditional = output.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def decode(self, latents: Tensor) -> Tensor:
        scaled = latents / self.vae.config["scaling_factor"]
        pictures = self.vae.decode(scaled.to(self.dtype), return_dict=False)[0].float() / 2 + 0.5
        return pictures + (pictures.clamp(0, 1) - pictures).detach()

    @contextmanager
    def reference(self) -> Generator[None]:
        if self.lora is None:
            raise UserError("a model without LoRA has no reference: set model.lora")
        self.unet.disable_adapters()
        try:
            yield
        finally:
            self.unet.enable_adapters()

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.unet.named_parameters() if parameter.requires_grad}

    def save_lora(self, folder: Path) -> None:
        with _quiet():  # importing a pipeline warns of torchvision, which is not needed
            from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
        # diffusers reads a LoRA without alpha as alpha = rank, so the scale goes into the "up" matrices.
        state: dict[str, nn.Module | Tensor] = {**self._scaled_state()}
        StableDiffusionPipeline.save_lora_weights(str(folder), unet_lora_layers=state, safe_serialization=True)

    def load_lora(self, folder: Path) -> None:
        if self.lora is None:
            raise UserError("the model has no adapter to load a LoRA into: set model.lora")
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
        assert self.lora is not None
        return 1.0 if self.lora.alpha is None else self.lora.alpha / self.lora.rank

    def _scaled_state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = get_peft_state(self.unet, adapter_name=ADAPTER)
        scale = self._scaling()
        return {
            name: (value * scale if ".lora_B." in name else value).detach().cpu().contiguous()
            for name, value in state.items()
        }

    def _attach(self, lora: LoRA, *, seed: int) -> None:
        targets = ATTENTION_MODULES + (CONVOLUTION_MODULES if lora.targets == "attention+conv" else [])
        alpha: Any = lora.alpha or lora.rank  # peft's annotation says int, its arithmetic does not care
        config = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=targets)
        with torch.random.fork_rng():  # peft draws its own initialisation from torch's global generator
            self.unet.add_adapter(config, adapter_name=ADAPTER)
        noise = Noise(seed)
        with torch.no_grad():
            for name, parameter in self.trainable().items():
                parameter.data = parameter.data.float()
                if ".lora_A." in name:
                    # Variance 1 / (3 fan_in), as peft's default initialisation, but drawn from the run's own streams.
                    fan_in = parameter[0].numel()
                    parameter.copy_(noise.normal(parameter.shape, "lora", name) / (3 * fan_in) ** 0.5)


@contextmanager
def _quiet() -> Generator[None]:
    """Without the progress bars and notices that the loaders print for every component."""
    bars = transformers_logging.is_progress_bar_enabled()
    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])
        if bars:
            transformers_logging.enable_progress_bar()


def model_folder(path: str) -> Path:
    """The folder of a model: of a bundled one by name, otherwise the path itself.

    Raises:
        UserError: it does not exist, or is not a diffusers folder of a Stable Diffusion.
    """
    folder = Path(str(files("tailorpo"))) / "assets" / path if path in BUNDLED else Path(path).expanduser()
    index = folder / "model_index.json"
    if not index.is_file():
        bundled = ", ".join(BUNDLED)
        raise UserError(
            f"model.path: there is no diffusers model at {folder} (no model_index.json);"
            f" give a bundled name ({bundled}) or a local folder as saved by StableDiffusionPipeline.save_pretrained"
        )
    kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise UserError(f"model.path: {folder} holds a {kind}; family 'sd' needs a StableDiffusionPipeline")
    return folder
