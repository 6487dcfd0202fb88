"""Run: the typed, frozen description of one training run, and how it is read, overridden and checked.

A run file is YAML whose sections are the library's own dataclasses; `Run.to_yaml` shows all of it. What is wrong with
one is reported at once: misspelt keys, types, ranges, missing files, combinations that cannot work, each with its line.

    run = Run.load("recipes/emoji_tailorpo.yaml", ["updates=20", "optimizer.lr=1e-3"])

Paths are taken from the working directory and made absolute, so that the copy in a run directory works from anywhere.
Left out: inheritance between run files and interpolation. One run is one file that can be read from top to bottom.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import Field

from tailorpo import __version__
from tailorpo.algorithms.base import Algorithm
from tailorpo.algorithms.d3po import D3PO
from tailorpo.algorithms.ddpo import DDPO
from tailorpo.algorithms.diffusion_dpo import DiffusionDPO
from tailorpo.algorithms.ensembles import ensemble_problems, gate_problems
from tailorpo.algorithms.misranks import misrank_problems
from tailorpo.algorithms.reward_backprop import RewardBackprop
from tailorpo.algorithms.spo import SPO
from tailorpo.algorithms.tailorpo import TailorPO
from tailorpo.errors import RunFileError, UserError
from tailorpo.models import ModelConfig
from tailorpo.optimizer import Optimizer
from tailorpo.pair_dataset import pair_problems
from tailorpo.prompts import PromptsConfig, load_prompts
from tailorpo.rewards import EmojiStepPreference, Ensemble, NeedsFiles, RewardConfig, RewardEntry
from tailorpo.samplers import DDIM
from tailorpo.sentinels.config import Sentinels, may_change, sentinel_problems
from tailorpo.settings import Binder, check_fields, did_you_mean, plain
from tailorpo.step_choice import AutoSteps
from tailorpo.yaml_tree import Tree, override, read_yaml

TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
"""Names a run file may list under `trackers`; each is also that of the package it needs."""

RESUMABLE = ("updates", "checkpoint_every", "eval", "trackers")
"""The settings that may change when a run is resumed: what was trained so far does not depend on them. Of `sentinels`
the rules and what an alarm does may, too (`may_change`)."""

_MAX_BYTES = 1_000_000

Method = TailorPO | D3PO | DDPO | SPO | RewardBackprop | DiffusionDPO
"""What `algorithm` can be, told apart by `name`."""

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """How much goes into one update.

    Attributes:
        trajectories: trajectories per update.
        micro: how many of them go through the network at once; their gradients are added up, so that this changes
            memory and speed, not the result. Only under a buffered update, whose minibatches are cut from these
            batches, does it also decide which rows train together.
    """

    trajectories: Positive = 8
    micro: Positive = 8

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def batches(self) -> int:
        """Batches of an update; each is computed by one process."""
        return -(-self.trajectories // self.micro)


@dataclass(frozen=True, kw_only=True)
class Eval:
    """What the aligned model is measured on, against the model it started from.

    Attributes:
        prompts_seen: prompts of the training; null for all of them.
        prompts_unseen: prompts the training never saw; null for none.
        seeds: pictures per prompt, the same noise for both models.
        batch_size: pictures at once; does not change them.
        judge: a held-out reward that the training does not use; null for none.
    """

    prompts_seen: PromptsConfig | None = None
    prompts_unseen: PromptsConfig | None = None
    seeds: Positive = 4
    batch_size: Positive = 8
    judge: RewardConfig | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run.

    Attributes:
        seed: fixes every random number of the run.
        updates: steps of the training loop.
        checkpoint_every: updates between checkpoints; the last update always makes one.
        reward: one reward or several, whose weighted sum is what the model is aligned with.
        ensemble: how several rewards are combined where siblings are ranked; null for the weighted sum.
        on_invalid_reward: what a reward of NaN or infinity does: "stop", or "skip" the pair and count it.
        sentinels: what is watched during training, and what an alarm does; null for nothing.
        trackers: where metrics also go, names of `TRACKERS`; needs their packages.

    Raises:
        RunFileError: values or combinations that cannot work, all of them at once.
    """

    seed: Count = 0
    updates: Positive
    checkpoint_every: Positive = 10
    model: ModelConfig
    sampler: DDIM = field(default_factory=DDIM)
    algorithm: Method = field(default_factory=TailorPO)
    reward: tuple[RewardEntry, ...]
    ensemble: Ensemble | None = None
    on_invalid_reward: Literal["stop", "skip"] = "stop"
    prompts: PromptsConfig
    optimizer: Optimizer = field(default_factory=Optimizer)
    batch: Batch = field(default_factory=Batch)
    eval: Eval = field(default_factory=Eval)
    sentinels: Sentinels | None = None
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems: list[str] = []
        try:
            check_fields(self)
        except ValueError as error:
            problems.append(str(error))
        problems += _impossible({item.name: getattr(self, item.name) for item in fields(self)})
        if problems:
            raise RunFileError("this run", problems)

    @classmethod
    def load(cls, path: Path | str, overrides: Sequence[str] = (), *, files: bool = True) -> Run:
        """Read a run file and replace single values, each written `key.sub=value`.

        Args:
            files: whether files that the run names must exist; a run directory can be reported without its model.

        Raises:
            RunFileError: every mistake at once.
        """
        tree = read_yaml(_read(Path(path)), str(path))
        override(tree, overrides)
        return cls._from_tree(tree, str(path), files=files)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, files: bool = True) -> Run:
        """A run from the data of a run file; see `load`."""
        return cls._from_tree(Tree(cast(dict[str, Any], plain(data))), "this run", files=files)

    @classmethod
    def _from_tree(cls, tree: Tree, source: str, *, files: bool) -> Run:
        _make_absolute(tree.data)
        _wrap_rewards(tree)
        values = Binder(tree).sections(cls)
        found = _impossible(values) + (missing_files(values) if files else [])
        problems = tree.problems + [tree.located(problem) for problem in found]
        if problems:
            raise RunFileError(source, problems)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The data of a run file that `from_dict` reads back as the same run."""
        data = plain(self)
        entries = [
            {**entry["reward"], "weight": entry["weight"]} | ({"device": entry["device"]} if entry["device"] else {})
            for entry in data["reward"]
        ]
        data["reward"] = entries[0] if len(entries) == 1 else entries
        watched: dict[str, Any] = data["sentinels"] or {"prompts": None}
        evaluated = data["eval"]
        for section, name in (
            (data, "prompts"),
            (evaluated, "prompts_seen"),
            (evaluated, "prompts_unseen"),
            (watched, "prompts"),
        ):
            if section[name] is not None:
                section[name] = {key: value for key, value in section[name].items() if value is not None}
        return data

    def to_yaml(self) -> str:
        """The run file of this run, every setting spelt out."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)
        return f"# every setting of this run; written by tailorpo {__version__}\n{text}"

    def resumed(self, overrides: Sequence[str]) -> Run:
        """This run with changed settings, of which only `RESUMABLE` ones may differ.

        Raises:
            RunFileError: a mistake in the overrides, or a setting that cannot change once a run has begun.
        """
        tree = Tree(self.to_dict())
        override(tree, overrides)
        new = Run._from_tree(tree, "resume", files=True)
        changed = [item.name for item in fields(self) if getattr(self, item.name) != getattr(new, item.name)]
        if may_change(self.sentinels, new.sentinels):
            changed = [name for name in changed if name != "sentinels"]
        refused = [name for name in changed if name not in RESUMABLE]
        if refused:
            raise RunFileError(
                "resume",
                [
                    f"`{name}` cannot change in a run that has begun (only {', '.join(RESUMABLE)} can); "
                    "start a new one with `tailorpo train RUN/run.yaml key=value --out DIR`"
                    for name in refused
                ],
            )
        return new

    def missing(self) -> list[str]:
        """What the run needs from the disk and is not there, one line each."""
        return missing_files({item.name: getattr(self, item.name) for item in fields(self)})


