"""Making a data set with `tailorpo pairs` and training on it, as people type it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import refused, tailorpo, write_recipe

from tailorpo.images import load_png
from tailorpo.rewards import Brightness
from tailorpo.run import Run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A folder with a recipe and six pairs drawn for it; tests do not change it."""
    folder = tmp_path_factory.mktemp("made")
    algorithm = {"name": "diffusion_dpo", "pairs": str(folder / "data" / "pairs.jsonl")}
    recipe = write_recipe(folder, tiny_folder, algorithm=algorithm)
    result = tailorpo("pairs", recipe, "--count", "2", "--out", folder / "data")
    assert result.exit_code == 0, result.output
    assert f"6 pairs: {folder / 'data' / 'pairs.jsonl'}" in result.output
    return folder


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_brighter_picture_wins(made: Path) -> None:
    pairs = rows(made / "data" / "pairs.jsonl")
    assert [pair["prompt"] for pair in pairs] == ["a cat", "a cat", "a dog", "a dog", "a horse", "a horse"]
    score = Brightness().load("cpu")
    for pair in pairs:
        images = torch.stack([load_png(made / "data" / pair[side]) for side in ("winner", "loser")])
        rewards = score(images, [pair["prompt"]] * 2)
        assert rewards.tolist() == pytest.approx([pair["reward_winner"], pair["reward_loser"]], abs=1e-6)
        assert rewards[0] > rewards[1]
    assert (made / "data" / "contact_sheet.png").is_file()
    assert Run.load(made / "data" / "recipe.yaml") == Run.load(made / "recipe.yaml")


def test_a_pair_depends_on_seed_prompt_and_number_alone(made: Path, tmp_path: Path) -> None:
    assert tailorpo("pairs", made / "recipe.yaml", "--prompts", "a horse", "--count", "1", "--out", tmp_path / "one")
    (pair,) = rows(tmp_path / "one" / "pairs.jsonl")
    whole = rows(made / "data" / "pairs.jsonl")[4]
    for side in ("winner", "loser"):
        difference = load_png(tmp_path / "one" / pair[side]) - load_png(made / "data" / whole[side])
        assert float(difference.abs().max()) <= 1 / 255
    tailorpo("pairs", made / "recipe.yaml", "seed=1", "--prompts", "a horse", "--count", "1", "--out", tmp_path / "two")
    (other,) = rows(tmp_path / "two" / "pairs.jsonl")
    assert other["reward_winner"] != pair["reward_winner"]


def test_mistakes_end_with_a_message_and_code_2(made: Path, tmp_path: Path) -> None:
    assert "exists; choose another folder" in refused("pairs", made / "recipe.yaml", "--out", made / "data")
    assert "there is no such file" in refused("pairs", "nowhere.yaml")
    assert "an empty prompt" in refused("pairs", made / "recipe.yaml", "--prompts", " ", "--out", tmp_path)
    bad = tmp_path / "pairs.jsonl"
    bad.write_text('{"prompt": "a cat", "winner": "a.png", "loser": "b.png"}\n{"prompt": "a cat"\n')
    output = refused("train", made / "recipe.yaml", f"algorithm.pairs={bad}", "updates=0", "--out", tmp_path / "run")
    assert "4 mistakes" in output
    assert f"{bad}: line 1: winner: there is no picture {tmp_path / 'a.png'}" in output
    assert f"{bad}: line 1: loser: there is no picture {tmp_path / 'b.png'}" in output
    assert f"{bad}: line 2: not JSON" in output
    assert "updates" in output
    output = refused("train", made / "recipe.yaml", "model.lora=null", "--out", tmp_path / "run")
    assert "there is none" in output
    assert not (tmp_path / "run").exists()


def test_torn_pictures_stop_a_run_before_it_begins(made: Path, tmp_path: Path) -> None:
    winner, loser = (made / "data" / rows(made / "data" / "pairs.jsonl")[0][side] for side in ("winner", "loser"))
    (tmp_path / "torn.png").write_bytes(loser.read_bytes()[:100])
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "a cat", "winner": str(winner), "loser": "torn.png"}))
    output = refused("train", made / "recipe.yaml", f"algorithm.pairs={pairs}", "--out", tmp_path / "run")
    assert f"line 1: cannot read the picture {tmp_path / 'torn.png'}" in output
    assert not (tmp_path / "run").exists()


def test_show_counts_pairs(made: Path) -> None:
    lines = [" ".join(line.split()) for line in tailorpo("show", made / "recipe.yaml").output.splitlines()]
    assert "Cost; a random time for each pair" in lines
    assert any(line.startswith("guided forwards 2 4 12 ") for line in lines)
    assert any(line.startswith("backwards 1 2 6 ") for line in lines)
    assert any(line.startswith("reward queries 0 0 0 ") for line in lines)
    unguided = tailorpo("show", made / "recipe.yaml", "sampler.guidance_scale=1.0").output
    assert "guided forwards 4 8 24 " in " ".join(unguided.split())


def test_training_on_them_and_a_resume_that_is_equal_to_the_bit(made: Path, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert tailorpo("train", made / "recipe.yaml", "updates=4", "--out", whole).exit_code == 0
    assert tailorpo("train", made / "recipe.yaml", "updates=2", "--out", halves).exit_code == 0
    assert tailorpo("resume", halves, "updates=4").exit_code == 0
    lora = "lora/pytorch_lora_weights.safetensors"
    assert (whole / lora).read_bytes() == (halves / lora).read_bytes()
    first, second = (
        [{name: value for name, value in row.items() if name != "seconds"} for row in rows(run / "metrics.jsonl")]
        for run in (whole, halves)
    )
    assert first == second
    assert first[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert first[0]["accuracy"] == 0.5
    assert first[0]["error_winner"] == first[0]["error_winner_reference"] > 0
    assert [row["forwards"] for row in first] == [4, 8, 12, 16]
    assert first[-1]["loss"] != first[0]["loss"]
    assert all(row["reward_final"] is None and row["by_step"] == [] and row["reward_queries"] == 0 for row in first)
    assert (whole / "report.html").is_file()
