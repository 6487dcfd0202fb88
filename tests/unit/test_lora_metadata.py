"""The header of a LoRA file: readable by others, the same every time, and nothing in it that is private or wrong."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from tiny_run import settings

from tailorpo import __version__
from tailorpo.base_model import BaseModel
from tailorpo.errors import UserError
from tailorpo.lora_metadata import lora_metadata, read_metadata, with_metadata
from tailorpo.models import ModelConfig
from tailorpo.run import Run


def model_folder(folder: Path, *, unet: dict[str, Any] | None = None, kind: str = "epsilon", index: Any = None) -> Path:
    """The JSON files of a model, without weights; Stable Diffusion 1.5's sizes unless told otherwise."""
    xl = "addition_embed_type" in (unet or {})
    contents: dict[str, Any] = {
        "model_index.json": {"_class_name": f"StableDiffusion{'XL' if xl else ''}Pipeline", **(index or {})},
        "unet/config.json": {"sample_size": 64, "layers_per_block": 2, "cross_attention_dim": 768, **(unet or {})},
        "vae/config.json": {"block_out_channels": [128, 256, 512, 512]},
        "scheduler/scheduler_config.json": {"prediction_type": kind},
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def metadata(folder: Path, *, family: str = "sd", **changes: Any) -> dict[str, str]:
    lora = {"rank": 4, "alpha": 2.0, "targets": "attention+conv"}
    run = Run.from_dict(settings(folder, model={"path": str(folder), "family": family, "lora": lora}, **changes))
    return lora_metadata(run, BaseModel.read(run.model), updates=3, alpha=4)


def test_what_people_and_programs_read_of_stable_diffusion_1(tmp_path: Path) -> None:
    found = metadata(model_folder(tmp_path / "private" / "sd15"), seed=7)
    expected = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        "ss_network_args": '{"conv_dim": "4", "conv_alpha": "4"}',
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_sd_model_name": "sd15",
        "ss_output_name": "sd15-TailorPO-brightness",
        "ss_resolution": "(512, 512)",
        "ss_seed": "7",
        "ss_steps": "3",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "sd15-TailorPO-brightness",
        "modelspec.resolution": "512x512",
        "modelspec.prediction_type": "epsilon",
        "tailorpo.version": __version__,
        "tailorpo.method": "TailorPO",
        "tailorpo.reward": "brightness",
        "tailorpo.updates": "3",
        "tailorpo.lora_rank": "4",
        "tailorpo.lora_alpha": "2",
        "tailorpo.guidance_scale": "2",
    }
    assert {key: found.get(key) for key in expected} == expected
    assert all(isinstance(value, str) for value in found.values())
    assert str(tmp_path) not in json.dumps(found)
    assert not {"modelspec.date", "modelspec.license", "ss_training_started_at"} & found.keys()


@pytest.mark.parametrize(
    ("unet", "kind", "kohya", "is_v2", "architecture"),
    [
        ({"cross_attention_dim": 1024}, "epsilon", "sd_v2", "True", "stable-diffusion-v2-512/lora"),
        ({"cross_attention_dim": 1024}, "v_prediction", "sd_v2_v", "True", "stable-diffusion-v2-768-v/lora"),
        (
            {"cross_attention_dim": 2048, "addition_embed_type": "text_time"},
            "epsilon",
            "sdxl_base_v1-0",
            "False",
            "stable-diffusion-xl-v1-base/lora",
        ),
    ],
)
def test_other_versions_by_the_names_of_kohya_and_modelspec(
    unet: dict[str, Any], kind: str, kohya: str, is_v2: str, architecture: str, tmp_path: Path
) -> None:
    family = "sdxl" if "addition_embed_type" in unet else "sd"
    found = metadata(model_folder(tmp_path, unet=unet, kind=kind), family=family)
    assert (found["ss_base_model_version"], found["ss_v2"]) == (kohya, is_v2)
    assert found["modelspec.architecture"] == architecture
    assert found["modelspec.prediction_type"] == ("v" if kind == "v_prediction" else "epsilon")


def test_a_model_of_its_own_kind_claims_to_be_none_of_the_known_ones() -> None:
    found = metadata(Path("emoji"))
    assert found["tailorpo.base_model"] == "emoji"
    assert found["tailorpo.resolution"] == "64x64"
    assert not [key for key in found if key.startswith("modelspec.") or key in ("ss_base_model_version", "ss_v2")]


