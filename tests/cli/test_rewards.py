"""Rewards with files to fetch, through the whole command: refused with what is missing, and trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_rewards import save_tiny_clip, save_tiny_image_reward, shrink_image_reward
from tiny_run import refused, tailorpo, write_recipe


def test_a_folder_that_is_not_filled_is_refused_before_anything_is_loaded(tmp_path: Path, tiny_folder: Path) -> None:
    rewards = [{"name": "hpsv2", "path": str(tmp_path), "version": "2.0"}, {"name": "clip_score", "path": "nowhere"}]
    recipe = write_recipe(tmp_path, tiny_folder, reward=rewards, eval={"judge": {"name": "pickscore", "path": "no"}})
    for output in (refused("show", recipe), refused("train", recipe, "--out", tmp_path / "run")):
        assert f"hpsv2: hf download xswu/HPSv2 HPS_v2_compressed.pt --local-dir {tmp_path}" in output
        assert f"laion/CLIP-ViT-H-14-laion2B-s32B-b79K tokenizer.json --local-dir {tmp_path}   (2 MB; MIT)" in output
        assert "clip_score: hf download openai/clip-vit-base-patch32 config.json" in output
        assert "pickscore: hf download yuvalkirstain/PickScore_v1 config.json" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["clip_score", "image_reward"])
def test_training_along_the_gradient_of_a_reward_with_weights(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shrink_image_reward(monkeypatch)
    folder = save_tiny_clip(tmp_path / "reward")
    save_tiny_image_reward(folder)
    guided = {"name": "tailorpo", "train_steps": 2, "guidance": {"form": "sigma"}}
    recipe = write_recipe(
        tmp_path, tiny_folder, reward={"name": name, "path": str(folder)}, algorithm=guided, updates=1
    )
    result = tailorpo("train", recipe, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    (line,) = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line["reward_winner"] > line["reward_loser"]


def test_a_value_that_a_reward_does_not_know(tmp_path: Path, tiny_folder: Path) -> None:
    for reward in ({"name": "hpsv2", "version": "3"}, {"name": "clip_score", "convention": "cos"}):
        output = refused("show", write_recipe(tmp_path, tiny_folder, reward={**reward, "path": "."}))
        assert list(reward)[1] in output
