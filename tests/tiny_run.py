"""Runs of seconds for the tests of the commands: a random tiny model, three prompts, brightness as reward."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor
from typer.testing import CliRunner

from tailorpo.cli import app
from tailorpo.rewards import Brightness


def settings(model_path: Path | str, /, **changes: Any) -> dict[str, Any]:
    """The data of a small run file; changes replace whole sections."""
    return {
        "updates": 3,
        "checkpoint_every": 1,
        "model": {"path": str(model_path), "lora": {"rank": 2}},
        "sampler": {"steps": 4, "guidance_scale": 2.0},
        "algorithm": {"name": "tailorpo", "train_steps": 2},
        "reward": {"name": "brightness"},
        "prompts": {"list": ["a cat", "a dog", "a horse"]},
        "optimizer": {"lr": 1e-3},
        "batch": {"trajectories": 2, "micro": 2},
        "eval": {"seeds": 1, "prompts_seen": {"list": ["a cat", "a dog"]}},
        **changes,
    }


def write_recipe(folder: Path, model_path: Path | str, /, **changes: Any) -> Path:
    """The same as a file."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings(model_path, **changes), sort_keys=False))
    return path


def tailorpo(*arguments: str | Path) -> Any:
    """Run a command in this process. A traceback would be an exception in the result that is not an exit."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refused(*arguments: str | Path) -> str:
    """The message of a command that must end with exit code 2."""
    result = tailorpo(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.output


def outcome(run: Path) -> dict[str, Any]:
    """Everything a run leaves that must not depend on its interruptions."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    checkpoints = sorted((run / "checkpoints").iterdir())
    return {
        "metrics": [{name: value for name, value in line.items() if name != "seconds"} for line in metrics],
        "lora": (run / "lora" / "pytorch_lora_weights.safetensors").read_bytes(),
        "checkpoints": {
            f"{folder.name}/{name}": (folder / name).read_bytes()
            for folder in checkpoints
            for name in ("tensors.safetensors", "state.json")
        },
        "eval": json.loads((run / "eval.json").read_text())["groups"],
    }


def darkness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A judge that falls where the reward of these runs rises."""
    return -Brightness()(images, prompts)
