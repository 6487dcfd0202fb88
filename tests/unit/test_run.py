"""Run files: what is read, what is refused and in which words."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as settings_
from hypothesis import strategies as st
from tiny_run import settings, write_recipe

from tailorpo.errors import RunFileError
from tailorpo.rewards import JpegCompressibility, RewardEntry
from tailorpo.run import Batch, Run
from tailorpo.yaml_tree import read_yaml

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def problems(data: dict[str, Any], *, files: bool = False) -> list[str]:
    with pytest.raises(RunFileError) as error:
        Run.from_dict(data, files=files)
    return list(error.value.problems)


def load(folder: Path, text: str, *overrides: str) -> Run:
    path = folder / "run.yaml"
    path.write_text(text)
    return Run.load(path, overrides, files=False)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_sound_and_comes_back_from_its_own_yaml(recipe: Path, tmp_path: Path) -> None:
    run = Run.load(recipe, files=False)
    assert load(tmp_path, run.to_yaml()) == run
    assert Run.from_dict(run.to_dict(), files=False) == run


def test_there_are_recipes() -> None:
    assert {"emoji_tailorpo", "emoji_tailorpo_g", "sd15_aesthetic_tailorpo_g"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"updtes": 5}, "updtes: unknown key; did you mean `updates`?"),
        ({"zzz": 5}, "zzz: unknown key; known are seed, updates"),
        ({"updates": "5"}, 'updates: got "5", expected a whole number'),
        ({"updates": 5.5}, "updates: got 5.5, expected a whole number"),
        ({"updates": True}, "updates: got true, expected a whole number"),
        ({"updates": 0}, "updates: got 0, expected at least 1"),
        ({"updates": None}, "updates: got null, expected a whole number"),
        ({"seed": -1}, "seed: got -1, expected at least 0"),
        ({"checkpoint_every": 0}, "checkpoint_every: got 0, expected at least 1"),
        ({"model": "emoji"}, 'model: got "emoji", expected a mapping with the keys family, path, dtype, lora'),
        ({"model": {}}, "model.path: missing"),
        ({"model": {"path": "emoji", "family": "sd3"}}, 'model.family: got "sd3", expected sd or sdxl'),
        ({"model": {"path": "emoji", "dtype": "float23"}}, "did you mean `float32`?"),
        ({"model": {"path": "emoji", "lora": {"rank": 0}}}, "model.lora: rank must be at least 1, got 0"),
        ({"model": {"path": "emoji", "lora": None}}, "model.lora is null: the reference is the model"),
        ({"sampler": {"steps": 4, "eta": 0}}, "sampler.eta is 0: a deterministic sampler"),
        ({"sampler": {"stpes": 4}}, "sampler.stpes: unknown key; did you mean `steps`?"),
        ({"algorithm": {"name": "tailorpo", "train_steps": 5}}, "algorithm.train_steps must be in 1..4"),
        (
            {"algorithm": {"name": "tailorpo", "train_steps": [1, 9]}},
            "algorithm.train_steps must be different whole numbers in 0..3",
        ),
        (
            {"algorithm": {"name": "tailorpo", "train_steps": [1, "a"]}},
            'algorithm.train_steps: item 2: got "a", expected a whole number',
        ),
        (
            {"algorithm": {"name": "tailorpo", "train_steps": {"first": 1, "last": 2}}},
            "algorithm.train_steps.count: missing",
        ),
        ({"algorithm": {"name": "tailorpo", "beta": -1}}, "algorithm: beta must be positive, got -1"),
        ({"algorithm": {"name": "tailrpo"}}, "did you mean `tailorpo`?"),
        ({"algorithm": {"name": "tailorpo", "labels": "soft"}}, "algorithm.labels is soft, which needs algorithm.tau"),
        (
            {"algorithm": {"name": "tailorpo", "guidance": {"k": 1}}},
            "algorithm.guidance.form: missing; one of sigma, target",
        ),
        ({"algorithm": {"name": "tailorpo", "guidance": {"form": "sgima"}}}, "did you mean `sigma`?"),
        (
            {"algorithm": {"name": "tailorpo", "guidance": {"form": "target"}}},
            "algorithm.guidance: give either delta or target",
        ),
        ({"algorithm": {"name": "tailorpo", "guidance": 1}}, "algorithm.guidance: got 1, expected a mapping"),
        ({"reward": {"name": "brightnes"}}, "did you mean `brightness`?"),
        ({"reward": {}}, "reward.name: missing; one of emoji_preference"),
        ({"reward": {"name": 3}}, "reward.name: got 3, expected one of"),
        ({"reward": {"name": "brightness", "pth": "x"}}, "reward.pth: unknown key"),
        ({"reward": {"name": "brightness", "weight": "a"}}, 'reward.weight: got "a", expected a number'),
        ({"reward": {"name": "brightness", "weight": math.nan}}, "reward.weight: got NaN, expected a finite number"),
        ({"reward": [{"name": "brightness"}, {"name": "jpg"}]}, 'reward.1.name: got "jpg"'),
        ({"reward": []}, "reward: an empty list; name at least one"),
        ({"reward": "brightness"}, 'reward: got "brightness", expected a list'),
        ({"reward": {"name": "a.b:c d"}}, "a reward of your own is named 'package.module:attribute'"),
        ({"prompts": {"name": "animal"}}, "prompts: no bundled prompt list 'animal'; did you mean 'animals'?"),
        ({"prompts": {}}, "prompts: expected exactly one of name, file and list"),
        ({"prompts": {"list": ["a", 1]}}, "prompts.list: item 2: got 1, expected text"),
        ({"optimizer": {"lr": 0}}, "optimizer.lr: got 0, expected more than 0"),
        ({"optimizer": {"lr": math.inf}}, "optimizer.lr: got Infinity, expected a finite number"),
        ({"optimizer": {"betas": [0.9, 1]}}, "optimizer.betas: item 2: got 1, expected less than 1"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas: item 2"),
        ({"batch": {"trajectories": 2, "micro": 3}}, "batch.micro is 3, more than the 2 of batch.trajectories"),
        ({"eval": {"judge": {"name": "emoji_jude"}}}, "did you mean `emoji_judge`?"),
        ({"on_invalid_reward": "skp"}, "did you mean `skip`?"),
        ({"trackers": ["tensorbord"]}, "there is no `tensorbord`; did you mean `tensorboard`?"),
        ({"trackers": ["clearml"]}, "clearml is not installed; `pip install clearml` or leave it out"),
        ({"trackers": "wandb"}, 'trackers: got "wandb", expected a list'),
    ],
)
def test_each_mistake_is_named_with_what_is_accepted(change: dict[str, Any], message: str) -> None:
    data = settings("emoji", **change)
    assert any(message in problem for problem in problems(data)), problems(data)


def test_guidance_needs_a_reward_with_a_gradient() -> None:
    guided = {"name": "tailorpo", "train_steps": 2, "guidance": {"form": "sigma"}}
    data = settings("emoji", algorithm=guided, reward={"name": "jpeg_compressibility"})
    (problem,) = problems(data)
    assert problem.startswith("algorithm.guidance (TailorPO-G) needs the gradient of the reward")
    data["reward"] = [{"name": "brightness"}, {"name": "jpeg_compressibility"}]  # one without spoils the sum
    assert problems(data) == [problem]
    Run.from_dict(settings("emoji", algorithm=guided), files=False)


def test_mistakes_of_all_kinds_are_reported_together_with_their_lines(tmp_path: Path) -> None:
    text = """\
