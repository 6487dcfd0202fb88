"""SDXL and full fine-tuning through the commands: train, stop, resume, sample, evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from tiny import ZERO_SNR, save_tiny_model, save_tiny_taesd, save_tiny_xl_model
from tiny_run import refused, tailorpo, write_recipe

from tailorpo.run import Run

GUIDED = {"name": "tailorpo", "train_steps": 2, "guidance": {"form": "sigma", "k": 0.5}}


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def train(recipe: Path, out: Path, *overrides: str) -> None:
    result = tailorpo("train", recipe, *overrides, "--out", out)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("algorithm", [{"name": "tailorpo", "train_steps": 2}, GUIDED])
def test_a_round_on_sdxl(algorithm: dict[str, Any], tmp_path: Path) -> None:
    model = {
        "family": "sdxl",
        "path": str(save_tiny_xl_model(tmp_path / "model")),
        "lora": {"rank": 2},
        "tiny_vae": str(save_tiny_taesd(tmp_path / "taesd")),
        "size": [16, 24],
        "gradient_checkpointing": True,
    }
    recipe = write_recipe(tmp_path, "", model=model, algorithm=algorithm, updates=2)
    train(recipe, tmp_path / "run")
    first, second = metrics(tmp_path / "run")
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-6)  # log 2: policy and reference are one
    assert second["grad_norm"] > 0
    result = tailorpo("sample", tmp_path / "run", "--prompts", "a cat", "--count", "1", "--out", tmp_path / "pictures")
    assert result.exit_code == 0, result.output
    lora = ["sample", tmp_path / "model", "--lora", tmp_path / "run" / "lora", "--prompts", "a cat", "--steps", "4"]
    assert tailorpo(*lora, "--count", "1", "--out", tmp_path / "other").exit_code == 0
    assert tailorpo("eval", tmp_path / "run").exit_code == 0


def test_a_round_from_pure_noise(tmp_path: Path) -> None:
    """Zero terminal SNR: step 0 has alpha 0 and is trained, inline and from a buffer."""
    folder = save_tiny_model(tmp_path / "model", **ZERO_SNR)
    for update in ("inline", "buffered"):
        algorithm: dict[str, Any] = {"name": "tailorpo", "train_steps": [0, 2], "update": update, "accumulate": 2}
        algorithm["step_weights"] = "normalised"
        (tmp_path / update).mkdir()
        train(write_recipe(tmp_path / update, folder, algorithm=algorithm, updates=2), tmp_path / update / "run")
        first, second = metrics(tmp_path / update / "run")
        assert first["loss"] == pytest.approx(0.6931472, abs=1e-6)
        assert second["grad_norm"] > 0


def test_full_fine_tuning_trains_resumes_bit_for_bit_and_is_drawn_with(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    model = {"path": str(folder), "lora": None, "full": True, "dtype": "bfloat16"}
    recipe = write_recipe(tmp_path, "", model=model, algorithm=GUIDED)
    train(recipe, tmp_path / "whole", "updates=3")
    train(recipe, tmp_path / "parts", "updates=1")
    assert tailorpo("resume", tmp_path / "parts", "updates=3").exit_code == 0
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    names = {f"checkpoints/update-000003/{name}" for name in ("tensors.safetensors",)}
    for name in (*names, "unet/diffusion_pytorch_model.safetensors"):
        one, other = (load_file(tmp_path / run / name) for run in ("whole", "parts"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    assert not (tmp_path / "whole" / "lora").exists()

    first, *_ = metrics(tmp_path / "whole")
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-6)
    base = UNet2DConditionModel.from_pretrained(str(folder / "unet")).state_dict()
    # The folder is diffusers' own, and every weight has moved.
    pipe: Any = StableDiffusionPipeline.from_pretrained(
        str(folder), unet=UNet2DConditionModel.from_pretrained(str(tmp_path / "whole" / "unet")), safety_checker=None
    )
    trained = pipe.unet.state_dict()
    assert trained.keys() == base.keys()
    assert {key for key in base if torch.equal(trained[key], base[key].bfloat16().float())} == set()

    for extra, out in ((), "aligned"), (("--base",), "base"):
        command = ["sample", tmp_path / "whole", "--prompts", "a cat", "--count", "1", *extra, "--out", tmp_path / out]
        assert tailorpo(*command).exit_code == 0
    pictures = [(tmp_path / out / "001-a-cat-1.png").read_bytes() for out in ("aligned", "base")]
    assert pictures[0] != pictures[1]
    assert tailorpo("eval", tmp_path / "whole").exit_code == 0
    assert "nothing" not in json.dumps(json.loads((tmp_path / "whole" / "eval.json").read_text())["groups"])


def test_what_cannot_be_trained_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    folder = save_tiny_xl_model(tmp_path / "model")
    recipe = write_recipe(tmp_path, folder)
    out = ["--out", tmp_path / "run"]
    assert "set model.family: sdxl" in refused("train", recipe, *out)
    assert "with full: true say lora: null" in refused("train", recipe, "model.family=sdxl", "model.full=true", *out)
    nothing = refused("train", recipe, "model.family=sdxl", "model.lora=null", *out)
    assert "or model.full: true to train the whole network" in " ".join(nothing.split())
    missing = refused("show", recipe, "model.family=sdxl", "model.tiny_vae=nowhere", "model.vae_path=elsewhere")
    assert "model.tiny_vae: there is no folder nowhere" in missing
    assert "model.vae_path: there is no folder elsewhere" in missing


def test_the_list_of_models_names_every_family() -> None:
    output = tailorpo("models").output
    for words in ("emoji", "Stable Diffusion 1.x or 2.x", "Stable Diffusion XL base", "file.safetensors", "a hub id"):
        assert words in output


RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("sd*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipes_for_real_models_are_sound_but_for_their_downloads(recipe: Path) -> None:
    run = Run.load(recipe, files=False)
    missing = run.missing()
    assert missing[0].startswith("model.path: there is no folder or file models/")
    wanted = {entry.reward.name for entry in run.reward} - {"jpeg_compressibility"}
    assert {line.split(": ")[1] for line in missing[1:]} == wanted
    assert all("hf download" in line or "curl" in line for line in missing[1:])
