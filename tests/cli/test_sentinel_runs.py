"""Runs with sentinels as people start them: training is not touched, alarms do what they say, resuming is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import processes as many
import pytest
from safetensors.torch import load_file
from tiny_run import outcome, refused, settings, tailorpo, write_recipe

# The judge falls exactly as the reward rises, and every fall is believed: from its best at update 1 the judge has
# fallen by update 3 at the latest.
QUICK = {"every": 1, "batch_size": 4, "rules": {"confidence": 0.6, "certain": 0.6, "confirm": 1, "fall": 0.0}}
CHANGES: dict[str, Any] = {
    "optimizer": {"lr": 0.05},
    "eval": {"seeds": 1, "prompts_seen": {"list": ["a cat", "a dog"]}, "judge": {"name": "tiny_run:darkness"}},
}


def recipe(folder: Path, model: Path, **sentinels: Any) -> Path:
    folder.mkdir(exist_ok=True)
    return write_recipe(folder, model, **CHANGES, sentinels={**QUICK, **sentinels})


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def timeless(run: Path) -> dict[str, Any]:
    """`outcome` without the seconds of the looks."""
    found = outcome(run)
    for row in found["metrics"]:
        row.get("sentinel", {}).pop("seconds", None)
    return found


def parameters(checkpoint: Path) -> dict[str, bytes]:
    tensors = load_file(checkpoint / "tensors.safetensors")
    return {name: each.numpy().tobytes() for name, each in tensors.items()}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Five updates under warnings; tests do not change it."""
    folder = tmp_path_factory.mktemp("watched")
    result = tailorpo("train", recipe(folder, tiny_folder), "updates=5", "--out", folder / "run")
    assert result.exit_code == 0, result.output
    assert "sentinels: hacking: the held-out judge has fallen below" in result.output
    assert "Sentinels" in result.output
    return folder / "run"


def first_alarm(watched: Path) -> tuple[int, int]:
    """At which update the alarm comes, and at which the judge was best before."""
    row = next(row for row in rows(watched) if row["sentinel"]["state"] == "hacking")
    assert row["sentinel"]["best"]["update"] < row["update"] < 5
    assert row["sentinel"]["alarms"] == ["fall"]  # kl_growth asks for a gain that two prompts cannot show
    return row["update"], row["sentinel"]["best"]["update"]


def test_looking_changes_nothing(watched: Path, tiny_folder: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, tiny_folder, **CHANGES)
    assert tailorpo("train", path, "updates=5", "--out", tmp_path / "run").exit_code == 0
    assert "sentinel" not in rows(tmp_path / "run")[0]
    ours, theirs = timeless(watched), timeless(tmp_path / "run")
    for row in ours["metrics"]:
        del row["sentinel"]  # nothing else is different, the counted forwards and pictures included
    for name in ("metrics", "lora", "eval"):
        assert ours[name] == theirs[name]
    page = (watched / "report.html").read_text()
    assert "Held-out judge against KL" in page
    assert "sentinels (5 looks)" in page
    assert 'id="sentinels"' not in (tmp_path / "run" / "report.html").read_text()


def test_stop_ends_early_with_an_evaluation_and_code_0(watched: Path, tiny_folder: Path, tmp_path: Path) -> None:
    at, _ = first_alarm(watched)
    result = tailorpo("train", recipe(tmp_path, tiny_folder, on_alarm="stop"), "updates=5", "--out", tmp_path / "run")
    assert result.exit_code == 0
    assert f"Its sentinels ended the training after update {at}: the held-out judge has fallen" in result.output
    assert [row["update"] for row in rows(tmp_path / "run")] == list(range(1, at + 1))
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["update"] == at
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"Its sentinels ended the training after update {at}" in page
    assert "is not finished" not in page
    # Going on has to be asked for.
    again = tailorpo("resume", tmp_path / "run", "updates=6")
    assert "the sentinels have ended this run" in again.output
    assert len(rows(tmp_path / "run")) == at
    further = tailorpo("resume", tmp_path / "run", "updates=5", "sentinels.on_alarm=warn")
    assert further.exit_code == 0, further.output
    ours, theirs = timeless(tmp_path / "run"), timeless(watched)
    assert [row["loss"] for row in ours["metrics"]] == [row["loss"] for row in theirs["metrics"]]
    assert ours["lora"] == theirs["lora"]