def _read(path: Path) -> str:
    if not path.is_file():
        folder = path.parent
        names = sorted(each.name for each in folder.glob("*.yaml")) if folder.is_dir() else []
        hint = did_you_mean(path.name, names)
        raise RunFileError(str(path), [f"{'this is a folder' if path.is_dir() else 'there is no such file'}{hint}"])
    if path.stat().st_size > _MAX_BYTES:
        raise RunFileError(str(path), [f"{path.stat().st_size:,} bytes; a run file has at most {_MAX_BYTES:,}"])
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RunFileError(str(path), [f"not UTF-8 text (byte {error.start + 1}); is it a run file?"]) from error
    except OSError as error:
        raise RunFileError(str(path), [f"it cannot be read ({error.strerror})"]) from error


def _make_absolute(data: Any) -> None:
    """Make paths that exist below the working directory absolute, in place; a reward's own `args` are left alone."""
    if isinstance(data, list):
        for item in cast(list[Any], data):
            _make_absolute(item)
    elif isinstance(data, dict):
        mapping = cast(dict[str, Any], data)
        for key, value in mapping.items():
            if (
                key in ("path", "file", "pairs", "measured", "misranks", "vae_path", "tiny_vae")
                and isinstance(value, str)
                and Path(value).expanduser().exists()
            ):
                mapping[key] = str(Path(value).expanduser().resolve())
            elif key != "args":
                _make_absolute(value)


