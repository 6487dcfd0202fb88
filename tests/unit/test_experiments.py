"""Experiments: from a grid to its cells, cells in processes of their own, a cell that is stopped, tables and plots."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tailorpo.algorithms.tailorpo import TailorPO
from tailorpo.errors import UserError
from tailorpo.experiments.alarms import alarm_table
from tailorpo.experiments.catalogue import FURTHER, GRIDS, KNOBS, LEARNING_RATES, METHODS, OBJECTS, PREFERENCE
from tailorpo.experiments.cell import RESULT, marks, run_cell
from tailorpo.experiments.conduct import Conduct, write_views
from tailorpo.experiments.grid import Grid, Plan, plans, quick
from tailorpo.experiments.held import held_table
from tailorpo.experiments.protocol import PAPERS_G
from tailorpo.experiments.runner import Places, finished_cells, read_results, run_cells, write_results
from tailorpo.experiments.tables import by_variant, first_crossing, gains, grid_tables
from tailorpo.experiments.tuning import confirmed, finalists, winners
from tailorpo.guidance import SigmaGuidance, TargetGuidance

RECIPES = Path(__file__).parents[2] / "recipes"
BY_NAME = {grid.name: grid for grid in GRIDS}
LR = ("optimizer.lr=1e-3",)


def some(*names: str, rewards: dict[str, tuple[int, ...]] | None = None, **changes: Any) -> Grid:
    """A part of the grid `methods`."""
    variants = tuple(variant for variant in BY_NAME["methods"].variants if variant.name in names)
    changes = {"variants": variants, "seeds": rewards or {PREFERENCE: (1,)}, **changes}
    return replace(BY_NAME["methods"], **changes)


# ---------------------------------------------------------------------------------------------------------- the grid


def test_cells_are_variants_times_seeds_where_the_reward_has_what_the_method_needs() -> None:
    rewards = {PREFERENCE: (1, 2), "jpeg_compressibility": (1,)}
    grid = some("DDPO", "D3PO", "TailorPO", "TailorPO-G", "reward backprop", rewards=rewards)
    found = [plan.cell.id for plan in plans(grid, recipes=RECIPES, overrides=LR)]
    names = ("ddpo", "d3po", "tailorpo", "tailorpo-g", "reward-backprop")
    expected = [f"{name}.{PREFERENCE}.{seed}" for seed in (1, 2) for name in names]
    assert found == [*expected, *(f"{name}.jpeg_compressibility.1" for name in names[:3])]


@pytest.mark.parametrize("budget", [5_600, 16_800])
def test_every_method_gets_the_number_of_updates_that_comes_nearest_to_the_budget(budget: int) -> None:
    """With the costs of the papers' schedules, counted by hand: 20 steps, 5 of them trained by TailorPO."""
    forwards = {"DDPO": 40, "D3PO": 120, "TailorPO": 30, "TailorPO-G": 35, "reward backprop": 20}
    for plan in plans(some(*forwards, budget=budget), recipes=RECIPES, overrides=LR):
        update = plan.run.batch.trajectories * forwards[plan.cell.variant.name]
        assert plan.forwards == plan.run.updates * update
        assert abs(plan.forwards - budget) <= update / 2


def test_cells_of_one_seed_are_evaluated_alike_whatever_they_train_on() -> None:
    variant = replace(METHODS[3], name="proxy", proxy=(PREFERENCE, "brightness"))
    grid = some("TailorPO", rewards={PREFERENCE: (1, 2), "colourfulness": (1,)})
    found = plans(replace(grid, variants=(*grid.variants, variant)), recipes=RECIPES)
    trained = {plan.cell.id: plan.run.reward[0].reward.name for plan in found}
    assert trained == {
        f"tailorpo.{PREFERENCE}.1": PREFERENCE,
        f"proxy.{PREFERENCE}.1": "brightness",
        f"tailorpo.{PREFERENCE}.2": PREFERENCE,
        f"proxy.{PREFERENCE}.2": "brightness",
        "tailorpo.colourfulness.1": "colourfulness",
    }
    assert found[0].measured == found[1].measured
    assert found[0].measured.reward[0].reward.name == PREFERENCE
    assert found[2].measured.seed == found[2].run.seed == 2


