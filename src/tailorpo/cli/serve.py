"""The command that serves a reward."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tailorpo.cli.support import Device, Overrides, Recipe, run_file, use_device


def serve_reward(
    recipe: Recipe,
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 for any that is free.")] = 8765,
    device: Device = None,
) -> None:
    """Serve a recipe's rewards to other trainings.

    Until Ctrl-C. A run that asks this server has `reward: {name: remote, url: ...}`. Whoever can reach the address can
    ask: there is no password.

    \b
    Examples:
      tailorpo serve-reward recipes/emoji_tailorpo_g.yaml
      tailorpo serve-reward recipes/sd15_image_reward_tailorpo_g.yaml --device cuda:1 --port 9000
    """
    from tailorpo.reward_server import announcement, make_server
    from tailorpo.run import Run

    use_device(device)
    run = Run.load(run_file(recipe), overrides or (), files=False)  # the model it names is not needed
    with make_server(run.reward, host=host, port=port) as server:
        typer.echo(announcement(server))
        sys.stdout.flush()
        server.serve_forever()
