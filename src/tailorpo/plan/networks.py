"""The networks of a run without their weights: built from config.json alone, on the meta device or with random numbers.

They are the library's own adapter and rewards, so that what is counted is what training calls. Where a folder is not
on the disk, one of the published architectures in assets/architectures stands in for it, and the plan says so.

Left out: rewards whose architecture nobody can know before they are loaded; `--measure` loads and counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn
from transformers import (
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)

from tailorpo.device import repeat_bits
from tailorpo.errors import UserError
from tailorpo.models import Conditioning, ModelConfig
from tailorpo.models.latent import LatentDiffusion
from tailorpo.models.loading import DTYPES, Parts, quiet
from tailorpo.models.sd import StableDiffusion
from tailorpo.models.sdxl import StableDiffusionXL
from tailorpo.models.source import assets, find_model, find_tiny_vae, layout_of, read_config
from tailorpo.plan.devices import anything
from tailorpo.rewards import (
    Aesthetic,
    Brightness,
    ClipPreference,
    ClipScore,
    Colourfulness,
    HPSv2,
    ImageReward,
    JpegCompressibility,
    JpegIncompressibility,
    PickScore,
    RemoteReward,
    RewardConfig,
)
from tailorpo.rewards.aesthetic import AestheticScorer
from tailorpo.rewards.affine_head import AffineHead
from tailorpo.rewards.clip import ClipScorer
from tailorpo.rewards.hpsv2 import CONFIG as HPS_CONFIG
from tailorpo.rewards.image_reward import LONGEST as IMAGE_REWARD_LONGEST
from tailorpo.rewards.image_reward import TEXT as IMAGE_REWARD_TEXT
from tailorpo.rewards.image_reward import VISION as IMAGE_REWARD_VISION
from tailorpo.rewards.preprocess import Preprocess

Architecture = Literal["sd15", "sd21", "sdxl"]
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
_PUBLISHED: dict[Architecture, tuple[str, str]] = {
    "sd15": ("sd1", "Stable Diffusion 1.5"),
    "sd21": ("sd2", "Stable Diffusion 2.1"),
    "sdxl": ("sdxl", "Stable Diffusion XL"),
}
"""Of each architecture its folder in assets/layouts, and what to call it."""
_CLIP = Aesthetic | ClipPreference | PickScore | ClipScore


@dataclass(frozen=True)
class Network:
    """A denoising network with its decoder and text encoders.

    Attributes:
        title: what to call it.
        assumption: what was assumed about it, in words; None where its own config.json was read.
    """

    model: LatentDiffusion
    title: str
    assumption: str | None

    def conditioning(self, rows: int) -> Conditioning:
        """Embeddings of as many prompts, of the right shape."""
        model, config = self.model, self.model.unet.config
        length = int(cast(Any, model.parts.text_encoders[0]).config.max_position_embeddings)
        shapes: list[tuple[int, ...]] = [(length, int(config["cross_attention_dim"]))]
        if isinstance(model, StableDiffusionXL):  # the pooled embedding comes beside six embedded sizes
            shapes.append((config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"],))
        texts = [anything(1, *shape, device=model.device).to(model.dtype) for shape in shapes]
        return model.conditioning(tuple(each.expand(rows, *each.shape[1:]) for each in texts), tuple(texts))

    def encode(self) -> None:
        """One prompt through the text encoders."""
        for encoder in self.model.parts.text_encoders:
            length = int(cast(Any, encoder).config.max_position_embeddings)
            encoder(torch.zeros(1, length, dtype=torch.long, device=self.model.device))


def build_network(
    config: ModelConfig, device: torch.device | str, *, architecture: Architecture | None = None
) -> Network:
    """The run's network with random weights on `device` ("meta": with none), what is trained of it attached.

    Raises:
        UserError: the model's config.json files cannot be used.
    """
    found, title, assumption = _description(config, architecture)
    repeat_bits(torch.device(device), wanted=config.deterministic)
    xl = "text_encoder_2" in found
    dtype = DTYPES[config.dtype]
    try:
        with torch.device(device):
            unet = cast(UNet2DConditionModel, UNet2DConditionModel.from_config(found["unet"]))
            vae = cast(AutoencoderKL, AutoencoderKL.from_config(found["vae"]))
            tiny = _tiny_vae(config.tiny_vae, vae) if config.tiny_vae else None
            encoders: list[Any] = [CLIPTextModel(CLIPTextConfig(**found["text_encoder"]))]
            if xl:
                encoders.append(CLIPTextModelWithProjection(CLIPTextConfig(**found["text_encoder_2"])))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"model.path: the networks described in {config.path} cannot be built: {error}") from error
    for network in (unet, vae, tiny, *encoders):
        if network is not None:
            nn.Module.to(network, dtype).eval().requires_grad_(False)
    parts = Parts(
        unet=unet,
        vae=vae,
        tiny_vae=tiny,
        text_encoders=tuple(encoders),
        tokenizers=(),
        scheduler=DDIMScheduler(),
        zeros_for_empty=xl,
    )
    return Network((StableDiffusionXL if xl else StableDiffusion)(parts, config, seed=0), title, assumption)


def _tiny_vae(path: str, vae: AutoencoderKL) -> AutoencoderTiny:
    """As its config.json says, or TAESD where there is none on this disk: diffusers' defaults."""
    folder = find_tiny_vae(path)
    if (folder / "config.json").is_file():
        with quiet():  # diffusers writes an entry into its own files that it then says it does not know
            return cast(AutoencoderTiny, AutoencoderTiny.from_config(read_config(folder, "config.json")))
    return AutoencoderTiny(latent_channels=vae.config["latent_channels"])