def _wrap_rewards(tree: Tree) -> None:
    """`reward: {name, weight, device, ...}` and a list of such, as the entries that the dataclass holds."""
    raw = tree.data.get("reward")
    if raw is None or not isinstance(raw, dict | list):
        return
    single = isinstance(raw, dict)
    entries: list[Any] = []
    for index, item in enumerate([cast(Any, raw)] if single else cast(list[Any], raw)):
        old, new = ("reward",) if single else ("reward", index), ("reward", index)
        # Lines and messages keep the keys as the user wrote them.
        for key, line in list(tree.lines.items()):
            if key[: len(old)] == old:
                tree.lines[(*new, "reward", *key[len(old) :])] = line
                if key[len(old) :] in (("weight",), ("device",)):
                    tree.lines[(*new, *key[len(old) :])] = line
        tree.names[(*new, "reward")] = ".".join(map(str, old))
        own = ("weight", "device")  # the entry's; everything else is the reward's
        for name in own:
            tree.names[(*new, name)] = ".".join([*map(str, old), name])
        if isinstance(item, dict):
            given = cast(dict[str, Any], item)
            fields_ = {key: value for key, value in given.items() if key not in own}
            entries.append({"reward": fields_, **{name: given[name] for name in own if name in given}})
        else:
            entries.append({"reward": item})
    tree.data["reward"] = entries


