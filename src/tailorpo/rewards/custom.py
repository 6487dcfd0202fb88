"""A reward of the user's own, by import path ("my_package.module:make_reward") or as a Python object.

What the path names may be
  - a class or a factory function: called once with `args`, and what it returns is the reward;
  - the reward itself: an object, or a function that needs exactly two arguments (and gets no `args`).

The current directory can be imported from, as with `python -m`. A factory with a parameter `device` is given it.
The reward gets a copy of the pictures, so that working in place cannot change what training goes on with, and may
return a tensor, a NumPy array or a list of numbers.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from tailorpo.errors import RewardError
from tailorpo.settings import did_you_mean

_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*(#\d+)?")
_objects: dict[str, Callable[..., Any]] = {}
"""Rewards handed over as Python objects in this process, by the name their CustomReward goes by."""


@dataclass(frozen=True, kw_only=True)
class CustomReward:
    """Your own reward: `name` is "package.module:attribute", `args` the keyword arguments of its factory."""

    name: str
    args: Mapping[str, object] = field(default_factory=dict[str, object])
    needs = "an importable Python module"
    units = "yours; higher is better"
    source = "docs/add_a_reward.md"

    def __post_init__(self) -> None:
        """Raise ValueError for a name that is not an import path."""
        if not _PATH.fullmatch(self.name) and self.name not in _objects:
            raise ValueError(f"a reward of your own is named 'package.module:attribute', not {self.name!r}")

    @classmethod
    def of(cls, function: Callable[..., Any]) -> CustomReward:
        """Wrap a callable (images, prompts) -> one number per picture, for a Run built in Python.

        A function of a module goes by its import path, so that another process can resume a run with it. Anything else
        (a lambda, an instance, what __main__ holds) gets a name with a #, known to this process only.
        """
        kind = function if hasattr(function, "__qualname__") else type(function)
        path = f"{kind.__module__}:{kind.__qualname__}".replace("<", "").replace(">", "")
        if inspect.isfunction(function) and _is_reward(function) and _importable(path, function):
            return cls(name=path)
        names = (f"{path}#{number}" for number in itertools.count(1))
        name = next(name for name in names if _objects.get(name, function) is function)
        _objects[name] = function
        return cls(name=name)

    @property
    def differentiable(self) -> bool:
        """The attribute `differentiable` of what the path names or, without one, of what that makes; else False."""
        target = _objects[self.name] if self.name in _objects else _resolve(self.name)
        value: object = getattr(target, "differentiable", None)
        return value if isinstance(value, bool) else self.load("cpu").differentiable

    def load(self, device: torch.device | str) -> PythonReward:
        """Import it, call the factory if it is one; RewardError, saying what is wrong and how to mend it, otherwise."""
        if self.name in _objects:
            return PythonReward(_objects[self.name], name=self.name)
        return PythonReward(_build(self.name, _resolve(self.name), dict(self.args), device), name=self.name)


class PythonReward:
    """A callable (images, prompts) -> numbers behind the interface of a Reward."""

    def __init__(self, function: Callable[..., Any], *, name: str) -> None:
        """Take the callable; its attribute `differentiable` says whether gradients pass through it (default: no)."""
        self.name = name
        self.differentiable = _flag(name, function)
        self._function = function

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Call it with a copy of the pictures; lists, NumPy arrays and integer tensors come back as float32 tensors."""
        score: object = self._function(images.clone(), tuple(prompts))
        if isinstance(score, Tensor):
            return score if score.is_floating_point() else score.float()
        if isinstance(score, np.ndarray | list | tuple):
            return torch.from_numpy(np.asarray(score, dtype=np.float32)).to(images.device)
        return cast(Tensor, score)  # the Scorer says what is wrong with it


def _flag(name: str, target: object) -> bool:
    value: object = getattr(target, "differentiable", False)
    if not isinstance(value, bool):
        raise RewardError(f"reward {name!r}: its attribute `differentiable` has to be True or False, not {value!r}")
    return value