def test_rollback_restores_the_best_look_to_the_last_bit(watched: Path, tiny_folder: Path, tmp_path: Path) -> None:
    at, best = first_alarm(watched)
    assert best > 0
    path = recipe(tmp_path, tiny_folder, on_alarm="rollback")
    assert tailorpo("train", path, "updates=5", "--out", tmp_path / "run").exit_code == 0
    short = recipe(tmp_path / "short", tiny_folder)
    assert tailorpo("train", short, f"updates={best}", "--out", tmp_path / "short/run").exit_code == 0

    run, only = tmp_path / "run", tmp_path / "short/run"
    assert [row["update"] for row in rows(run)] == list(range(1, at + 1))
    assert rows(run)[-1]["sentinel"]["restored"] == best
    newest = f"update-{best:06d}"
    assert max(folder.name for folder in (run / "checkpoints").iterdir()) == newest
    assert parameters(run / "checkpoints" / newest) == parameters(only / "checkpoints" / newest)
    evaluations = [json.loads((each / "eval.json").read_text()) for each in (run, only)]
    assert evaluations[0]["groups"] == evaluations[1]["groups"]
    assert evaluations[0]["update"] == best
    loras = [load_file(each / "lora/pytorch_lora_weights.safetensors") for each in (run, only)]
    assert all(loras[0][name].equal(loras[1][name]) for name in loras[1])
    assert f"Kept are the weights of update {best}" in (run / "report.html").read_text()


def test_a_judge_that_never_rises_rolls_back_to_the_base(tiny_folder: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, tiny_folder, on_alarm="rollback", every=2)
    result = tailorpo("train", path, "updates=4", "checkpoint_every=2", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert rows(tmp_path / "run")[-1]["sentinel"]["restored"] == 0
    assert "Kept are the weights of the base model" in result.output
    saved = parameters(tmp_path / "run/checkpoints/update-000000")
    assert not [name for name in saved if name.startswith("optimizer/")]
    for row in json.loads((tmp_path / "run" / "eval.json").read_text())["groups"]["all"]["metrics"].values():
        assert row is None or row["difference"] == 0


def test_raise_beta_ties_the_updates_after_the_alarm(watched: Path, tiny_folder: Path, tmp_path: Path) -> None:
    at, _ = first_alarm(watched)
    path = recipe(tmp_path, tiny_folder, on_alarm="raise_beta", beta_raise=3.0)
    assert tailorpo("train", path, "updates=5", "--out", tmp_path / "run").exit_code == 0
    ours, theirs = rows(tmp_path / "run"), rows(watched)
    assert ours[at - 1]["sentinel"]["beta_factor"] == 3.0
    same = [a["loss"] == b["loss"] for a, b in zip(ours, theirs, strict=True)]
    assert same == [True] * at + [False] * (5 - at)
    state = json.loads((tmp_path / "run/checkpoints/update-000005/state.json").read_text())
    assert state["memory"]["beta_factor"][0] >= 3.0


@pytest.mark.parametrize("on_alarm", ["warn", "stop", "rollback", "raise_beta"])
def test_an_interrupted_run_comes_to_the_same(tiny_folder: Path, tmp_path: Path, on_alarm: str) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    path = recipe(tmp_path, tiny_folder, on_alarm=on_alarm)
    assert tailorpo("train", path, "updates=4", "--out", whole).exit_code == 0
    assert tailorpo("train", path, "updates=2", "--out", parts).exit_code == 0
    assert tailorpo("resume", parts, "updates=4").exit_code == 0
    assert timeless(whole) == timeless(parts)


def test_two_processes_see_what_one_sees(tiny_folder: Path, tmp_path: Path) -> None:
    """The base to the last bit; the look after an update up to the order of one sum of gradients."""
    data = settings(tiny_folder, **CHANGES, sentinels={**QUICK, "batch_size": 2}, batch={"trajectories": 4, "micro": 2})
    data |= {"updates": 1, "optimizer": {"lr": 1e-12}}
    for count in (1, 2):
        ended = many.run(count, tmp_path / str(count), many.training, data, tmp_path / str(count) / "run")
        assert [each.exit_code for each in ended] == [0] * count, ended
    one, two = (rows(tmp_path / str(count) / "run")[0]["sentinel"] for count in (1, 2))
    assert one["cost"] == two["cost"]
    for name, measure in one["measures"].items():
        assert two["measures"][name] == pytest.approx(measure, rel=1e-4, abs=1e-6)
        assert two["measures"][name]["base"] == measure["base"]


def test_a_judge_that_is_missing_is_said_before_anything_is_loaded(tiny_folder: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, tiny_folder, sentinels={"judge": {"name": "pickscore", "path": "nowhere"}})
    assert "sentinels.judge" in refused("train", path, "--out", tmp_path / "run")