def test_different_samplers_are_refused() -> None:
    other = replace(METHODS[3], name="other", overrides=("sampler.guidance_scale=3",))
    with pytest.raises(UserError, match="different samplers"):
        plans(some("TailorPO", variants=(METHODS[3], other)), recipes=RECIPES)


def test_a_changed_setting_changes_the_digest_and_nothing_else_does() -> None:
    def digest(**changes: Any) -> str:
        (plan,) = plans(some("TailorPO", **changes), recipes=RECIPES, overrides=changes.pop("settings", ()))
        return plan.digest

    assert digest() == digest(question="another")
    others = {
        digest(budget=9_000),
        digest(points=2),
        digest(overrides=("eval.seeds=3",)),
        digest(rewards={PREFERENCE: (2,)}),
    }
    assert len(others | {digest()}) == 5


def test_a_setting_that_is_added_later_makes_no_result_out_of_date() -> None:
    """What is left at its default, such as all that came after the committed results, is not in the digest."""
    (plan,) = plans(some("TailorPO-G"), recipes=RECIPES)
    spelt = replace(plan, run=replace(plan.run, ensemble=None, model=replace(plan.run.model, full=False)))
    assert spelt.digest == plan.digest
    assert replace(plan, run=replace(plan.run, model=replace(plan.run.model, channels_last=True))).digest != plan.digest
    algorithm = plan.run.algorithm
    assert isinstance(algorithm, TailorPO)
    for guidance in (None, SigmaGuidance(k=7.5), TargetGuidance(delta=0.5)):
        changed = replace(plan, run=replace(plan.run, algorithm=replace(algorithm, guidance=guidance)))
        assert changed.digest != plan.digest


def test_the_catalogue_is_sound() -> None:
    assert len(OBJECTS) == 45
    for grid in GRIDS:
        assert grid.reference in [None, *(variant.name for variant in grid.variants)], grid.name
        ids = [plan.cell.id for plan in plans(grid, recipes=RECIPES, overrides=LR)]
        assert len(ids) == len(set(ids)), grid.name
    # What tune found is replaced by what a variant says of itself, such as how SPO scores its steps.
    winners = {
        m.name: next(v.overrides for v in BY_NAME["tune"].variants if v.name.startswith(f"{m.name},")) for m in METHODS
    }
    for grid in GRIDS:
        for plan in plans(grid, recipes=RECIPES, winners=winners):
            mode = getattr(plan.run.algorithm, "step_reward", None)
            assert (mode == "aware") == (plan.cell.variant.name == "SPO, step-aware"), plan.cell.id
            if grid.name == "train-steps":
                assert plan.cell.variant.name == f"K = {getattr(plan.run.algorithm, 'train_steps', None)}"
    tried = [variant for variant in BY_NAME["tune"].variants if variant.name.startswith("TailorPO,")]
    assert len(tried) == len(LEARNING_RATES) * len(KNOBS["TailorPO"][1]) == 6
    # Every method gets the same number of settings, and what lies beyond a strength is none that was tried.
    for grid, count in (("tune", 6), ("refine", 3), ("confirm", 2)):
        methods = [variant.name.partition(",")[0] for variant in BY_NAME[grid].variants]
        assert [methods.count(method.name) for method in METHODS] == [count] * 6
    for method, (key, values) in KNOBS.items():
        assert FURTHER[method].startswith(f"{key}=")
        assert FURTHER[method].partition("=")[2] not in values


def test_quick_is_one_update_of_every_variant() -> None:
    found = plans(quick(some("TailorPO", "TailorPO-G")), recipes=RECIPES)
    assert [(plan.run.updates, plan.run.batch.trajectories) for plan in found] == [(1, 2), (1, 2)]


