"""What is exported gives the pictures of the run in other people's loaders: diffusers' own, and peft's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_run import settings
from torch import Tensor

from tailorpo.base_model import BaseModel
from tailorpo.errors import UserError
from tailorpo.export import Format, Trained, export, kohya_state
from tailorpo.models import LoRA, ModelConfig
from tailorpo.policy import Policy
from tailorpo.run import Run
from tailorpo.rundir import RunDirectory
from tailorpo.trained import export as write_trained

LORA = LoRA(rank=2, alpha=6.0, targets="attention+conv")


@pytest.fixture
def policy(tiny_policy: Callable[..., Policy]) -> Policy:
    """A tiny model with a LoRA that does something, alpha = 3 rank, on attention and convolutions."""
    return tiny_policy(moved=0.1, lora=LORA)


@pytest.fixture
def trained(policy: Policy, tiny_folder: Path, tmp_path: Path) -> Trained:
    """Its LoRA in a run directory, as training leaves it."""
    lora = {"rank": 2, "alpha": 6.0, "targets": "attention+conv"}
    run = Run.from_dict(settings(tiny_folder, model={"path": str(tiny_folder), "lora": lora}))
    directory = RunDirectory.create(tmp_path / "the run", run)
    write_trained(policy.model, run, directory, updates=run.updates, tensors={})
    return Trained.open(directory.path)


INPUT = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
TEXT = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def output(unet: Any) -> Tensor:
    return unet(INPUT, 401, encoder_hidden_states=TEXT, return_dict=False)[0]


def pipeline(folder: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(str(folder), safety_checker=None)


@pytest.mark.parametrize(
    ("format", "file"), [("diffusers", "pytorch_lora_weights.safetensors"), ("kohya", "the-run.safetensors")]
)
def test_diffusers_loads_either_file_and_predicts_what_the_run_predicts(
    format: Format, file: str, policy: Policy, trained: Trained, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = export(trained, tmp_path / "out", format=format)
    assert {path.name for path in folder.iterdir()} == {file, "README.md"}
    pipe = pipeline(tiny_folder)
    base = output(pipe.unet)
    pipe.load_lora_weights(str(folder), weight_name=file)
    expected = output(policy.model.unet)
    torch.testing.assert_close(output(pipe.unet), expected, rtol=1e-5, atol=1e-5)
    assert (expected - base).abs().max() > 0.05


def test_peft_loads_its_format_too(policy: Policy, trained: Trained, tiny_folder: Path, tmp_path: Path) -> None:
    folder = export(trained, tmp_path / "out", format="peft")
    model = PeftModel.from_pretrained(pipeline(tiny_folder).unet, str(folder))
    torch.testing.assert_close(output(model), output(policy.model.unet), rtol=1e-5, atol=1e-5)
    assert model.peft_config["default"].lora_alpha == 6.0
    assert model.peft_config["default"].base_model_name_or_path == tiny_folder.name


def test_kohya_files_keep_rank_and_alpha_and_have_kohyas_names(trained: Trained, tmp_path: Path) -> None:
    (path,) = export(trained, tmp_path / "out", format="kohya").glob("*.safetensors")
    state = load_file(path)
    modules = {name.split(".")[0] for name in state}
    assert "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0" in modules
    assert "lora_unet_mid_block_resnets_1_conv2" in modules
    assert len(modules) == len(trained.tensors) // 2
    for module in modules:
        down, up, alpha = (state[f"{module}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        assert down.shape[0] == up.shape[1] == 2
        assert alpha.shape == ()
        assert alpha == 6.0
    down = state["lora_unet_mid_block_resnets_1_conv2.lora_down.weight"]
    up = state["lora_unet_mid_block_resnets_1_conv2.lora_up.weight"]
    assert down.shape == (2, 16, 3, 3)
    assert up.shape == (16, 2, 1, 1)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == "2"
    assert metadata["ss_network_alpha"] == "6"
    assert metadata["ss_output_name"] == path.stem == "the-run"
    assert metadata["ss_network_args"] == '{"conv_dim": "2", "conv_alpha": "6"}'


def test_a_merged_model_is_base_plus_lora(policy: Policy, trained: Trained, tiny_folder: Path, tmp_path: Path) -> None:
    folder = export(trained, tmp_path / "out", format="merged")
    merged = pipeline(folder)
    expected = output(policy.model.unet)
    torch.testing.assert_close(output(merged.unet), expected, rtol=1e-5, atol=1e-5)
    # A whole pipeline: pictures from it, without anything of peft left in it.
    draw = {"num_inference_steps": 2, "output_type": "latent"}
    merged.set_progress_bar_config(disable=True)
    assert merged("a cat", **draw).images.isfinite().all()
    assert not [name for name in merged.unet.state_dict() if "lora" in name]
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert (folder / weights).read_bytes() == (tiny_folder / weights).read_bytes()


def test_a_half_precision_merge_rounds_once(trained: Trained, tiny_folder: Path, tmp_path: Path) -> None:
    """W + 3 B A in float64, rounded once, by hand: a merge in float16 would round the product and the sum too."""
    folder = export(trained, tmp_path / "out", format="merged", dtype="float16")
    merged = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    base = load_file(tiny_folder / "unet" / "diffusion_pytorch_model.safetensors")
    raw = {name: tensor.double() for name, tensor in trained.unscaled().items()}
    adapted = 0
    for name, weight in base.items():
        module, expected = name.removesuffix(".weight"), weight.double()
        if f"{module}.lora_A.weight" in raw:
            a, b = raw[f"{module}.lora_A.weight"], raw[f"{module}.lora_B.weight"]
            expected = expected + 3 * torch.einsum("orij,rckl->ockl", b, a) if a.ndim == 4 else expected + 3 * b @ a
            adapted += 1
        assert merged[name].dtype == torch.float16
        # float64 and float32 sums may fall on either side of a rounding boundary, so one unit in the last place is free
        different = merged[name] != expected.half()
        assert different.float().mean() < 0.01, name
        torch.testing.assert_close(merged[name], expected.half(), rtol=2**-10, atol=1e-7)
    assert adapted == len(raw) // 2


def test_a_lora_that_does_not_fit_the_base_model_is_not_merged(trained: Trained, tmp_path: Path) -> None:
    wrong = {name: tensor[..., :1] if ".lora_A." in name else tensor for name, tensor in trained.tensors.items()}
    with pytest.raises(UserError, match="cannot be merged into the model"):
        export(replace(trained, tensors=wrong), tmp_path / "out", format="merged")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".export-*"))


# Stable Diffusion XL: three levels with two blocks each, of which the first has no attention, as the real one.
XL_CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 8, 16),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 2),
    "cross_attention_dim": 2048,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 4 * 6 + 8,
}


def xl_unet(state: Mapping[str, Tensor] | None = None) -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        unet = UNet2DConditionModel(**XL_CONFIG).eval()
    if state is not None:
        unet.load_state_dict(state)
    return unet


def test_an_xl_lora_under_kohyas_names_comes_back_through_diffusers_loader(tiny_folder: Path) -> None:
    unet = xl_unet()
    plain = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    modules = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]
    unet.add_adapter(LoraConfig(r=2, lora_alpha=5, target_modules=modules))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    tensors = get_peft_model_state_dict(unet)
    base = replace(BaseModel.read(ModelConfig(path=str(tiny_folder))), version="sdxl", layers_per_block=2)
    state = kohya_state(tensors, alpha=5.0, base=base)

    # The names that kohya's trainer gives the real model's blocks; diffusers' words for them are in the comments.
    for name in (
        "lora_unet_input_blocks_1_0_in_layers_2",  # down_blocks.0.resnets.0.conv1
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",  # down_blocks.1.attentions.0
        "lora_unet_input_blocks_8_1_transformer_blocks_1_attn2_to_out_0",  # down_blocks.2.attentions.1
        "lora_unet_middle_block_1_transformer_blocks_1_attn2_to_v",  # mid_block.attentions.0
        "lora_unet_middle_block_2_out_layers_3",  # mid_block.resnets.1.conv2
        "lora_unet_output_blocks_5_1_transformer_blocks_0_attn1_to_k",  # up_blocks.1.attentions.2
        "lora_unet_output_blocks_8_0_in_layers_2",  # up_blocks.2.resnets.2.conv1
    ):
        assert f"{name}.lora_up.weight" in state, name
    assert not [name for name in state if re.search("down_blocks|up_blocks|mid_block_|resnets|attentions|conv", name)]
    assert len(state) == len(tensors) * 3 // 2

    fresh = xl_unet(plain)
    loader: Any = StableDiffusionXLPipeline
    found, alphas, _ = loader.lora_state_dict(state, unet_config=fresh.config, return_lora_metadata=True)
    loader.load_lora_into_unet(found, network_alphas=alphas, unet=fresh)
    inputs: dict[str, Any] = {
        "encoder_hidden_states": torch.randn(2, 5, 2048, generator=generator),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(2, 8, generator=generator),
            "time_ids": torch.tensor([[8.0, 8, 0, 0, 8, 8]] * 2),
        },
        "return_dict": False,
    }
    with torch.no_grad():
        expected, got = unet(INPUT, 301, **inputs)[0], fresh(INPUT, 301, **inputs)[0]
        unet.disable_adapters()
        assert (unet(INPUT, 301, **inputs)[0] - expected).abs().max() > 0.05
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
