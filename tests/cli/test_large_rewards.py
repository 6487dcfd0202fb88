"""HPSv3, OCR and the vision judge from the command line, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from judge_server import judge_server, received
from tiny_qwen import save_tiny_hpsv3
from tiny_run import refused, tailorpo, write_recipe


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_training_with_a_judge_on_a_server(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with judge_server() as server:
        server.reply = lambda body, number: (
            "I would rather not" if number % 5 == 0 else f"{1 + 9 * float(received(body)[0].mean()):.4f}"
        )
        reward = {"name": "vision_judge", "url": server.url, "model": "tiny-vl", "retries": 0, "weight": 50.0}
        recipe = write_recipe(tmp_path, tiny_folder, updates=2, reward=reward, on_invalid_reward="skip")
        run = tmp_path / "run"
        result = tailorpo("train", recipe, "--out", run)
        assert result.exit_code == 0, result.output
        training = rows(run)[-1]["reward_queries"]
        assert len(server.asked) > training > 0
        assert {body["model"] for body in server.asked} == {"tiny-vl"}
        assert sum(row["invalid"] for row in rows(run)) > 0
        assert all(0 <= row["reward_winner"] <= 50 for row in rows(run))
    message = refused("train", recipe, "--out", tmp_path / "again")
    assert "no answer from" in message
    assert "ConnectionRefusedError" in message


def test_guidance_by_the_gradient_of_hpsv3(tmp_path: Path, tiny_folder: Path) -> None:
    folder = tmp_path / "hpsv3"
    folder.mkdir()
    recipe = write_recipe(
        tmp_path,
        tiny_folder,
        updates=1,
        algorithm={"name": "tailorpo", "train_steps": 1, "guidance": {"form": "sigma"}},
        reward={"name": "hpsv3", "path": str(folder)},
        batch={"trajectories": 1, "micro": 1},
        eval={"seeds": 1, "prompts_seen": {"list": ["a cat"]}},
    )
    assert "hf download MizzenAI/HPSv3 HPSv3.safetensors" in refused("train", recipe, "--out", tmp_path / "run")
    save_tiny_hpsv3(folder)
    result = tailorpo("train", recipe, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert rows(tmp_path / "run")[0]["pairs"] == 1


def test_ocr_needs_prompts_with_a_text(tmp_path: Path, tiny_folder: Path) -> None:
    pytest.importorskip("rapidocr")
    recipe = write_recipe(tmp_path, tiny_folder, reward={"name": "ocr"})
    assert "has no text in double quotes" in refused("train", recipe, "--out", tmp_path / "run")
    assert "this reward is not differentiable" in refused("train", recipe, "algorithm.guidance={form: sigma}")


def test_the_list_of_rewards_shows_brackets_as_they_are() -> None:
    shown = "".join(tailorpo("rewards").output.split())
    assert "tailorpo[ocr]" in shown