def test_marks_are_spread_and_end_at_the_end() -> None:
    assert marks(60, 6) == [10, 20, 30, 40, 50, 60]
    assert marks(2, 6) == [1, 2]
    assert marks(7, 3) == [2, 5, 7]


# ------------------------------------------------------------------------------------------------------ the processes


class Heard:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.failures: dict[str, str] = {}
        self.most = self.now = 0

    def started(self, plan: Plan) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        self.events.append(("started", plan.cell.id))

    def progress(self, plan: Plan, updates: int) -> None:
        pass

    def finished(self, plan: Plan, failure: str | None) -> None:
        self.now -= 1
        self.events.append(("finished", plan.cell.id))
        if failure:
            self.failures[plan.cell.id] = failure


STUB = """
import json, os, pathlib, signal, sys, time
folder, digest, how = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
print("threads", os.environ["OMP_NUM_THREADS"], flush=True)
time.sleep(0.2)
if how == "raise":
    raise RuntimeError("the reward is on fire")
if how == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if how == "silent":
    sys.exit(0)
folder.mkdir(parents=True, exist_ok=True)
(folder / "result.json").write_text(json.dumps({"id": folder.name, "variant": sys.argv[4], "digest": digest}))
"""


def stubs(folder: Path, how: dict[str, str]) -> Any:
    """Commands that behave as told, or well."""
    return lambda plan: [
        sys.executable,
        "-c",
        STUB,
        str(folder / plan.cell.id),
        plan.digest,
        how.get(plan.cell.id, "well"),
        plan.cell.variant.name,
    ]


def four() -> list[Plan]:
    return plans(some("TailorPO", "TailorPO-G", rewards={PREFERENCE: (1, 2)}), recipes=RECIPES)


def test_a_cell_that_crashes_is_a_message_and_the_others_go_on(tmp_path: Path) -> None:
    found, heard, done = four(), Heard(), list[str]()
    ids = [plan.cell.id for plan in found]
    how = dict(zip(ids, ("raise", "kill", "silent", "well"), strict=True))
    failures = run_cells(
        found,
        folder=tmp_path,
        command=stubs(tmp_path, how),
        jobs=2,
        watcher=heard,
        done=lambda plan: done.append(plan.cell.id),
        poll=0.02,
    )
    assert done == ids[3:]
    assert failures == heard.failures
    assert "exit code 1" in failures[ids[0]]
    assert "RuntimeError: the reward is on fire" in failures[ids[0]]
    assert "killed by signal 9" in failures[ids[1]]
    assert "threads 1" in failures[ids[2]]  # it ended well, but left no result
    assert heard.most == 2
    assert [name for event, name in heard.events if event == "started"] == ids


def test_finished_cells_are_skipped_until_their_settings_change(tmp_path: Path) -> None:
    found, places = four(), Places(tmp_path / "results", tmp_path / "work")
    folder = places.work / "methods"
    run_cells(
        found[:2], folder=folder, command=stubs(folder, {}), jobs=2, watcher=Heard(), done=lambda _: None, poll=0.02
    )
    ids = [plan.cell.id for plan in found]
    assert list(finished_cells(found, places, "methods")) == ids[:2]
    write_results(found, places, "methods", head={}, keep=False)

    # Without the folder of the runs the results file alone says so, as in a fresh clone.
    elsewhere = Places(places.results, tmp_path / "nowhere")
    assert list(finished_cells(found, elsewhere, "methods")) == ids[:2]
    changed = [replace(plan, points=99) for plan in found]
    assert finished_cells(changed, places, "methods") == {}

    # Gathered again on another machine it says where it was measured, until something is measured there.
    first, path = read_results(places.json("methods"))["environment"], places.json("methods")
    path.write_text(path.read_text().replace(json.dumps(first["processor"]), '"Another"'))
    write_results(found, elsewhere, "methods", head={}, keep=False)
    assert read_results(path)["environment"]["processor"] == "Another"
    path.unlink()
    write_results(found, places, "methods", head={}, keep=False)
    assert read_results(path)["environment"] == first

    # Under another name it is the same run; an experiment that has it from there says so, and passes it on no further.
    variant = replace(found[0].cell.variant, name="mine")
    other = [replace(found[0], cell=replace(found[0].cell, variant=variant))]
    (borrowed,) = write_results(other, elsewhere, "ablation", head={}, keep=False)["cells"]
    assert (borrowed["id"], borrowed["variant"], borrowed["from"]) == (f"mine.{PREFERENCE}.1", "mine", "methods")
    places.json("methods").rename(tmp_path / "aside")
    assert finished_cells(found, elsewhere, "methods") == {}
    (tmp_path / "aside").rename(places.json("methods"))

    # A part of the grid keeps the rest of the file; all of it leaves out what is out of date.
    write_results(changed[2:], places, "methods", head={}, keep=True)
    assert [cell["id"] for cell in read_results(places.json("methods"))["cells"]] == ids[:2]
    write_results(changed, places, "methods", head={}, keep=False)
    assert read_results(places.json("methods"))["cells"] == []


