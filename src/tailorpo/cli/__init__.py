"""The command line: parse, call, print.

Exit codes: 0 done, 1 training or the disk failed (what was saved is kept), 2 a mistake in what was asked for, 130
stopped with Ctrl-C. None of them comes with a traceback; a traceback is a bug of tailorpo.

Everything heavy is imported inside the commands, so that help and mistakes answer at once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Annotated

import typer

from tailorpo import __version__
from tailorpo.cli import look, pictures, runs, serve
from tailorpo.cli.jensen import jensen
from tailorpo.cli.support import polite
from tailorpo.errors import UserError

app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def main() -> None:
    """The `tailorpo` command."""
    app(prog_name="tailorpo")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tailorpo {__version__}")
        raise typer.Exit


def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Align a text-to-image model with a reward by step-wise preferences.

    \b
    Examples:
      tailorpo train recipes/emoji_tailorpo_g.yaml     train, evaluate, write the report
      tailorpo show recipes/emoji_tailorpo_g.yaml      what that would do, and what it costs
      tailorpo sample emoji --prompts "a cat"          draw pictures
    """
    # Models and rewards come from the disk; their libraries neither reach for the network nor chat.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    command, count = context.invoked_subcommand, os.environ.get("WORLD_SIZE") or "1"
    if int(count) > 1 and command not in ("train", "resume", "eval"):
        raise UserError(f"`tailorpo {command}` works in one process, not {count}; start it without a launcher")


_COMMANDS: dict[str, Callable[..., None]] = {
    "train": runs.train,
    "resume": runs.resume,
    "eval": runs.evaluate,
    "report": runs.report,
    "sample": pictures.sample,
    "export": pictures.export,
    "pairs": pictures.pairs,
    "show": look.show,
    "plan": look.plan,
    "jensen": jensen,
    "serve-reward": serve.serve_reward,
    "rewards": look.rewards,
    "models": look.models,
    "experiment": look.experiment,
}

app.callback()(polite(_root))
for _name, _command in _COMMANDS.items():
    app.command(_name)(polite(_command))
