"""One file in the original layout: sizes, names, values, tokenizer, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
    infer_diffusers_model_type,
)
from original_layout import original_clip, original_open_clip, original_unet, original_vae
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tailorpo.errors import UserError
from tailorpo.models import ModelConfig
from tailorpo.models.single_file import clip_tokenizer
from tailorpo.models.source import assets

TEXT = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


def networks(layouts: Path, layout: str) -> dict[str, Any]:
    """The networks of a layout, by their configurations."""
    folder = layouts / layout
    found: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(str(folder), subfolder="unet")),
        "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(str(folder), subfolder="vae")),
    }
    for name, kind in TEXT.items():
        if (folder / name).is_dir():
            found[name] = kind(CLIPTextConfig.from_pretrained(str(folder / name)))
    return found


def original(parts: dict[str, Any], layout: str) -> dict[str, Tensor]:
    """The same networks as one file's tensors."""
    checkpoint = {
        **original_unet(parts["unet"].state_dict(), parts["unet"].config),
        **original_vae(parts["vae"].state_dict(), parts["vae"].config),
    }
    if layout == "sd2":
        checkpoint |= original_open_clip(parts["text_encoder"].state_dict(), "cond_stage_model.model.")
    else:
        prefix = "cond_stage_model" if layout == "sd1" else "conditioner.embedders.0"
        checkpoint |= original_clip(parts["text_encoder"].state_dict(), f"{prefix}.transformer.")
    if layout == "sdxl":
        checkpoint |= original_open_clip(parts["text_encoder_2"].state_dict(), "conditioner.embedders.1.model.")
    return checkpoint


def parameters(network: Any) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("layout", "counts"),
    [
        ("sd1", {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}),
        ("sd2", {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840}),
        (
            "sdxl",
            {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
        ),
    ],
)
def test_full_sizes_and_every_name_of_the_original_layout(layout: str, counts: dict[str, int]) -> None:
    """On the meta device: no memory. The counts are the published ones."""
    with init_empty_weights():
        parts = networks(assets("layouts"), layout)
        checkpoint = original(parts, layout)
        unet = convert_ldm_unet_checkpoint(dict(checkpoint), parts["unet"].config)
        vae = convert_ldm_vae_checkpoint(dict(checkpoint), parts["vae"].config)
    assert {name: parameters(network) for name, network in parts.items()} == counts
    assert infer_diffusers_model_type(checkpoint) == {"sd1": "v1", "sd2": "v2", "sdxl": "xl_base"}[layout]
    for name, converted in (("unet", unet), ("vae", vae)):
        expected = {key: tensor.shape for key, tensor in parts[name].state_dict().items()}
        assert {key: tensor.shape for key, tensor in converted.items()} == expected, name
    if layout == "sdxl":
        prefix = "conditioner.embedders.1.model."
        text = convert_open_clip_checkpoint(parts["text_encoder_2"], dict(checkpoint), prefix=prefix)
        assert text.keys() == parts["text_encoder_2"].state_dict().keys()


# What a tiny network shares with a real one is the topology: four (three) levels with attention at the same places.
SHRINK: dict[str, dict[str, Any]] = {
    "unet": {"block_out_channels": [4, 4, 8, 8], "norm_num_groups": 2, "sample_size": 8, "attention_head_dim": 2},
    "vae": {"block_out_channels": [4, 4, 8, 8], "norm_num_groups": 2, "sample_size": 64},
    "text_encoder": {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2},
}