def test_an_interruption_stops_the_running_cells(tmp_path: Path) -> None:
    class Stop(Heard):
        def progress(self, plan: Plan, updates: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cells(
            four(),
            folder=tmp_path,
            command=lambda plan: [sys.executable, "-c", f"import time; time.sleep(30); open('{tmp_path}/late', 'w')"],
            jobs=2,
            watcher=Stop(),
            done=lambda _: None,
            poll=0.02,
        )
    assert not (tmp_path / "late").exists()


# ------------------------------------------------------------------------------------------------------------ a cell


class Quiet:
    """A reporter that can stop the process at an update or a phase."""

    def __init__(self, *, update: int = -1, phase: str = "-") -> None:
        self.stop_update, self.stop_phase, self.updates = update, phase, list[int]()

    def phase(self, text: str) -> None:
        if text.startswith(self.stop_phase):
            raise KeyboardInterrupt

    def step(self, done: int, total: int) -> None:
        pass

    def update(self, metrics: dict[str, Any]) -> None:
        self.updates.append(metrics["update"])
        if metrics["update"] == self.stop_update:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        pass


def tiny_plan(tiny_folder: Path) -> Plan:
    """Four updates of TailorPO on a random model, with two points of the curve."""
    settings = [f"model.path={tiny_folder}", "sampler.steps=4", "algorithm.train_steps=2", "checkpoint_every=1"]
    settings += ["batch.trajectories=2", "batch.micro=2", "prompts={list: [a cat, a dog, a bee]}", "eval.seeds=2"]
    grid = some("TailorPO", rewards={"brightness": (3,)}, budget=4 * 2 * 10, points=2, overrides=())
    settings += ["eval.prompts_unseen=null", "eval.judge=null"]
    (plan,) = plans(grid, recipes=RECIPES, overrides=settings)
    return plan


def without_times(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in ("seconds", "minutes")}


def test_a_cell_that_is_stopped_ends_with_the_same_result(tmp_path: Path, tiny_folder: Path) -> None:
    plan = tiny_plan(tiny_folder)
    whole = run_cell(plan, tmp_path / "whole", reporter=Quiet())
    assert [point["update"] for point in whole["curve"]] == [0, *marks(plan.run.updates, 2)]
    assert plan.run.updates >= 4

    seen: list[int] = []
    for stop in (Quiet(update=1), Quiet(update=3), Quiet(phase="evaluating")):
        with pytest.raises(KeyboardInterrupt):
            run_cell(plan, tmp_path / "stopped", reporter=stop)
        seen += stop.updates
        assert not (tmp_path / "stopped" / RESULT).exists()
    last = Quiet()
    resumed = run_cell(plan, tmp_path / "stopped", reporter=last)
    assert without_times(resumed) == without_times(whole)
    assert last.updates == []  # nothing was trained again but the updates without a checkpoint
    assert sorted(set(seen)) == list(range(1, plan.run.updates + 1))
    assert json.loads((tmp_path / "stopped" / RESULT).read_text()) == json.loads(json.dumps(resumed))


def test_a_cell_with_other_settings_is_begun_anew(tmp_path: Path, tiny_folder: Path) -> None:
    plan = tiny_plan(tiny_folder)
    with pytest.raises(KeyboardInterrupt):
        run_cell(plan, tmp_path / "cell", reporter=Quiet(update=2))
    other = replace(plan, run=replace(plan.run, updates=2, seed=4))
    heard = Quiet()
    result = run_cell(other, tmp_path / "cell", reporter=heard)
    assert heard.updates == [1, 2]
    assert result["digest"] == other.digest


def test_what_a_cell_keeps(tmp_path: Path, tiny_folder: Path) -> None:
    plan = tiny_plan(tiny_folder)
    result = run_cell(plan, tmp_path / "cell", reporter=Quiet())
    assert result["forwards"] == plan.forwards == result["curve"][-1]["forwards"]
    assert result["reward_queries"] == plan.run.updates * 2 * 5  # two trained steps of two pictures, and the end
    evaluation = json.loads((tmp_path / "cell" / "eval.json").read_text())
    change = gains([result])
    assert change is not None
    assert change.shape == (1, 3)
    assert change.mean() == pytest.approx(evaluation["groups"]["seen"]["metrics"]["reward"]["difference"], abs=1e-4)
    assert result["kl"] > 0
    assert result["device"] == "cpu"


# ------------------------------------------------------------------------------------------------- tables and plots


def synthetic(grid: Grid, *, strength: dict[str, float], seeds: Sequence[int] = (1, 2, 3)) -> dict[str, Any]:
    """Results of cells that were never run: gains of a given size, 45 seen and 6 unseen prompts."""
    rng, cells = np.random.default_rng(0), list[dict[str, Any]]()
    base = {seed: rng.normal(5, 0.3, size=51) for seed in seeds}
    for reward in grid.seeds:
        for seed in seeds:
            for name, gain in strength.items():
                aligned = base[seed] + gain + 0.05 * rng.normal() + rng.normal(0, 0.1, size=51)
                distance = rng.uniform(0.4, 0.6, size=51)
                measures = {
                    "reward": {"base": base[seed].tolist(), "aligned": aligned.tolist()},
                    "judge": {"base": base[seed].tolist(), "aligned": (base[seed] + gain / 2).tolist()},
                    "good": {"base": [0.5] * 51, "aligned": [0.75] * 51},
                    "distance": {"base": distance.tolist(), "aligned": (0.9 * distance).tolist()},
                }
                curve = [
                    {"update": i, "forwards": 2800 * i, "reward_queries": 900 * i, "reward": 5 + gain * i / 6}
                    for i in range(7)
                ]
                cells.append(
                    {
                        "id": f"{name}.{reward}.{seed}",
                        "variant": name,
                        "reward": reward,
                        "seed": seed,
                        "kl": 10 * gain,
                        "forwards": 16800,
                        "backwards": 2800,
                        "reward_queries": 5400,
                        "minutes": 4.0,
                        "curve": curve,
                        "evaluation": {
                            "prompts": [f"p{i}" for i in range(51)],
                            "groups": ["seen"] * 45 + ["unseen"] * 6,
                            "pictures": 4,
                            "measures": measures,
                        },
                    }
                )
    return {"experiment": grid.name, "environment": {"processor": "P"}, "overrides": [], "tuned": None, "cells": cells}


def test_the_table_says_who_won_and_by_how_much() -> None:
    grid = some("D3PO", "TailorPO", "TailorPO-G", rewards={PREFERENCE: (1, 2, 3), "colourfulness": (1, 2, 3)})
    text = grid_tables(grid, synthetic(grid, strength={"D3PO": 0.0, "TailorPO": 0.2, "TailorPO-G": 0.6}))
    assert "nothing had been tuned" in text
    preference = text.partition("### emoji_preference")[2].partition("###")[0].splitlines()
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in preference if line.startswith("| ")}
    assert rows["base"][2].startswith("5.0")
    assert 0.5 < float(rows["TailorPO-G"][3].split()[0]) < 0.7
    assert rows["TailorPO-G"][7] == "90 %"
    assert rows["TailorPO-G"][8] == "6.0"
    assert rows["base"][9] == ""
    assert "gain at 5,400 queries" in text
    assert rows["TailorPO-G"][9] == "+0.600"
    compared = [line.split(" | ") for line in preference if line.startswith("| D3PO")][1]
    assert 0.5 < float(compared[1].split()[0]) < 0.7
    assert compared[2].startswith("1.00")
    assert compared[3] == "3 of 3"
    assert float(compared[4].split()[0]) == pytest.approx(0.3)
    # G's curve rises by 0.1 in 2,800 evaluations: it is at TailorPO's end, 0.2, after a third of all 16,800.
    assert compared[5:] == ["it ends below the base", "- |"]
    tailorpo = [line.split(" | ") for line in preference if line.startswith("| TailorPO |")][1]
    assert tailorpo[5:] == ["5,600", "0.33 (0.33 to 0.33) |"]