def _impossible(values: Mapping[str, Any]) -> list[str]:
    """Combinations of sections that cannot work; sections with mistakes of their own are not in `values`."""
    problems: list[str] = []
    rewards: tuple[RewardEntry, ...] | None = values.get("reward")
    algorithm: Algorithm | None = values.get("algorithm")
    if rewards is not None and not rewards:
        problems.append("reward: an empty list; name at least one")
    if algorithm is not None and "sampler" in values and "model" in values:
        try:
            # A reward of the user's own has to be imported to know, so that is only asked where it matters.
            ask = algorithm.needs_gradient and rewards is not None
            differentiable = not ask or all(entry.reward.differentiable for entry in rewards or ())
            trainable = values["model"].trains
            problems += algorithm.problems(
                sampler=values["sampler"], differentiable=differentiable, trainable=trainable
            )
        except UserError as error:
            problems.append(f"reward: {error}")
    if isinstance(algorithm, SPO) and rewards:
        aware = any(isinstance(entry.reward, EmojiStepPreference) for entry in rewards)
        if aware != (algorithm.step_reward == "aware"):
            problems.append(
                f"algorithm.step_reward is {algorithm.step_reward}, but "
                + (
                    "the reward emoji_step_preference is told the time: say aware"
                    if aware
                    else "no reward is told the time: take emoji_step_preference, or say predicted"
                )
            )
    ensemble: Ensemble | None = values.get("ensemble")
    if ensemble is not None and rewards and algorithm is not None:
        problems += ensemble_problems(ensemble, rewards, algorithm)
    problems += gate_problems(algorithm, ensemble)
    sentinels: Sentinels | None = values.get("sentinels")
    if sentinels is not None:
        judge = values.get("eval", Eval()).judge
        problems += sentinel_problems(sentinels, judge=judge, rewards=rewards or (), algorithm=algorithm)
    batch: Batch | None = values.get("batch")
    if batch is not None and batch.micro > batch.trajectories:
        problems.append(f"batch.micro is {batch.micro}, more than the {batch.trajectories} of batch.trajectories")
    optimizer, model = values.get("optimizer"), values.get("model")
    if optimizer and optimizer.name == "adamw8bit" and model and model.full and model.channels_last:
        problems.append(
            "optimizer.name: adamw8bit lays every weight out anew, which undoes model.channels_last of a network"
            " that is trained as a whole; leave channels_last out, or use adamw"
        )
    for name in cast(tuple[str, ...], values.get("trackers", ())):
        if name not in TRACKERS:
            known = did_you_mean(name, TRACKERS) or f"; known are {', '.join(TRACKERS)}"
            problems.append(f"trackers: there is no `{name}`{known}")
        elif find_spec(name) is None:
            problems.append(f"trackers: {name} is not installed; `pip install {name}` or leave it out")
    return problems


def missing_files(values: Mapping[str, Any]) -> list[str]:
    """Of the sections' files and folders, those that are not there or cannot be read."""
    return [problem for name, value in values.items() for problem in _missing(value, name)]


def _missing(value: Any, name: str) -> list[str]:
    if isinstance(value, PromptsConfig):
        try:
            load_prompts(value)
        except UserError as error:
            return [f"{name}: {error}"]
        return []
    if isinstance(value, DiffusionDPO):
        return [f"{name}.pairs: {value.pairs}: {each}" for each in pair_problems(Path(value.pairs).expanduser())]
    if isinstance(value, TailorPO):
        found = [f"{name}.misranks: {each}" for each in misrank_problems(value.misranks)]
        return found + _missing(value.train_steps, f"{name}.train_steps")
    if isinstance(value, ModelConfig):
        return [f"{name}.{problem}" for problem in value.missing()]
    if isinstance(value, Optimizer):
        lacking = value.missing()
        return [f"{name}.name: {lacking}"] if lacking else []
    if isinstance(value, RewardEntry):
        return _missing(value.reward, name)
    if isinstance(value, AutoSteps):
        return [f"{name}.measured: {each}" for each in value.missing()]
    if isinstance(value, NeedsFiles):
        return [f"{name}: {value.name}: {each}" for each in value.missing()]
    if isinstance(value, tuple):
        return [problem for item in cast(tuple[Any, ...], value) for problem in _missing(item, name)]
    if not is_dataclass(value) or isinstance(value, type):
        return []
    problems: list[str] = []
    for item in fields(value):
        inner = getattr(value, item.name)
        if item.name == "path" and isinstance(inner, str):
            if not Path(inner).expanduser().is_dir():
                problems.append(f"{name}.path: there is no folder {inner} (looked from {Path.cwd()})")
        else:
            problems += _missing(inner, f"{name}.{item.name}")
    return problems
