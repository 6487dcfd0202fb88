"""Guidance through the commands: k goes down over the updates, also when they come in two parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_run import outcome, refused, tailorpo, write_recipe

GUIDED = {
    "name": "tailorpo",
    "train_steps": 2,
    "guidance": {"form": "sigma", "k": 2.0, "corrected_beta": True, "anneal": {"to": 0.5, "over": 3}},
}


def test_an_annealed_run_resumes_to_the_same_bits(tmp_path: Path, tiny_folder: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_folder, algorithm=GUIDED, updates=4)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert tailorpo("train", recipe, "--out", whole).exit_code == 0
    assert tailorpo("train", recipe, "updates=2", "--out", halves).exit_code == 0
    assert tailorpo("resume", halves, "updates=4").exit_code == 0
    sizes = [json.loads(line)["guidance_size"] for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert sizes == pytest.approx([2.0, 1.5, 1.0, 0.5], rel=1e-3)
    assert outcome(whole)["lora"] == outcome(halves)["lora"]
    assert outcome(whole)["metrics"] == outcome(halves)["metrics"]


def test_mistakes_are_said_together(tmp_path: Path, tiny_folder: Path) -> None:
    guidance = {"form": "sigma", "corrected_beta": True}
    wrong = {"name": "tailorpo", "labels": "soft", "guidance": guidance}
    message = refused("train", write_recipe(tmp_path, tiny_folder, algorithm=wrong))
    assert "needs algorithm.tau" in message
    assert "is for hard labels" in message
    message = refused(
        "train", write_recipe(tmp_path, tiny_folder, algorithm=GUIDED), "algorithm.guidance.anneal.over=0"
    )
    assert "at least 1, got 0" in message