def test_the_table_says_where_the_runs_were_made() -> None:
    grid = some("TailorPO", rewards={PREFERENCE: (1, 2, 3)})
    content = synthetic(grid, strength={"TailorPO": 0.2})
    text = grid_tables(grid, content)
    assert "0.2 hours in all on one core each (P)." in text
    assert "min: minutes on one core, with" in text
    content["cells"][1]["device"] = "Fast GPU"
    text = grid_tables(grid, content)
    assert "0.1 hours in all on one core each (P) and 0.1 hours in all on one Fast GPU that runs shared." in text
    assert "min: minutes, with" in text
    for cell in content["cells"]:
        cell["from"] = "methods"
    assert "3 of them those of `methods`; 0.0 hours in all on one core each (P)." in grid_tables(grid, content)


def test_when_a_curve_first_reaches_a_level() -> None:
    spent, reward = np.array([0.0, 10.0, 20.0, 30.0]), np.array([1.0, 3.0, 2.0, 5.0])
    crossings = {level: first_crossing(spent, reward, level) for level in (0.5, 1.0, 2.0, 3.5, 5.0, 6.0)}
    assert crossings == {0.5: 0.0, 1.0: 0.0, 2.0: 5.0, 3.5: 25.0, 5.0: 30.0, 6.0: None}