def _description(config: ModelConfig, architecture: Architecture | None) -> tuple[dict[str, Any], str, str | None]:
    """The configs of the networks, their title, and what was assumed."""
    try:
        source = find_model(config.path, family=config.family)
    except UserError:
        source = None
    if architecture is None and source is not None:
        folder = layout_of(source, config.family) if source.is_file() else source
        return _networks(folder), config.path, None
    chosen = architecture or _guess(config)
    layout, title = _PUBLISHED[chosen]
    found = _networks(assets("layouts") / layout)
    if chosen == "sd21":
        found["unet"]["sample_size"] = 96  # the layout has the size of the base model, 512 pixels
    why = f"as --architecture {chosen} says" if architecture else f"{config.path} is not on the disk"
    return found, title, f"the networks are those of {title} ({why})"


def _networks(folder: Path) -> dict[str, Any]:
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    return {part: read_config(folder / part) for part in parts if (folder / part).is_dir()}


def _guess(config: ModelConfig) -> Architecture:
    name = Path(config.path).name.lower()
    if config.family == "sdxl":
        return "sdxl"
    return "sd21" if any(part in name for part in ("2-1", "2.1", "v2", "sd2")) else "sd15"


@dataclass(frozen=True)
class RewardNetwork:
    """What a reward computes.

    Attributes:
        score: pictures (B, 3, H, W) to (B,); None where there is no network to count, or it is not known.
        modules: what holds its weights.
        assumption: what was assumed about it, in words.
        known: False where nobody can say what it costs.
        loaded: it is the reward itself, on the CPU, and not a copy of its networks.
        differentiable: whether there is a gradient to count.
    """

    name: str
    score: Callable[[Tensor], Tensor] | None = None
    modules: tuple[nn.Module, ...] = ()
    assumption: str | None = None
    known: bool = True
    loaded: bool = False
    differentiable: bool = True


