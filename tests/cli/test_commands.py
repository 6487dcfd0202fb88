"""The commands as people type them: what they print, write and return."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_run import outcome, refused, tailorpo, write_recipe

from tailorpo import __version__
from tailorpo.images import load_png
from tailorpo.run import Run

RECIPES = Path(__file__).parents[2] / "recipes"
COMMANDS = ("train", "resume", "sample", "eval", "report", "export", "show", "serve-reward", "rewards", "models")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A finished run of two updates; tests do not change it."""
    folder = tmp_path_factory.mktemp("finished")
    result = tailorpo("train", write_recipe(folder, tiny_folder), "updates=2", "--out", folder / "run")
    assert result.exit_code == 0, result.output
    assert f"report: {(folder / 'run').resolve() / 'report.html'}" in result.output
    assert re.search(r"update 2/2 +reward [\d.]+ +loss 0\.69", result.output)
    assert "brightness (trained)" in result.output
    return folder / "run"


def test_help_lists_every_command_and_each_has_its_own_with_an_example() -> None:
    output = tailorpo("--help").output
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", output, re.MULTILINE)
        own = tailorpo(command, "--help")
        assert own.exit_code == 0
        assert command in ("rewards", "models") or f"tailorpo {command} " in own.output.partition("Example")[2]
    assert "--install-completion" in output


def test_version() -> None:
    assert tailorpo("--version").output.strip() == f"tailorpo {__version__}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["train"], "Missing argument 'RECIPE'"),
        (["train", "nowhere.yaml"], "nowhere.yaml: 1 mistake\n  - there is no such file"),
        (["train", "nowhere.yaml", "--frob"], "No such option"),
        (["resume", "nowhere"], "nowhere is not a run directory: there is no such folder"),
        (["eval", "nowhere"], "nowhere is not a run directory"),
        (["report", "nowhere"], "nowhere is not a run directory"),
        (["show", "nowhere"], "there is no such file"),
        (["sample", "nowhere", "--prompts", "a cat"], "there is no folder or file nowhere"),
        (["sample", "emoji"], "Missing option '--prompts'"),
        (["sample", "emoji", "--prompts", " "], "--prompts: an empty prompt"),
        (["sample", "emoji", "--prompts", "nowhere.txt"], "prompt file nowhere.txt: there is no such file"),
        (["sample", "emoji", "--prompts", "a cat", "--count", "0"], "Invalid value for '--count'"),
        (["sample", "emoji", "--prompts", "a cat", "--base", "--lora", "x"], "--base and --lora exclude each other"),
        (["sample", "emoji", "--prompts", "a cat", "--lora", "x"], "there is no readable LoRA at x"),
    ],
)
def test_mistakes_end_with_a_message_and_code_2(arguments: list[str], message: str) -> None:
    assert message in refused(*arguments)