def test_prompts_without_a_number_are_left_out_of_every_cell() -> None:
    grid = some("TailorPO")
    content = synthetic(grid, strength={"TailorPO": 0.2}, seeds=(1, 2))
    content["cells"][1]["evaluation"]["measures"]["reward"]["aligned"][7] = None
    values = gains(by_variant(grid, content["cells"], PREFERENCE)["TailorPO"])
    assert values is not None
    assert values.shape == (2, 44)


def test_the_plot_shows_every_reward(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = {"DDPO": 0.02, "D3PO": 0.0, "SPO": 0.15, "TailorPO": 0.2, "TailorPO-G": 0.6, "reward backprop": 0.7}
    grid = some(*names, rewards={PREFERENCE: (1, 2, 3), "colourfulness": (1, 2, 3)})
    write_views(grid, synthetic(grid, strength=names), tmp_path)
    pixels = np.asarray(Image.open(tmp_path / "methods.webp").convert("RGB"))
    assert pixels.shape[1] > 1200
    # both rows of panels have ink
    half = len(pixels) // 2
    assert all((part < 128).any(-1).mean() > 0.01 for part in (pixels[:half], pixels[half:]))


def test_what_sentinels_saw_is_a_panel_of_its_own_up_to_the_first_alarm(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    grid = some("TailorPO")
    content = synthetic(grid, strength={"TailorPO": 0.2})
    write_views(grid, content, tmp_path)
    without = np.asarray(Image.open(tmp_path / "methods.webp").convert("RGB"))
    for cell in content["cells"]:
        cell["sentinels"] = [
            {
                "update": at,
                "state": "hacking" if at > 2 else "ok",
                "judge": 1.0 + at,
                "base": 1.0,
                "kl": 4.0 * at,
                "forwards": 9,
                "restored": None,
            }
            for at in (1, 2, 3, 4)
        ]
    write_views(grid, content, tmp_path)
    pixels = np.asarray(Image.open(tmp_path / "methods.webp").convert("RGB"))
    assert pixels.shape[1] > 1.3 * without.shape[1]
    last = pixels[:, -pixels.shape[1] // 4 :].astype(int)
    assert (last.max(-1) - last.min(-1) > 60).mean() > 0.002  # a coloured curve, not only axes


def test_more_variants_than_colours_get_a_row_for_each_recipe(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    grid = BY_NAME["beyond"]
    names = [variant.name for variant in grid.variants]
    plain, guided = names.index("TailorPO"), names.index("TailorPO-G")
    heights: list[int] = []
    for shown in (names[plain:guided], names[guided:], names):
        write_views(grid, synthetic(grid, strength=dict.fromkeys(shown, 0.2)), tmp_path)
        with Image.open(tmp_path / "beyond.webp") as picture:
            heights.append(picture.height)
    assert heights[2] == pytest.approx(heights[0] + heights[1], abs=2)
    assert heights[0] / heights[1] == pytest.approx(guided / (len(names) - guided), rel=0.2)


def test_tune_names_the_best_setting_of_a_method_once_all_were_tried() -> None:
    grid = BY_NAME["tune"]
    names = [variant.name for variant in grid.variants if variant.name.startswith("TailorPO-G,")]
    content = synthetic(grid, strength={name: 0.1 * i for i, name in enumerate(names)}, seeds=(101,))
    best = next(variant for variant in grid.variants if variant.name == names[-1])
    assert winners(grid, content) == {"TailorPO-G": best.overrides}
    content["cells"] = [cell for cell in content["cells"] if cell["variant"] != names[0]]
    assert winners(grid, content) == {}


def test_refine_changes_one_thing_and_confirm_decides_between_the_two_best() -> None:
    tune, refine, confirm = (BY_NAME[name] for name in ("tune", "refine", "confirm"))
    first = {variant.name: 0.0 for variant in tune.variants}
    first |= {
        "TailorPO-G, lr 1e-3, guidance.k 4": 0.5,
        "DDPO, lr 1e-3, clip 1e-3": 0.9,
        "DDPO, lr 3e-3, clip 1e-3": 0.6,
    }
    second = {"TailorPO-G, guidance.k 8": 0.7, "TailorPO-G, batch 4": 0.8, "TailorPO-G, batch 16": 0.1}
    second |= {"DDPO, clip 3e-5": 0.2, "DDPO, batch 4": 0.1, "DDPO, batch 16": 0.0}
    contents = [synthetic(grid, strength=each, seeds=(101,)) for grid, each in ((tune, first), (refine, second))]
    eight = ("batch.trajectories=8", "batch.micro=8")
    found = finalists(tune, contents[0], refine, contents[1])
    assert found["TailorPO-G, best"] == (
        "optimizer.lr=1e-3",
        "algorithm.guidance.k=4",
        *PAPERS_G,
        "batch.trajectories=4",
        "batch.micro=4",
    )
    assert found["TailorPO-G, second best"] == ("optimizer.lr=1e-3", *eight, *PAPERS_G, "algorithm.guidance.k=8")
    assert found["DDPO, second best"] == ("optimizer.lr=3e-3", "algorithm.clip=1e-3", *eight)

    # The second seed turns the order of the one round (0.8 + 0.1 against 0.7 + 0.5), and not of the other.
    third = {"TailorPO-G, best": 0.1, "TailorPO-G, second best": 0.5, "DDPO, best": 0.3, "DDPO, second best": 0.4}
    last = synthetic(confirm, strength=third, seeds=(102,))
    won = confirmed(tune, contents[0], refine, contents[1], confirm=last)
    assert won["TailorPO-G"] == found["TailorPO-G, second best"]
    assert won["DDPO"] == found["DDPO, best"]
    # Where the means are as good as equal, the diversity that is kept decides.
    third |= {"TailorPO-G, best": 0.4, "TailorPO-G, second best": 0.52}
    last = synthetic(confirm, strength=third, seeds=(102,))
    assert confirmed(tune, contents[0], refine, contents[1], confirm=last)["TailorPO-G"] == found["TailorPO-G, best"]
    for cell in last["cells"]:
        if cell["variant"] == "TailorPO-G, second best":
            measure = cell["evaluation"]["measures"]["distance"]
            measure["aligned"] = measure["base"]
    won = confirmed(tune, contents[0], refine, contents[1], confirm=last)
    assert won["TailorPO-G"] == found["TailorPO-G, second best"]
    without = confirmed(tune, contents[0], refine, contents[1], confirm={"cells": []})
    assert without["TailorPO-G"] == found["TailorPO-G, best"]


def test_methods_run_with_the_winners_of_tune(tmp_path: Path) -> None:
    places = Places(tmp_path, tmp_path / "work")
    tune = BY_NAME["tune"]
    names = [variant.name for variant in tune.variants if variant.name.startswith("TailorPO,")]
    content = synthetic(tune, strength={name: float("lr 3e-3, beta 0.3" in name) for name in names}, seeds=(101,))
    conduct = Conduct(grid=some("TailorPO"), places=places, recipes=RECIPES)
    assert "no result here" in conduct.notes()[-1]
    before = conduct.plans()[0]
    places.json("tune").write_text(json.dumps(content))
    (plan,) = conduct.plans()
    assert (plan.run.optimizer.lr, plan.run.algorithm.beta) == (3e-3, 0.3)
    assert plan.digest != before.digest  # what was measured with the recipe's settings is out of date
    eight = ["batch.trajectories=8", "batch.micro=8"]
    assert conduct.head()["tuned"] == {"TailorPO": ["optimizer.lr=3e-3", "algorithm.beta=0.3", *eight]}


def test_alarms_by_hand() -> None:
    def look(update: int, state: str, judge: float, **more: Any) -> dict[str, Any]:
        found = {"update": update, "state": state, "judge": judge, "base": 5.0, "diversity": 1.0, "kl": 1.0}
        return {**found, "forwards": 100, "restored": None, **more}

    healthy = {"sentinels": [look(2, "ok", 5.5), look(4, "warning", 5.75)]}
    hacked = {"sentinels": [look(2, "ok", 5.25), look(4, "hacking", 4.75, kl=3.0, restored=2)]}
    table = alarm_table({"plain": [{}], "watched": [healthy, hacked]})
    assert table is not None
    (row,) = [line for line in table.splitlines() if line.startswith("| watched")]
    assert row == "| watched | 2 | 1 | none, 4 | +0.75, +0.25 | -, 0.50 (200%) | -, 1 to 3 | 2 | 200 |"
    assert alarm_table({"plain": [{}]}) is None


def test_a_target_held_by_hand() -> None:
    held = {"kl_target": 100.0, "kl_by_update": [0.0, 81.0, 300.0, 83.0, 84.0, 120.0]}
    missed = {"kl_target": 100.0, "kl_by_update": [0.0, 1.0, 10.0, 60.0, 70.0, 80.0]}
    table = held_table({"free": [{}], "aimed": [held, missed]})
    assert table is not None
    # Half-time is after three updates; 81 is more than 20 % below in logarithms, as 1 / 1.2 is 0.833.
    assert "| aimed | 2 | 100 | 5, never | 0.96, 0.70 | 67 %, 0 % |" in table
    assert "free" not in table
    assert held_table({"free": [{}]}) is None
