"""How much of the library one training step runs through, measured by watching it run.

    python tests/path_of_one_step.py      prints the table in docs/concepts.md

Two updates of every bundled recipe are run on a tiny random model, and every function of the library that the second
calls is noted (the first has nothing to go by yet, and keeps pictures for the report). What counts are their code
lines: whole functions, with the branches that were not taken, without blank lines, comments and docstrings.

Not counted: what dataclasses generate, and the files in `LEFT_OUT`.
"""

from __future__ import annotations

import ast
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import tailorpo
from tailorpo._distributed import ALONE, pick_device
from tailorpo.algorithms.diffusion_dpo import DiffusionDPO
from tailorpo.optimizer import Learner
from tailorpo.pair_drawing import draw_pairs
from tailorpo.policy import Policy
from tailorpo.rewards import load_scorer
from tailorpo.run import Run
from tailorpo.rundir import RunDirectory
from tailorpo.train import Session

LIBRARY = Path(tailorpo.__file__).parent
RECIPES = Path(__file__).parent.parent / "recipes"
LEFT_OUT = {"rewards/": "a reward is anybody's own; the Scorer that calls it does count"}
COUNTED_IN_REWARDS = ("rewards/scorer.py", "rewards/ensemble_scorer.py")
REPLACED = {
    "updates": 100,
    "sampler.steps": 6,
    "batch.trajectories": 2,
    "batch.micro": 2,
    "eval.judge": "null",
    "reward": "{name: brightness}",
}
"""What of a recipe is replaced, so that an update takes a second. Of 100 updates the second keeps no pictures."""
REPLACED_IN = {
    "emoji_tailorpo.yaml": ("algorithm.train_steps={first: 1, last: 4, count: 2}",),
    "emoji_tailorpo_g.yaml": ("algorithm.train_steps={first: 1, last: 4, count: 2}",),
    # Brightness wants no time, and its gaps are below any threshold.
    "emoji_spo.yaml": ("algorithm.step_reward=predicted", "algorithm.threshold=0"),
}
METHODS = {
    "TailorPO": ("emoji_tailorpo.yaml", "sd"),
    "TailorPO-G": ("emoji_tailorpo_g.yaml", "sd"),
    "TailorPO-G on SDXL": ("emoji_tailorpo_g.yaml", "sdxl"),
    "SPO": ("emoji_spo.yaml", "sd"),
    "D3PO": ("emoji_d3po.yaml", "sd"),
    "DDPO": ("emoji_ddpo.yaml", "sd"),
    "Diffusion-DPO": ("emoji_diffusion_dpo.yaml", "sd"),
    "reward backprop": ("emoji_reward_backprop.yaml", "sd"),
}

Function = tuple[str, str, int]
"""File in the library, qualified name, first line."""


class Silent:
    """A reporter that says nothing."""

    def phase(self, text: str) -> None: ...
    def step(self, done: int, total: int) -> None: ...
    def update(self, metrics: dict[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...


def measure(name: str, models: Mapping[str, Path], folder: Path) -> dict[Function, set[int]]:
    """The functions that an update of a method calls, and their code lines.

    Args:
        name: one of `METHODS`.
        models: a tiny model of each family.
        folder: an empty one.
    """
    recipe, family = METHODS[name]
    changes = [f"{key}={value}" for key, value in REPLACED.items()]
    changes += [f"model.family={family}", f"model.path={models[family]}"]
    changes += REPLACED_IN.get(recipe, ())
    if recipe == "emoji_diffusion_dpo.yaml":
        plain = Run.load(RECIPES / "emoji_ddpo.yaml", changes)
        pairs = draw_pairs(plain, ["a cat"], count=2, out=folder / "pairs", reporter=Silent())
        changes.append(f"algorithm.pairs={pairs.path}")
    run = Run.load(RECIPES / recipe, changes)
    policy = Policy(run.model.load(pick_device(), seed=run.seed), run.sampler)
    if isinstance(run.algorithm, DiffusionDPO):
        run.algorithm.load(policy.model, on_picture=Silent().step)
    session = Session(
        run,
        policy,
        score=load_scorer(run.reward, pick_device(), on_invalid=run.on_invalid_reward, ensemble=run.ensemble),
        learner=Learner(policy.model.trainable(), run.optimizer, ALONE),
        directory=RunDirectory.create(folder / "run", run),
        reporter=Silent(),
    )
    called = _watch(session)
    return {function: lines for function in sorted(called) if (lines := _code_lines(function))}


def _watch(session: Session) -> set[Function]:
    called: set[Function] = set()
    library = f"{LIBRARY}/"

    def note(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(library):
            called.add((code.co_filename.removeprefix(library), code.co_qualname, code.co_firstlineno))

    session.update(0)
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        session.update(1)
    finally:
        sys.setprofile(before)
    return {function for function in called if not _left_out(function[0])}


def _left_out(file: str) -> bool:
    return file.startswith(tuple(LEFT_OUT)) and file not in COUNTED_IN_REWARDS


def _code_lines(function: Function) -> set[int]:
    """Numbers of a function's code lines, decorators included; none where it is no `def` but a lambda or the like."""
    file, _, first = function
    text, functions = _functions(LIBRARY / file)
    node = functions.get(first)
    if node is None:
        return set()
    documented = ast.get_docstring(node, clean=False) is not None
    docstring = range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1) if documented else range(0)
    span = set(range(first, (node.end_lineno or 0) + 1)) - set(docstring)
    return {line for line in span if (code := text[line - 1].strip()) and not code.startswith("#")}


@cache
def _functions(path: Path) -> tuple[list[str], dict[int, ast.FunctionDef]]:
    """The lines of a file, and its functions by where they begin, which is at the first decorator."""
    text = path.read_text(encoding="utf-8")
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    begin = {min(line.lineno for line in (node, *node.decorator_list)): node for node in found}
    return text.splitlines(), begin


def total(functions: Mapping[Function, set[int]]) -> int:
    """Code lines of them all; those of a function within a function count once."""
    return len({(file, line) for (file, _, _), lines in functions.items() for line in lines})


def longest(functions: Mapping[Function, set[int]], count: int = 15) -> str:
    """The functions with most lines, one to a line."""
    order = sorted(functions, key=lambda function: -len(functions[function]))[:count]
    return "\n".join(f"{len(functions[each]):4}  {each[0]}: {each[1]}" for each in order)


def table(measured: Mapping[str, Mapping[Function, set[int]]]) -> str:
    """The table of docs/concepts.md."""
    rows = ["| one update of | code lines | functions | files |", "| --- | --- | --- | --- |"]
    for name, functions in measured.items():
        files = {file for file, _, _ in functions}
        rows.append(f"| {name} | {total(functions)} | {len(functions)} | {len(files)} |")
    return "\n".join(rows)


def main() -> None:
    """Print the table; with a name of `METHODS`, the functions of that method."""
    from tiny import save_tiny_model, save_tiny_xl_model

    names = sys.argv[1:] or list(METHODS)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        models = {"sd": save_tiny_model(root / "sd"), "sdxl": save_tiny_xl_model(root / "sdxl")}
        measured = {name: measure(name, models, root / name) for name in names}
    sys.stdout.write(table(measured) + "\n")
    for functions in (measured[name] for name in sys.argv[1:]):
        sys.stdout.write(f"\n{longest(functions, len(functions))}\n")


if __name__ == "__main__":
    main()