def test_rewards_and_methods_are_named(tmp_path: Path) -> None:
    rewards = [{"name": "brightness", "weight": 0.5}, {"name": "jpeg_compressibility"}]
    found = metadata(model_folder(tmp_path), reward=rewards, algorithm={"name": "d3po"})
    assert found["tailorpo.reward"] == "0.5 brightness + 1 jpeg_compressibility"
    assert found["tailorpo.method"] == "D3PO"
    guided = {"name": "tailorpo", "train_steps": 2, "guidance": {"form": "sigma", "k": 1.0}}
    assert metadata(tmp_path, algorithm=guided)["tailorpo.method"] == "TailorPO-G"


def test_the_id_on_the_hub_is_kept_where_the_folder_knows_it(tmp_path: Path) -> None:
    cached = tmp_path / "models--some-one--sd--fine" / "snapshots" / "0123abc"
    assert BaseModel.read(ModelConfig(path=str(model_folder(cached)))).name == "some-one/sd--fine"
    saved = model_folder(tmp_path / "saved", index={"_name_or_path": "some-one/sd-1.5"})
    assert BaseModel.read(ModelConfig(path=str(saved))).hub_id == "some-one/sd-1.5"
    local = model_folder(tmp_path / "local", index={"_name_or_path": "/home/someone/sd"})
    assert BaseModel.read(ModelConfig(path=str(local))).hub_id is None
    assert BaseModel.read(ModelConfig(path=str(local))).name == "local"


@pytest.mark.parametrize(("width", "version", "side"), [(768, "sd_v1", 512), (1024, "sd_v2", 768)])
def test_a_single_file_has_the_sizes_of_its_layout(width: int, version: str, side: int, tmp_path: Path) -> None:
    file = tmp_path / "mix v1.5.safetensors"
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({name: torch.zeros(320, width)}, file)
    config = ModelConfig(path=str(file), prediction_type="v_prediction", size=None if version == "sd_v1" else side)
    found = BaseModel.read(config)
    assert (found.name, found.version, found.resolution) == ("mix v1.5", version, (side, side))
    assert found.prediction_type == "v_prediction"
    assert BaseModel.read(ModelConfig(path=str(file), family="sdxl", size=(640, 1024))).resolution == (1024, 640)


def test_the_licence_is_the_one_that_the_base_models_card_states(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    assert "tailorpo.base_model_licence" not in metadata(folder)
    (folder / "README.md").write_text("---\nlicense: creativeml-openrail-m\ntags: [x]\n---\n# A model\n")
    assert metadata(folder)["tailorpo.base_model_licence"] == "creativeml-openrail-m"
    for broken in ("# No front matter\n", "---\nlicense: [\n---\n", "---\n- a list\n---\n"):
        (folder / "README.md").write_text(broken)
        assert BaseModel.read(ModelConfig(path=str(folder))).licence is None


def test_a_base_model_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.path: there is no folder or file .*nowhere"):
        BaseModel.read(ModelConfig(path=str(tmp_path / "nowhere")))


TENSORS = {"a.lora_A.weight": torch.randn(3, 5), "b": torch.arange(7), "c": torch.randn(2, 2).half()}


def test_writing_metadata_leaves_every_bit_of_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(TENSORS, path, metadata={"old": "gone"})
    wanted = {"plain": "x", "umlaut": "\u00e4", "modelspec.sai_model_spec": "1.0.0"}
    path.write_bytes(with_metadata(path.read_bytes(), wanted))
    with safe_open(path, framework="pt") as file:
        found = file.metadata()
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert start % 8 == 0
    assert found == wanted | {"modelspec.hash_sha256": f"0x{hashlib.sha256(data[start:]).hexdigest()}"}
    assert found == read_metadata(path)
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        read_metadata(tmp_path / "none")
    (tmp_path / "text").write_text("a text that is no safetensors file")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        read_metadata(tmp_path / "text")


def test_the_same_metadata_gives_the_same_bytes_in_whatever_order_it_comes() -> None:
    """safetensors' own writer hashes its keys anew every time."""
    keys = [f"key{number}" for number in range(20)]
    orders = (keys, keys[::-1], keys)
    files = [with_metadata(save(TENSORS, dict.fromkeys(order, "old")), dict.fromkeys(order, "x")) for order in orders]
    assert files[0] == files[1] == files[2]