def build_reward(config: RewardConfig, device: torch.device | str, *, load: bool = False) -> RewardNetwork:
    """The reward with random weights on `device`; with `load`, one that is not known is loaded and called as it is.

    Raises:
        UserError: its config.json cannot be used, or it cannot be loaded.
    """
    name = config.name
    if isinstance(config, JpegCompressibility | JpegIncompressibility | Colourfulness | Brightness):
        return RewardNetwork(name)
    if isinstance(config, RemoteReward):
        return RewardNetwork(name, assumption="reward remote: what its server computes and holds is not counted")
    if isinstance(config, ImageReward):
        return _image_reward(name, device)
    if isinstance(config, HPSv2):
        return _clip_reward(name, HPS_CONFIG, Preprocess(size=224, fit="pad", resize="tensor"), device=device)
    folder = Path(config.path).expanduser() if isinstance(config, _CLIP) else assets(name)
    if (folder / "config.json").is_file():
        found, assumption = read_config(folder), None
    elif isinstance(config, _CLIP):
        found, title = _clip_of(config)
        assumption = f"{folder} is not on the disk; reward {name} is taken to be a {title}"
    else:
        found, assumption = {}, None
    if "vision_config" in found:
        size = int(cast(Any, CLIPConfig(**found).vision_config).image_size)
        head = isinstance(config, Aesthetic)
        return _clip_reward(name, found, Preprocess(size=size), device=device, head=head, assumption=assumption)
    if not load:
        return RewardNetwork(name, known=False)
    reward = config.load("cpu")

    def score(images: Tensor) -> Tensor:
        return reward(images, [""] * len(images))

    assumption = f"reward {name} was loaded and called; its memory is not counted"
    return RewardNetwork(name, score, assumption=assumption, loaded=True, differentiable=reward.differentiable)


def _clip_of(config: Aesthetic | ClipPreference | PickScore | ClipScore) -> tuple[Mapping[str, Any], str]:
    """The config and the name of the CLIP that a reward is published with."""
    if isinstance(config, ClipScore):
        return CLIPConfig().to_dict(), "CLIP ViT-B/32"  # transformers' default is this one
    published = read_config(assets("architectures"), f"clip_vit_{'l' if isinstance(config, Aesthetic) else 'h'}14.json")
    return published["clip"], published["title"]


def _clip_reward(
    name: str,
    found: Mapping[str, Any],
    preprocess: Preprocess,
    *,
    device: torch.device | str,
    head: bool = False,
    assumption: str | None = None,
) -> RewardNetwork:
    """A prompt's text features are kept from its first picture on, so the text tower is not counted."""
    config: Any = CLIPConfig(**found)
    vision = config.vision_config
    vision.projection_dim = config.projection_dim
    with torch.device(device):
        if not head:
            model = CLIPModel(config)
            scorer = ClipScorer(model, preprocess, tokenize=lambda prompt: [0], name=name)
            return RewardNetwork(name, lambda images: scorer.embed(images).sum(1), (model,), assumption)
        tower = CLIPVisionModelWithProjection(vision).eval().requires_grad_(False)
        affine = AffineHead(torch.zeros(vision.projection_dim), torch.zeros(()))
    rated = AestheticScorer(tower, preprocess, head=affine, name=name)
    return RewardNetwork(name, lambda images: rated(images, [""] * len(images)), (tower,), assumption)


def _image_reward(name: str, device: torch.device | str) -> RewardNetwork:
    """With prompts of the greatest length, which are read together with each picture."""
    with torch.device(device):
        vision = BlipVisionModel(BlipVisionConfig(**IMAGE_REWARD_VISION)).eval().requires_grad_(False)
        text = BlipTextModel(BlipTextConfig(**IMAGE_REWARD_TEXT), add_pooling_layer=False).eval().requires_grad_(False)
    preprocess = Preprocess(size=IMAGE_REWARD_VISION["image_size"], crop_rounding="nearest")

    def score(images: Tensor) -> Tensor:
        seen = cast(Any, vision)(pixel_values=preprocess(images)).last_hidden_state
        ids = torch.zeros(len(images), IMAGE_REWARD_LONGEST, dtype=torch.long, device=images.device)
        read = cast(Any, text)(input_ids=ids, encoder_hidden_states=seen).last_hidden_state
        return read[:, 0].sum(1)

    return RewardNetwork(name, score, (vision, text))