def _resolve(name: str) -> Any:
    """The object that "package.module:attribute" names."""
    if "#" in name:
        raise RewardError(
            f"reward {name!r} was a Python object of the process that began this run and cannot be made again here. "
            "Put it into a module and name it 'package.module:attribute', or go on from Python"
        )
    module_name, _, attributes = name.partition(":")
    here = str(Path.cwd())
    if "" not in sys.path and here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        target: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise RewardError(f"reward {name!r}: module {module_name!r} needs {error.name!r}, not installed") from error
        raise RewardError(
            f"reward {name!r}: there is no module {error.name!r}{_module_guess(error.name)}\n  it has to be installed, "
            f"or to lie in the directory the command is started from ({here}) as {error.name.replace('.', '/')}.py"
        ) from error
    except Exception as error:  # the user's module is run by importing it and may raise anything
        raise RewardError(f"reward {name!r}: importing {module_name!r} raised {_words(error)}") from error
    for attribute in attributes.split("."):
        if not hasattr(target, attribute):
            names = [entry for entry in dir(target) if not entry.startswith("_")]
            raise RewardError(f"reward {name!r}: {module_name!r} has no {attribute!r}{did_you_mean(attribute, names)}")
        target = getattr(target, attribute)
    return target


def _build(name: str, target: Any, args: dict[str, object], device: torch.device | str) -> Callable[..., Any]:
    """The reward: the target itself, or what it returns if it is a class or a factory."""
    if not callable(target):
        raise RewardError(f"reward {name!r} is a {type(target).__name__}, and cannot be called")
    try:
        signature = inspect.signature(target)
    except ValueError as error:
        raise RewardError(f"reward {name!r}: its parameters cannot be read; wrap it in a Python function") from error
    if _is_reward(target) and not (args and inspect.isroutine(target)):
        if args:
            raise RewardError(f"reward {name!r} is a ready object and takes no args; got {', '.join(sorted(args))}")
        return target
    if "device" in signature.parameters:
        args = {"device": device, **args}
    try:
        signature.bind(**args)
    except TypeError as error:
        guess = "".join(
            did_you_mean(key, list(signature.parameters)) for key in args if key not in signature.parameters
        )
        raise RewardError(
            f"reward {name!r}: the args do not fit: {error}{guess}\n  given: {sorted(args)}\n"
            f"  its signature: {target.__name__}{signature}; a reward itself takes (images, prompts)"
        ) from error
    try:
        reward: object = target(**args)
    except RewardError:
        raise
    except Exception as error:  # the user's factory may raise anything
        raise RewardError(f"reward {name!r}: making it raised {_words(error)}") from error
    if not callable(reward):
        raise RewardError(
            f"reward {name!r} made a {type(reward).__name__}, which cannot be called with (images, prompts); return a "
            "function or an object with __call__"
        )
    return reward


def _is_reward(target: Callable[..., Any]) -> bool:
    """Whether a callable is a reward itself, and no factory: an instance, or a function that needs two arguments."""
    if inspect.isclass(target) or not inspect.isroutine(target):
        return not inspect.isclass(target)
    entries = inspect.signature(target).parameters.values()
    needed = [e for e in entries if e.default is e.empty and e.kind in (e.POSITIONAL_ONLY, e.POSITIONAL_OR_KEYWORD)]
    return len(needed) == 2


def _importable(path: str, function: Callable[..., Any]) -> bool:
    module, _, attribute = path.partition(":")
    return module != "__main__" and getattr(sys.modules.get(module), attribute, None) is function


def _module_guess(name: str) -> str:
    parent, _, last = name.rpartition(".")
    search: list[str] = list(sys.modules[parent].__path__) if parent in sys.modules else [str(Path.cwd())]
    return did_you_mean(last, [module.name for module in pkgutil.iter_modules(search)])


def _words(error: BaseException) -> str:
    """Type, message and the innermost place of an error, on one line."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" (in {Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno})" if trace else ""
    return f"{type(error).__name__}: {error}{where}"