def test_a_process_prints_no_traceback_and_help_is_quick() -> None:
    done = subprocess.run([sys.executable, "-m", "tailorpo", "train", "no.yaml"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: no.yaml: 1 mistake\n  - there is no such file\n"
    code = "import sys, tailorpo.cli; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_closed_pipe_is_no_error_to_shout_about() -> None:
    command = f"{sys.executable} -m tailorpo show {RECIPES / 'emoji_tailorpo.yaml'} | head -n 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.stdout.startswith("# every setting of this run")
    assert done.stderr == ""


def test_show_prints_settings_cost_and_path(tmp_path: Path, tiny_folder: Path) -> None:
    result = tailorpo("show", write_recipe(tmp_path, tiny_folder), "sampler.steps=20", "algorithm.train_steps=5")
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert "steps: 20" in lines
    # 20 + 2 * 5 guided forwards for a trajectory, 2 trajectories an update, 3 updates
    assert any(line.startswith("guided forwards 30 60 180 ") for line in lines)
    assert any(line.startswith("backwards 5 10 30 ") for line in lines)
    for file in ("train", "rollout", "policy", "gaussian_step", "algorithms/tailorpo", "models/sd", "rewards/colour"):
        assert any(re.fullmatch(rf"tailorpo/{file}\.py \d+", line) for line in lines), file
    total = int(re.search(r"of one step: \d+, ([\d,]+) lines", result.output)[1].replace(",", ""))  # type: ignore[index]
    assert 1000 < total < 5000


def test_show_says_what_the_recipe_for_sd15_lacks() -> None:
    output = refused("show", RECIPES / "sd15_aesthetic_tailorpo_g.yaml")
    assert "guidance_scale: 5.0" in output
    assert "the settings are sound, but to train this is missing" in output
    assert "model.path: there is no folder or file models/stable-diffusion-v1-5" in output
    assert re.search(
        r"reward: aesthetic: hf download openai/clip-vit-large-patch14 .* --local-dir models/aesthetic", output
    )
    assert re.search(r"reward: aesthetic: curl -L .* -o models/aesthetic/sac\+logos\+ava1-l14-linearMSE\.pth", output)


def test_show_takes_a_run_too(finished: Path) -> None:
    assert "updates: 2" in tailorpo("show", finished).output


def test_rewards_and_models_are_listed() -> None:
    output = tailorpo("rewards").output
    assert re.search(r"jpeg_compressibility +no ", output)
    assert re.search(r"brightness +yes ", output)
    assert "package.module:attribute" in output
    assert (
        "# hpsv2: 2.0 GB; licence: Apache-2.0\n  hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir DIR"
        in output
    )
    assert re.search(r"sd +emoji +bundled.*\d MB", tailorpo("models").output)


def test_training_leaves_every_file(finished: Path) -> None:
    files = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    assert {
        "run.yaml",
        "metrics.jsonl",
        "eval.json",
        "report.html",
        "lora/pytorch_lora_weights.safetensors",
        "checkpoints/update-000002/manifest.json",
        "samples/eval/side_by_side.png",
    } <= files
    assert not [name for name in files if "tmp" in name]
    metrics = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in metrics] == [1, 2]
    # 2 trajectories, 4 steps and 2 trained ones; the finished pictures cost no candidate
    assert metrics[0]["forwards"] == 2 * Run.load(finished / "run.yaml").algorithm.cost(4, (1, 3)).forwards


def test_a_run_is_not_overwritten(finished: Path, tmp_path: Path, tiny_folder: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    output = refused("train", write_recipe(tmp_path, tiny_folder), "--out", finished)
    assert "already holds a run: continue it with `tailorpo resume" in output
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_the_default_folder_is_named_after_the_recipe(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = tailorpo("train", write_recipe(tmp_path, tiny_folder), "updates=1", "eval.prompts_seen.list=[a cat]")
    assert result.exit_code == 0, result.output
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"recipe-\d{8}-\d{6}", folder.name)


def test_resuming_a_finished_run_extends_it_or_says_how(tmp_path: Path, tiny_folder: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_folder)
    assert tailorpo("train", recipe, "updates=1", "--out", tmp_path / "a").exit_code == 0
    output = tailorpo("resume", tmp_path / "a").output
    assert "All 1 updates are done" in output
    assert "updates=2" in output
    assert tailorpo("resume", tmp_path / "a", "updates=2").exit_code == 0
    assert "has made 2 updates already" in refused("resume", tmp_path / "a", "updates=1")
    assert "`seed` cannot change" in refused("resume", tmp_path / "a", "seed=3", "updates=5")
    assert "did you mean `updates`" in refused("resume", tmp_path / "a", "update=5")
    assert Run.load(tmp_path / "a" / "run.yaml").updates == 2

    assert tailorpo("train", recipe, "updates=2", "--out", tmp_path / "b").exit_code == 0
    for name in ("lora/pytorch_lora_weights.safetensors", "checkpoints/update-000002/tensors.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_eval_and_report_write_again(finished: Path, tmp_path: Path) -> None:
    before = json.loads((finished / "eval.json").read_text())
    (finished / "report.html").unlink()
    assert tailorpo("report", finished).exit_code == 0
    assert (finished / "report.html").exists()
    result = tailorpo("eval", finished)
    assert result.exit_code == 0, result.output
    after = json.loads((finished / "eval.json").read_text())
    assert after["groups"] == before["groups"]  # the LoRA that was saved is the one that was trained


def test_sampling_depends_on_seed_prompt_and_number_alone(finished: Path, tiny_folder: Path, tmp_path: Path) -> None:
    def sample(source: Path, out: str, *options: str | Path) -> Path:
        result = tailorpo("sample", source, "--steps", "3", "--out", tmp_path / out, *options)
        assert result.exit_code == 0, result.output
        assert str(tmp_path / out / "contact_sheet.png") in result.output
        return tmp_path / out

    a = sample(finished, "a", "--prompts", "a cat", "--prompts", "a dog!", "--count", "2")
    assert sorted(path.name for path in a.iterdir()) == [
        "001-a-cat-1.png",
        "001-a-cat-2.png",
        "002-a-dog-1.png",
        "002-a-dog-2.png",
        "contact_sheet.png",
    ]
    words = tmp_path / "words.txt"
    words.write_text("a dog!\n")
    b = sample(finished, "b", "--prompts", words, "--count", "1")
    assert (load_png(b / "001-a-dog-1.png") - load_png(a / "002-a-dog-1.png")).abs().max() <= 1 / 255
    assert not (load_png(a / "001-a-cat-1.png") == load_png(a / "001-a-cat-2.png")).all()
    # The run's own LoRA, the same by its folder on the bare model, and none.
    scale = ("--guidance-scale", "2")
    c = sample(tiny_folder, "c", "--prompts", "a cat", "--lora", finished / "lora", *scale)
    assert (load_png(c / "001-a-cat-1.png") - load_png(a / "001-a-cat-1.png")).abs().max() <= 1 / 255
    base = sample(finished, "base", "--prompts", "a cat", "--base")
    bare = sample(tiny_folder, "bare", "--prompts", "a cat", *scale)
    assert (base / "001-a-cat-1.png").read_bytes() == (bare / "001-a-cat-1.png").read_bytes()


def test_sampling_from_a_run_without_a_lora_says_so(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes((finished / "run.yaml").read_bytes())
    assert "has no LoRA yet" in refused("sample", tmp_path, "--prompts", "a cat")
    assert "has no LoRA yet" in refused("eval", tmp_path)


def test_a_lora_of_another_kind_is_refused(finished: Path, tmp_path: Path, tiny_folder: Path) -> None:
    path = tmp_path / "pytorch_lora_weights.safetensors"
    path.write_bytes(b"not one")
    assert "there is no readable LoRA" in refused(
        "sample", tiny_folder, "--prompts", "a cat", "--lora", tmp_path, "--out", tmp_path
    )
    assert load_file(finished / "lora" / path.name)


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tailorpo.train import Session

    real = Session.update

    def update(self: Session, number: int) -> object:
        if number == 1:
            raise KeyboardInterrupt
        return real(self, number)

    monkeypatch.setattr(Session, "update", update)
    result = tailorpo("train", write_recipe(tmp_path, tiny_folder), "--out", tmp_path / "run")
    assert result.exit_code == 130
    assert f"stopped; go on with `tailorpo resume {tmp_path / 'run'}`" in result.output
    monkeypatch.undo()
    assert tailorpo("resume", tmp_path / "run").exit_code == 0


def test_a_run_that_does_not_finish_its_pictures_trains_the_same(tmp_path: Path, tiny_folder: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_folder)
    for finish in ("true", "false"):
        settings = ("algorithm.train_steps=[0, 1]", f"algorithm.finish={finish}")
        result = tailorpo("train", recipe, *settings, "--out", tmp_path / finish)
        assert result.exit_code == 0, result.output
        assert (tmp_path / finish / "report.html").is_file()
    whole, cut = (outcome(tmp_path / finish) for finish in ("true", "false"))
    assert whole["lora"] == cut["lora"]
    last, shorter = whole["metrics"][-1], cut["metrics"][-1]
    assert "reward_final" in last
    assert "reward_final" not in shorter
    # Two trajectories of three updates: one evaluation less (step 3's; step 2's is a candidate's), one query less.
    assert last["forwards"] - shorter["forwards"] == 6 == last["reward_queries"] - shorter["reward_queries"]
    assert all(last[name] == shorter[name] for name in ("loss", "gap", "kl", "by_step"))


def test_an_update_in_which_nothing_may_train_leaves_the_weights_alone(tmp_path: Path, tiny_folder: Path) -> None:
    """Every pair of the later updates is beyond the mask; Adam would coast on its momentum."""
    algorithm = {"name": "tailorpo", "train_steps": 2, "kl_mask": 1e-9}
    recipe = write_recipe(tmp_path, tiny_folder, algorithm=algorithm, optimizer={"lr": 1e-2, "weight_decay": 0.1})
    assert tailorpo("train", recipe, "--out", tmp_path / "run").exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["grad_norm"] > 0 for row in rows] == [True, False, False]
    kept = [
        load_file(tmp_path / "run" / "checkpoints" / f"update-00000{update}" / "tensors.safetensors")
        for update in (1, 2, 3)
    ]
    assert any(tensor.abs().max() > 0 for name, tensor in kept[0].items() if "lora_B" in name and "param" in name)
    for later in kept[1:]:
        assert later.keys() == kept[0].keys()
        assert all((later[name] == tensor).all() for name, tensor in kept[0].items())


def test_tensorboard_gets_every_update(tmp_path: Path, tiny_folder: Path) -> None:
    pytest.importorskip("tensorboard")
    recipe = write_recipe(tmp_path, tiny_folder, trackers=["tensorboard"])
    result = tailorpo("train", recipe, "updates=1", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert list((tmp_path / "run" / "trackers").rglob("events.out.tfevents.*"))


def test_an_unknown_device_is_refused(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILORPO_DEVICE", "cpu")  # restored afterwards; --device sets it
    recipe = write_recipe(tmp_path, tiny_folder)
    for device, message in (("gpu", "device 'gpu' is not one that torch knows"), ("meta", "'meta' is not available")):
        assert message in refused("train", recipe, "--out", tmp_path / device, "--device", device)
        assert not (tmp_path / device).exists()


def test_the_terminal_display_shows_reward_and_time_left() -> None:
    from rich.console import Console

    from tailorpo.progress import display, duration, sparkline

    console = Console(force_terminal=True, width=100, record=True)
    with display(console, total=4) as shown:
        shown.phase("loading [the model]")
        shown.step(1, 2)
        shown.phase("training")
        shown.step(1, 4)
        for update in (1, 2):
            shown.update({"update": update, "reward_mean": update / 2, "loss": 0.69, "kl": None, "seconds": 30.0})
        shown.note("something [odd]")
        shown.step(2, 4)
    text = console.export_text()
    assert "note: something [odd]" in text
    assert "2/4" in text
    assert "0.500 -> 1.000" in text
    assert "45 s left" in text
    assert len(sparkline([float(i) for i in range(1000)], width=40)) == 40
    assert sparkline([]) == ""
    assert len(set(sparkline([3.0, 3.0]))) == 1
    assert [duration(seconds) for seconds in (7.4, 200, 7500)] == ["7 s", "3 min 20 s", "2 h 05 min"]