updates: many
model: {path: nowhere}
sampler:
  eta: 0
  stpes: 3
algorithm: {name: tailorpo, train_steps: 21, guidance: {form: sigma}}
reward: {name: jpeg_compressibility}
prompts: {file: nowhere.txt}
batch: {micro: 9}
updates: 3
"""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RunFileError) as error:
        Run.load(path, ["optimizer.lr=fast", "batch.micro=10"])
    found = error.value.problems
    assert str(error.value).startswith(f"{path}: {len(found)} mistakes\n  - ")
    for expected in (
        "updates (line 1): written a second time on line 10",
        "sampler.stpes (line 5): unknown key",
        'optimizer.lr (`optimizer.lr=fast`): got "fast", expected a number',
        "batch.micro (`batch.micro=10`) is 10",
        "model.path (line 2): there is no folder or file nowhere",
        "prompts (line 8): prompt file nowhere.txt: there is no such file",
    ):
        assert any(problem.startswith(expected) for problem in found), (expected, found)


def test_combinations_are_checked_although_another_section_is_wrong(tmp_path: Path) -> None:
    found = problems(
        settings("emoji", sampler={"eta": 0}, algorithm={"name": "tailorpo", "train_steps": 30}, optimizer={"lr": "x"})
    )
    assert [problem.split()[0] for problem in found] == ["optimizer.lr:", "sampler.eta", "algorithm.train_steps"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-5", 3e-5),
        ("1E4", 1e4),
        (".5", 0.5),
        ("-3", -3),
        ("0x1f", 31),
        ("010", 10),
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("'5'", "5"),
        ("a #1", "a"),
        ("[1, {a: b}]", [1, {"a": "b"}]),
        (".inf", math.inf),
        ("9" * 400, "9" * 400),
    ],
)
def test_yaml_is_read_by_version_1_2(text: str, value: Any) -> None:
    assert read_yaml(f"key: {text}", "test").data == {"key": value}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a mapping of settings such as `updates: 100`, got nothing"),
        ("- a", 'got ["a"]'),
        ("just words", 'got "just words"'),
        ("a: [1, 2", "line 1, column 9: not valid YAML: while parsing a flow sequence"),
        ("a: 1\n\tb: 2", "line 2, column 1: not valid YAML"),
        ("a: *nothing", "line 1, column 4: not valid YAML: found undefined alias"),
        ("a: &x [*x]", "not valid YAML: nested too deeply"),
        ("a: " + "[" * 40 + "]" * 40, "nested too deeply"),
        ("a: \x00", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML: expected a single document"),
    ],
)
def test_what_is_not_a_yaml_mapping_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RunFileError) as error:
        load(tmp_path, text)
    assert message in str(error.value)


def test_anchors_that_explode_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(RunFileError, match="nested too deeply or too long"):
        load(tmp_path, "\n".join(lines))


@pytest.mark.parametrize("text", ["updates: !!python/object:os.system 3", "updates: !wow 3", "? [a, b]\n: 3"])
def test_tags_and_strange_keys_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RunFileError, match=r"tags such as|a key must be a word"):
        load(tmp_path, text)


def test_files_that_are_no_run_files(tmp_path: Path) -> None:
    (tmp_path / "emoji.yaml").touch()
    for path, message in (
        (tmp_path / "emojy.yaml", "there is no such file; did you mean `emoji.yaml`?"),
        (tmp_path, "this is a folder"),
        (tmp_path / "no" / "where.yaml", "there is no such file"),
    ):
        with pytest.raises(RunFileError) as error:
            Run.load(path)
        assert message in str(error.value)
    (tmp_path / "model.bin").write_bytes(b"updates: \xff\xfe")
    with pytest.raises(RunFileError, match="not UTF-8 text"):
        Run.load(tmp_path / "model.bin")
    (tmp_path / "huge.yaml").write_bytes(b"#" * 1_000_001)
    with pytest.raises(RunFileError, match="a run file has at most"):
        Run.load(tmp_path / "huge.yaml")


def test_overrides_replace_values_of_any_kind(tmp_path: Path) -> None:
    run = Run.load(
        write_recipe(tmp_path, "emoji"),
        [
            "updates=7",
            "optimizer.lr=3e-5",
            "algorithm.train_steps=[0, 2]",
            "algorithm.guidance={form: sigma, k: 2}",
            "algorithm.guidance.k=0.5",
            "reward=[{name: brightness}, {name: colourfulness}]",
            "reward.1.weight=0.25",
            "prompts={name: animals}",
            "eval.prompts_unseen.name=animals_unseen",
            "model.lora.alpha=8",
            "eval.judge=null",
        ],
        files=False,
    )
    assert run.updates == 7
    assert run.optimizer.lr == 3e-5
    assert run.algorithm.train_steps == (0, 2)
    assert run.algorithm.guidance is not None
    assert run.algorithm.guidance.form == "sigma"
    assert run.algorithm.guidance.k == 0.5
    assert [(entry.reward.name, entry.weight) for entry in run.reward] == [("brightness", 1.0), ("colourfulness", 0.25)]
    assert run.prompts.name == "animals"
    assert run.eval.prompts_unseen is not None
    assert run.model.lora is not None
    assert run.model.lora.alpha == 8.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("updates", "an override reads key.sub=value"),
        ("=3", "an override reads key.sub=value"),
        ("a..b=3", "an override reads key.sub=value"),
        ("updates=[1", "the value is"),
        ("updates.x=3", "`updates` is 3, it has no keys"),
        ("sampler.step=3", "sampler.step (`sampler.step=3`): unknown key; did you mean `steps`?"),
        ("smapler.steps=3", "smapler (`smapler.steps=3`): unknown key; did you mean `sampler`?"),
        ("prompts.list.9=x", "`prompts.list` is a list; its keys are 0 to 2"),
        ("prompts.list.x=x", "`prompts.list` is a list; its keys are 0 to 2"),
        ("updates=many", 'updates (`updates=many`): got "many", expected a whole number'),
        ("reward.weight=x", "reward.weight (`reward.weight=x`)"),
    ],
)
def test_overrides_that_cannot_work(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RunFileError) as error:
        Run.load(write_recipe(tmp_path, "emoji"), [override])
    assert message in str(error.value)


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "words.txt").write_text("a cat")
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    data = settings("models", prompts={"file": "words.txt"}, reward={"name": "m:f", "args": {"path": "words.txt"}})
    run = Run.from_dict(data, files=False)
    assert run.prompts.file == str(tmp_path.resolve() / "words.txt")
    assert run.model.path == str(tmp_path.resolve() / "models")
    assert run.to_dict()["reward"]["args"] == {"path": "words.txt"}  # a user's own are left alone


def test_a_resumed_run_may_be_longer_and_nothing_else(tmp_path: Path, tiny_folder: Path) -> None:
    run = Run.from_dict(settings(tiny_folder))
    assert run.resumed(["updates=9", "eval.seeds=2"]).updates == 9
    assert run.resumed([]) == run
    assert run.resumed(["seed=0"]) == run  # said again, not changed
    with pytest.raises(RunFileError) as error:
        run.resumed(["seed=1", "sampler.steps=8", "updates=9"])
    assert len(error.value.problems) == 2
    assert "`seed` cannot change in a run that has begun" in str(error.value)
    with pytest.raises(RunFileError, match="did you mean `updates`"):
        run.resumed(["update=9"])


def test_runs_built_in_python_follow_the_same_rules() -> None:
    run = Run.from_dict(settings("emoji"), files=False)
    with pytest.raises(ValueError, match="micro: got 0, expected at least 1"):
        Batch(micro=0)
    with pytest.raises(RunFileError) as error:
        replace(run, updates=0, batch=Batch(trajectories=1, micro=2))
    assert len(error.value.problems) == 2
    guided = replace(
        run.algorithm,
        guidance=Run.from_dict(
            settings("emoji", algorithm={"name": "tailorpo", "train_steps": 2, "guidance": {"form": "sigma"}}),
            files=False,
        ).algorithm.guidance,
    )
    with pytest.raises(RunFileError, match="not differentiable"):
        replace(run, algorithm=guided, reward=(RewardEntry(reward=JpegCompressibility()),))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings_(max_examples=60, deadline=None)
@given(section=st.sampled_from(sorted(settings(""))), sub=st.none() | st.text(max_size=6), value=JSON)
def test_whatever_is_written_a_run_or_a_list_of_mistakes_comes_out(section: str, sub: str | None, value: Any) -> None:
    data = settings("emoji")
    if sub is not None and isinstance(data[section], dict):
        data[section] = {**data[section], sub: value}
    else:
        data[section] = value
    try:
        run = Run.from_dict(data, files=False)
    except RunFileError:
        return
    assert Run.from_dict(run.to_dict(), files=False) == run
