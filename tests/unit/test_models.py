"""Where models come from, what of them is trained, and the switches that must not change the numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from peft.tuners.lora import LoraLayer
from tiny import save_tiny_model, save_tiny_taesd, save_tiny_xl_model, tiny_vae
from torch import Tensor

from tailorpo.errors import UserError
from tailorpo.models import Conditioning, LoRA, ModelConfig
from tailorpo.models.latent import attend_plainly
from tailorpo.models.source import family_of
from tailorpo.noise import Noise
from tailorpo.policy import Policy
from tailorpo.rollout import start_trajectories
from tailorpo.samplers import DDIM
from tailorpo.step_rewards import score_latents

PROMPTS = ["a cat", "a dog"]


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("sd") / "model")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_xl_model(tmp_path_factory.mktemp("sdxl") / "model")


def load(folder: Path | str, **changes: Any) -> Any:
    return ModelConfig(path=str(folder), **{"lora": None, **changes}).load("cpu", seed=3)


def latents(model: Any, rows: int = 2) -> Tensor:
    return Noise(0).normals(model.latent_shape, [("x", row) for row in range(rows)], "initial")


def refused(path: Path | str, **changes: Any) -> str:
    with pytest.raises(UserError) as error:
        load(path, **changes)
    return str(error.value)


# Where models come from


def test_other_pipelines_are_refused_by_name(sd: Path, sdxl: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sd, folder)
    index = json.loads((folder / "model_index.json").read_text())
    for name, reason in {
        "StableDiffusionInpaintPipeline": "inpainting models want a mask",
        "StableDiffusionXLImg2ImgPipeline": "a refiner or image-to-image model wants a picture",
        "StableDiffusionControlNetPipeline": "ControlNet pipelines want a control picture",
        "StableDiffusion3Pipeline": "Stable Diffusion 3 is a flow model",
        "FluxPipeline": "Flux is a flow model",
        "KandinskyPipeline": "other pipelines are not supported",
    }.items():
        (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
        message = refused(folder)
        assert f"holds a {name}; family 'sd' needs a StableDiffusionPipeline" in message
        assert reason in message
    assert "set model.family: sdxl" in refused(sdxl)
    assert "set model.family: sd)" in refused(sd, family="sdxl")
    assert (family_of(str(sd)), family_of(str(sdxl)), family_of("emoji"), family_of("a/b/c")) == (
        "sd",
        "sdxl",
        "sd",
        "sd",
    )


def test_parts_of_another_kind_are_refused(sd: Path, sdxl: Path, tmp_path: Path) -> None:
    def changed(part: str, file: str = "config.json", **changes: Any) -> Path:
        folder = tmp_path / f"{part}{len(list(tmp_path.iterdir()))}"
        shutil.copytree(sd, folder)
        path = folder / part / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return folder

    assert "expected a folder of an UNet2DConditionModel" in refused(
        changed("unet", _class_name="SD3Transformer2DModel")
    )
    assert "the network takes 9 channels" in refused(with_unet(sd, tmp_path / "inpainting", in_channels=9))
    flow = changed("scheduler", "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler")
    assert "only the noise levels of DDPM" in refused(flow)
    assert "takes its guidance scale as an input (LCM)" in refused(
        with_unet(sd, tmp_path / "lcm", time_cond_proj_dim=8)
    )
    taesd = save_tiny_taesd(tmp_path / "taesd")
    assert "holds a AutoencoderTiny, expected a folder of an AutoencoderKL" in refused(sd, vae_path=str(taesd))
    assert "model.tiny_vae" in refused(sd, tiny_vae=str(sd / "vae"))


def with_unet(sd: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(sd, folder)
    config = UNet2DConditionModel.load_config(str(sd), subfolder="unet")
    UNet2DConditionModel.from_config({**config, **changes}).save_pretrained(str(folder / "unet"))
    return folder


def test_half_precision_files_are_taken_where_there_are_no_others_and_pickles_never(sd: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sd, folder)
    for part, stem in {
        "unet": "diffusion_pytorch_model",
        "vae": "diffusion_pytorch_model",
        "text_encoder": "model",
    }.items():
        (folder / part / f"{stem}.safetensors").rename(folder / part / f"{stem}.fp16.safetensors")
    x = latents(load(sd))
    model, plain = load(folder), load(sd)
    cond = plain.encode(PROMPTS)
    torch.testing.assert_close(model.encode(PROMPTS).positive, cond.positive, rtol=0, atol=0)
    assert torch.equal(model.predict(x, 500, cond, guidance_scale=2.0), plain.predict(x, 500, cond, guidance_scale=2.0))
    file = folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.bin"))
    assert "only the pickle diffusion_pytorch_model.bin, and opening one runs whatever code it holds" in refused(folder)


def test_a_hub_id_comes_from_the_cache_and_from_the_net_only_when_asked(
    sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    calls: list[bool] = []
    import huggingface_hub

    original = huggingface_hub.snapshot_download
    commit = "0" * 40
    store = tmp_path / "hub" / "models--someone--tiny"

    def snapshot(name: str, *, local_files_only: bool, **settings: Any) -> str:
        calls.append(local_files_only)
        if local_files_only:
            return original(name, local_files_only=True, cache_dir=tmp_path / "hub", **settings)
        shutil.copytree(sd, store / "snapshots" / commit)  # what a download leaves
        (store / "refs").mkdir()
        (store / "refs" / "main").write_text(commit)
        return str(store / "snapshots" / commit)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert "set model.download: true to fetch it" in refused("someone/tiny")
    assert ModelConfig(path="someone/tiny").missing()
    assert calls == [True, True], "nothing was fetched"
    assert not ModelConfig(path="someone/tiny", download=True).missing()
    assert load("someone/tiny", download=True).picture_shape == (3, 16, 16)
    assert calls[-1] is False
    calls.clear()
    assert load("someone/tiny").picture_shape == (3, 16, 16)
    assert load("someone/tiny", download=True).picture_shape == (3, 16, 16)
    assert calls == [True, True], "the cache came first"


# Sizes and decoders


def test_the_size_is_the_networks_unless_the_run_says_otherwise(sd: Path) -> None:
    assert load(sd).latent_shape == (4, 8, 8)
    assert load(sd, size=32).picture_shape == (3, 32, 32)
    model = load(sd, size=(16, 24))
    assert (model.latent_shape, model.picture_shape) == ((4, 8, 12), (3, 16, 24))
    x = latents(model)
    assert model.predict(x, 500, model.encode(PROMPTS), guidance_scale=2.0).shape == x.shape
    assert model.decode(x).shape == (2, 3, 16, 24)
    assert "model.size must be multiples of 2 (one latent is 2 pixels), got 15 x 15" in refused(sd, size=15)


def test_sdxl_conditioning_carries_pooled_embeddings_and_sizes_with_every_row(sdxl: Path) -> None:
    model = load(sdxl, family="sdxl", size=(24, 16))
    cond = model.encode(["a cat", "a dog", "a horse"])
    assert cond.pooled_positive is not None
    assert cond.pooled_negative is not None
    assert cond.sizes is not None
    assert cond.positive.shape == (3, 16, 40)
    assert cond.pooled_positive.shape == (3, 12)
    assert cond.sizes.tolist() == [[24, 16, 0, 0, 24, 16]] * 3
    assert not cond.negative.any()
    assert not cond.pooled_negative.any()
    x = latents(model, 3)
    whole = model.predict(x, 500, cond, guidance_scale=3.0)
    picked = torch.tensor([2, 0])
    torch.testing.assert_close(model.predict(x[picked], 500, cond.rows(picked), guidance_scale=3.0), whole[picked])
    twice = model.predict(x.repeat(2, 1, 1, 1), 500, cond.repeat(2), guidance_scale=3.0)
    torch.testing.assert_close(twice, whole.repeat(2, 1, 1, 1))
    # Guidance by its definition, from two calls without: m_uncond + w (m_cond - m_uncond).
    empty = Conditioning(
        cond.negative,
        cond.negative,
        pooled_positive=cond.pooled_negative,
        pooled_negative=cond.pooled_negative,
        sizes=cond.sizes,
    )
    with_, without = (model.predict(x, 500, each, guidance_scale=1.0) for each in (cond, empty))
    torch.testing.assert_close(whole, without + 3.0 * (with_ - without), rtol=1e-4, atol=1e-4)
    assert (with_ - without).abs().max() > 1e-3


def test_the_vae_of_sdxl_stays_in_float32_unless_it_says_that_it_need_not(sdxl: Path, tmp_path: Path) -> None:
    half = load(sdxl, family="sdxl", dtype="bfloat16")
    assert (half.vae.dtype, half.unet.dtype) == (torch.float32, torch.bfloat16)
    assert half.decode(latents(half)).dtype == torch.float32
    tiny_vae(scaling_factor=0.13025, force_upcast=False).save_pretrained(str(tmp_path / "vae"))
    assert load(sdxl, family="sdxl", dtype="bfloat16", vae_path=str(tmp_path / "vae")).vae.dtype == torch.bfloat16


def test_the_tiny_vae_decodes_on_the_way_and_the_full_one_at_the_end(sd: Path, tmp_path: Path) -> None:
    folder = save_tiny_taesd(tmp_path / "taesd")
    model, plain = load(sd, tiny_vae=str(folder), lora=LoRA(rank=2)), load(sd, lora=LoRA(rank=2))
    x = latents(model)
    # TAESD takes latents in the network's own scale, with no factor: its authors' recipe, by hand.
    taesd = AutoencoderTiny.from_pretrained(str(folder))
    with torch.no_grad():
        expected = (taesd.decoder(x) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(model.decode_draft(x), expected)
    assert torch.equal(model.decode(x), plain.decode(x))
    assert torch.equal(plain.decode_draft(x), plain.decode(x))

    def score(images: Tensor, prompts: Any) -> Tensor:
        return images.mean((1, 2, 3))

    policies = [Policy(each, DDIM(steps=4)) for each in (model, plain)]
    cond = model.encode(PROMPTS)

    def scored(policy: Policy, k: int) -> Any:
        return score_latents(policy, x, k=k, cond=cond, prompts=PROMPTS, score=score, gradient="full")

    draft, full = (scored(policy, 2) for policy in policies)
    assert (draft.reward - full.reward).abs().max() > 1e-3
    assert draft.gradient.abs().max() > 0
    assert torch.equal(*(scored(policy, 4).reward for policy in policies))


def test_the_miniature_s_own_tiny_vae_comes_near_its_full_one(sd: Path) -> None:
    """Of the guesses that step rewards look at, at any step; with latents of the wrong scale it would not."""
    model = load("emoji", tiny_vae="emoji")
    policy = Policy(model, DDIM(steps=20, guidance_scale=1.5))
    cond, x, noise = model.encode(PROMPTS), latents(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for k in range(19):
            step = policy.step(x, k, cond)
            apart = [model.decode(step.x0) - model.decode_draft(scale * step.x0) for scale in (1.0, 0.5)]
            near, wrong = (-10 * each.square().mean((1, 2, 3)).log10() for each in apart)
            assert near.min() > 28, k
            assert wrong.max() < 26, k
            x = step.gaussian.mean + step.gaussian.std * torch.randn(x.shape, generator=noise)
    assert "model.tiny_vae takes 12 channels, the model has 4" in refused(sd, tiny_vae="emoji")


# Switches


def gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    policy = Policy(model, DDIM(steps=4, guidance_scale=2.0))
    start = start_trajectories(policy, PROMPTS, noise=Noise(0), keys=[("a",), ("b",)])
    with torch.enable_grad():
        step = policy.step(start.latents, 1, start.cond)
        picture = model.decode(step.x0)
        (picture.square().mean() + step.gaussian.mean.square().mean()).backward()
    return picture.detach(), {name: value.grad.clone() for name, value in model.trainable().items()}


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("full", [False, True])
def test_gradient_checkpointing_changes_no_bit(family: str, full: bool, sd: Path, sdxl: Path) -> None:
    folder = sd if family == "sd" else sdxl
    trained: dict[str, Any] = {"full": True} if full else {"lora": LoRA(rank=2, targets="attention+conv")}
    pictures, expected = gradients(load(folder, family=family, **trained))
    model = load(folder, family=family, gradient_checkpointing=True, **trained)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model.unet.up_blocks[1].resnets[0].register_forward_pre_hook(count)
    again, found = gradients(model)
    assert calls == 2, "computed again in the backward"
    assert torch.equal(again, pictures)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_slicing_and_memory_layout_change_rounding_at_most(sd: Path) -> None:
    pictures, expected = gradients(load(sd, lora=LoRA(rank=2)))
    for switch in ("vae_slicing", "channels_last"):
        model = load(sd, lora=LoRA(rank=2), **{switch: True})
        again, found = gradients(model)
        torch.testing.assert_close(again, pictures, rtol=1e-4, atol=1e-5)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)
    assert model.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_tiles_cover_only_what_is_larger_than_the_vae_was_trained_at() -> None:
    """The bundled VAE, 64 pixels: no tile at its own size, and at twice its size pictures close to the untiled."""
    plain, tiled = load("emoji"), load("emoji", vae_tiling=True)
    x = latents(plain)
    assert torch.equal(tiled.decode(x), plain.decode(x))
    large = plain.encode_images(torch.nn.functional.interpolate(plain.decode(x), scale_factor=2, mode="bilinear"))
    difference = (tiled.decode(large) - plain.decode(large)).abs()
    assert difference.max() > 0
    assert difference.mean() < 0.05, float(difference.mean())


def test_attention_is_torchs_fused_kernel(sdxl: Path) -> None:
    model = load(sdxl, family="sdxl")
    processors = [*model.unet.attn_processors.values(), *model.vae.attn_processors.values()]
    assert processors
    assert {type(each) for each in processors} == {AttnProcessor2_0}


def test_the_plain_attention_of_a_gpu_s_decoder_is_the_same_up_to_rounding(sd: Path) -> None:
    model, plain = load(sd), load(sd)
    attend_plainly(plain.vae)
    assert {type(each) for each in plain.vae.attn_processors.values()} == {AttnProcessor}
    torch.testing.assert_close(plain.decode(latents(model)), model.decode(latents(model)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_bits_of_a_prompt_do_not_depend_on_those_encoded_with_it(
    family: str, sd: Path, sdxl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the rows of a batch do depend on its size; here by a text encoder that says how many it was given."""
    together, apart = (load(sd if family == "sd" else sdxl, family=family) for _ in range(2))
    for model in (together, apart):
        plain = model.encode_texts

        def sized(prompts: Sequence[str], plain: Any = plain) -> tuple[Tensor, ...]:
            return tuple(each + len(prompts) for each in plain(prompts))

        monkeypatch.setattr(model, "encode_texts", sized)
    apart.encode(["a dog"])
    for a, b in zip(vars(together.encode(PROMPTS)).values(), vars(apart.encode(PROMPTS)).values(), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("targets", ["attention", "attention+conv"])
def test_in_bfloat16_a_lora_computes_in_bfloat16_and_learns_in_float32(targets: Any, sd: Path) -> None:
    """Against the float32 network of the same weights, and what is kept for the backward pass against peft's way."""
    lora = LoRA(rank=2, targets=targets)
    half, exact = load(sd, lora=lora, dtype="bfloat16"), load(sd, lora=lora)
    exact.unet.load_state_dict({name: value.float() for name, value in half.unet.state_dict().items()})
    kept: dict[str, int] = {}
    found: dict[str, dict[str, Tensor]] = {}
    for name, model in (("half", half), ("exact", exact), ("peft", load(sd, lora=lora, dtype="bfloat16"))):
        if name == "peft":
            for layer in model.unet.modules():
                if isinstance(layer, LoraLayer):
                    layer.cast_input_dtype_enabled = True
        moved(model)
        kept[name] = 0

        def note(value: Tensor, name: str = name) -> Tensor:
            kept[name] += value.numel() * value.element_size()
            return value

        with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            output = model.predict(latents(model), 500, model.encode(PROMPTS), guidance_scale=1.0)
        output.square().sum().backward()
        found[name] = {key: value.grad for key, value in model.trainable().items()}
    assert {each.dtype for each in half.trainable().values()} == {torch.float32}
    assert {each.dtype for each in found["half"].values()} == {torch.float32}
    own, true = (torch.cat([each.flatten() for each in found[name].values()]) for name in ("half", "exact"))
    assert float(torch.nn.functional.cosine_similarity(own, true, dim=0)) > 0.999
    assert kept["half"] < 0.9 * kept["peft"]


def test_in_float16_a_lora_computes_in_float32_lest_gradients_vanish(sd: Path) -> None:
    layers = [each for each in load(sd, lora=LoRA(), dtype="float16").unet.modules() if isinstance(each, LoraLayer)]
    assert layers
    assert all(each.cast_input_dtype_enabled for each in layers)


# Full fine-tuning


def moved(model: Any, by: float = 0.05) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_policy_and_reference_are_equal_before_the_first_update_and_the_reference_stays(
    dtype: Any, family: str, sd: Path, sdxl: Path, tmp_path: Path
) -> None:
    folder = sd if family == "sd" else sdxl
    model = load(folder, family=family, full=True, dtype=dtype)
    parameters = model.trainable()
    plain = load(folder, family=family).unet
    assert sum(each.numel() for each in parameters.values()) == sum(each.numel() for each in plain.parameters())
    assert {each.dtype for each in parameters.values()} == {torch.float32}
    policy = Policy(model, DDIM(steps=4, guidance_scale=2.0))
    x, cond = latents(model), model.encode(PROMPTS)
    before = policy.step(x, 1, cond).gaussian
    reference = policy.reference_step(x, 1, cond)
    assert torch.equal(before.mean, reference.mean)
    moved(model)
    after = policy.step(x, 1, cond).gaussian
    assert (after.mean - before.mean).abs().max() > 1e-3
    assert torch.equal(policy.reference_step(x, 1, cond).mean, reference.mean)
    model.save_unet(tmp_path / "unet", model.trainable())
    again = load(folder, family=family, full=True, dtype=dtype)
    again.load_unet(tmp_path / "unet")
    assert torch.equal(Policy(again, policy.sampler).step(x, 1, cond).gaussian.mean, after.mean)


def test_what_is_trained_is_said_where_it_cannot_be_saved(sd: Path, tmp_path: Path) -> None:
    whole, adapter, frozen = load(sd, full=True), load(sd, lora=LoRA(rank=2)), load(sd)
    calls: list[Callable[[], Any]] = [
        lambda: whole.save_lora(tmp_path),
        lambda: adapter.save_unet(tmp_path, {}),
        lambda: frozen.load_lora(tmp_path),
        lambda: whole.load_unet(tmp_path / "nothing"),
        frozen.reference,
    ]
    for call in calls:
        with pytest.raises(UserError):
            call()
    with pytest.raises(ValueError, match="with full: true say lora: null"):
        ModelConfig(path="emoji", full=True)
    with pytest.raises(ValueError, match="use dtype bfloat16 or float32"):
        ModelConfig(path="emoji", full=True, lora=None, dtype="float16")


def test_a_step_without_noise_cannot_be_trained(tmp_path: Path) -> None:
    from tailorpo.algorithms.tailorpo import TailorPO

    folder = save_tiny_model(tmp_path / "model", set_alpha_to_one=True)
    policy = Policy(load(folder, lora=LoRA(rank=2)), DDIM(steps=4))
    start = start_trajectories(policy, PROMPTS, noise=Noise(0), keys=[("a",), ("b",)])

    def score(images: Tensor, prompts: Any) -> Tensor:
        return images.mean((1, 2, 3))

    with pytest.raises(UserError, match="step 3 cannot be trained: it adds no noise"):
        list(TailorPO().collect(policy, start, trained=[1, 3], score=score, noise=Noise(0)))