def shrink(layouts: Path, layout: str) -> None:
    """Cut the sizes of a layout down, in place."""
    changes = {name: dict(change) for name, change in SHRINK.items()}
    changes["unet"]["cross_attention_dim"] = 16
    if layout == "sd2":
        # diffusers knows a 2.x by the width of its text encoder.
        changes["unet"]["cross_attention_dim"] = 1024
        changes["text_encoder"] |= {"hidden_size": 1024, "num_hidden_layers": 1}
    if layout == "sdxl":
        # ... and an XL by a tenth layer of its second one.
        changes["unet"] |= {"block_out_channels": [4, 8, 8], "transformer_layers_per_block": [1, 1, 2]}
        changes["unet"] |= {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 48}
        changes["unet"]["cross_attention_dim"] = 40
        changes["text_encoder_2"] = {**SHRINK["text_encoder"], "hidden_size": 24, "num_hidden_layers": 10}
        changes["text_encoder_2"]["projection_dim"] = 24
    for name, change in changes.items():
        file = layouts / layout / name / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny layouts in the place of the real ones."""
    folder = tmp_path / "assets"
    for name in ("layouts", "clip_tokenizer"):
        shutil.copytree(assets(name), folder / name)
    monkeypatch.setattr("tailorpo.models.single_file.assets", lambda name: folder / name)
    return folder / "layouts"


def write(path: Path, layouts: Path, layout: str) -> dict[str, Any]:
    """A random tiny model as one file, in half precision as people share them; returns its networks."""
    shrink(layouts, layout)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = networks(layouts, layout)
    for network in parts.values():
        for parameter in network.parameters():
            parameter.data = parameter.data.half().float()
    tensors = {name: tensor.contiguous().half() for name, tensor in original(parts, layout).items()}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return parts


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("sd1", {}),
        ("sd2", {"prediction_type": "v_prediction", "zero_terminal_snr": True}),
        ("sdxl", {"family": "sdxl"}),
    ],
)
def test_what_was_written_comes_back_tensor_by_tensor(
    layout: str, settings: dict[str, Any], small: Path, tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    parts = write(file, small, layout)
    model: Any = ModelConfig(path=str(file), lora=None, **settings).load("cpu")
    loaded = {"unet": model.unet, "vae": model.vae, **dict(zip(TEXT, model.parts.text_encoders, strict=False))}
    for name, network in parts.items():
        expected, found = network.state_dict(), loaded[name].state_dict()
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=0)
    cond = model.encode(["a photo of a cat"])
    assert cond.positive.shape[1] == 77
    x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    assert model.predict(x, 501, cond, guidance_scale=2.0).isfinite().all()
    assert model.decode(x).shape == (1, *model.picture_shape)
    assert model.prediction_type == settings.get("prediction_type", "epsilon")


def test_a_file_that_says_it_predicts_v_is_believed(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write(file, small, "sdxl")
    save_file({**load_file(file), "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, file)
    model = ModelConfig(family="sdxl", path=str(file), lora=None).load("cpu")
    assert model.prediction_type == "v_prediction"
    assert float(model.schedule(20).alpha[0]) == 0


def test_what_a_file_cannot_be_is_refused_by_name(small: Path, tmp_path: Path) -> None:
    def refused(path: Path, **settings: Any) -> str:
        with pytest.raises(UserError) as error:
            ModelConfig(path=str(path), lora=None, **settings).load("cpu")
        return str(error.value)

    file, other = tmp_path / "model.safetensors", tmp_path / "other.safetensors"
    write(file, small, "sd2")
    assert "set model.prediction_type: epsilon (the 512 base models) or v_prediction" in refused(file)
    assert "set model.family: sd" in refused(file, family="sdxl")
    whole = load_file(file)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    save_file({**whole, first: torch.zeros(4, 9, 3, 3)}, other)
    assert "a model of the kind 'inpainting_v2'" in refused(other)
    lost = [name for name in whole if name != "first_stage_model.decoder.conv_in.bias"]
    save_file({name: whole[name] for name in lost}, other)
    assert "lacks weights of its AutoencoderKL" in refused(other, prediction_type="epsilon")
    lost = [name for name in whole if not name.endswith("resblocks.0.ln_1.weight")]
    save_file({name: whole[name] for name in lost}, other)
    assert "lacks weights of its CLIPTextModel" in refused(other, prediction_type="epsilon")
    save_file({"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(1)}, other)
    assert "holds a LoRA" in refused(other)
    save_file({"anything": torch.zeros(1)}, other)
    assert "holds no Stable Diffusion" in refused(other)
    other.write_bytes(b"\x00" * 40)
    assert "is not a readable safetensors file" in refused(other)
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"\x80\x04")
    assert "is a pickle, and opening one runs whatever code it holds" in refused(pickle)


def test_the_tokenizer_is_clips() -> None:
    """Token numbers as published with CLIP and seen in every Stable Diffusion prompt."""
    tokenizer = clip_tokenizer(pad="!")
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("a", padding="max_length").input_ids == [49406, 320, 49407] + [0] * 74
    assert clip_tokenizer(pad="<|endoftext|>")("a", padding="max_length").input_ids[3:] == [49407] * 74
