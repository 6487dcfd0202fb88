"""The command line: parse, call, print.

Exit codes: 0 done, 1 training or the disk failed (what was saved is kept), 2 a mistake in what was asked for, 130
stopped with Ctrl-C. None of them comes with a traceback; a traceback is a bug of tailorpo.

Everything heavy is imported inside the commands, so that help and mistakes answer at once.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec, TypeVar, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tailorpo import __version__
from tailorpo.errors import TailorpoError, UserError

if TYPE_CHECKING:
    from tailorpo._distributed import Processes
    from tailorpo.run import Run
    from tailorpo.rundir import RunDirectory
    from tailorpo.train import Reporter


_P = ParamSpec("_P")
_T = TypeVar("_T")


def _polite(command: Callable[_P, None]) -> Callable[_P, None]:
    """Turn the errors that tailorpo raises on purpose into a message and an exit code."""

    @wraps(command)
    def run_politely(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except TailorpoError as error:
            rank = int(os.environ.get("RANK") or 0)
            _say(f"error in process {rank}: {error}" if rank else f"error: {error}")
            raise typer.Exit(2 if isinstance(error, UserError) else 1) from None
        except KeyboardInterrupt:
            _say("stopped")
            raise typer.Exit(130) from None

    return run_politely


app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="A run file (YAML), or the folder of a run.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to replace, e.g. optimizer.lr=3e-4.")
]
Folder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]
Format = Literal["diffusers", "kohya", "peft"]
DType = Literal["float32", "bfloat16", "float16"]
Device = Annotated[
    str | None, typer.Option(help="cuda, cuda:1, mps or cpu; the best there is if not given.", show_default=False)
]


def main() -> None:
    """The `tailorpo` command."""
    app(prog_name="tailorpo")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tailorpo {__version__}")
        raise typer.Exit


@app.callback()
@_polite
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


@app.command()
@_polite
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The run's folder, if not runs/<recipe>-<date>-<time>.", show_default=False),
    ] = None,
    device: Device = None,
) -> None:
    """Train, evaluate and write the report.

    \b
    Examples:
      tailorpo train recipes/emoji_tailorpo_g.yaml
      tailorpo train recipes/emoji_tailorpo_g.yaml updates=20 seed=1 --out runs/short
      tailorpo train recipes/emoji_tailorpo.yaml reward.name=colourfulness algorithm.guidance=null

    Stopped or killed, a run goes on with `tailorpo resume RUN` and ends with the same bits. Several processes share a
    run when `accelerate launch -m tailorpo train ...` or torchrun starts them (docs/scaling.md).
    """
    from tailorpo._distributed import open_processes
    from tailorpo.run import Run
    from tailorpo.rundir import RunDirectory

    def begin() -> tuple[Run, RunDirectory]:
        run = Run.load(_run_file(recipe), overrides or ())
        return run, RunDirectory.create(out or _default_folder(recipe), run)

    _use(device)
    with open_processes() as processes:
        run, directory = _told(processes, begin)
        try:
            _train(run, directory, processes)
        except UserError:
            # It could not even begin: the mistake is mended and the same command typed again.
            if processes.main and not directory.metrics():
                shutil.rmtree(directory.path)
            raise


@app.command()
@_polite
def resume(
    folder: Folder,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="updates, checkpoint_every, eval or trackers.")
    ] = None,
    device: Device = None,
) -> None:
    """Go on with a stopped run, or extend one.

    \b
    Examples:
      tailorpo resume runs/short
      tailorpo resume runs/short updates=200       train on to 200 updates
    """
    from tailorpo._distributed import open_processes
    from tailorpo.checkpoint import latest_update
    from tailorpo.rundir import RunDirectory

    def begin() -> tuple[Run, RunDirectory] | None:
        directory = RunDirectory.open(folder)
        begun = directory.run
        run = begun.resumed(overrides or ())
        done = latest_update(directory.checkpoints)
        if run.updates < done:
            raise UserError(f"{folder} has made {done} updates already; updates={run.updates} would go back")
        if run == begun and run.updates == done and (directory.path / "report.html").exists():
            typer.echo(
                f"All {done} updates are done; extend the run with `tailorpo resume {folder} updates={2 * done}`."
            )
            typer.echo(f"report: {directory.path / 'report.html'}")
            return None
        if run != begun:
            directory.write_run(run)
        return run, directory

    _use(device)
    with open_processes() as processes:
        begun = _told(processes, begin)
        if begun is not None:
            _train(*begun, processes)


@app.command("eval")
@_polite
def evaluate_(
    folder: Folder,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings of eval to replace for this time.")
    ] = None,
    device: Device = None,
) -> None:
    """Compare base and aligned model again.

    Both draw the same prompts from the same seeds; the report is written anew.

    \b
    Examples:
      tailorpo eval runs/short
      tailorpo eval runs/short eval.seeds=16 eval.prompts_unseen.name=animals_unseen
    """
    from tailorpo._distributed import open_processes, pick_device
    from tailorpo.rundir import RunDirectory
    from tailorpo.trained import load_trained, trained_folder

    def begin() -> tuple[Run, RunDirectory]:
        directory = RunDirectory.open(folder)
        return directory.run.resumed(overrides or ()), directory

    _use(device)
    with open_processes() as processes:
        run, directory = _told(processes, begin)
        with _at_work(run, directory, processes) as reporter:
            reporter.phase("loading the model")
            with processes.together():
                model = run.model.load(pick_device(), seed=run.seed)
                load_trained(model, run.model, trained_folder(run.model, directory))
            results = _evaluate(run, directory, model, reporter=reporter, processes=processes)
        if processes.main:
            _print_results(results)
            typer.echo(f"report: {directory.path / 'report.html'}")


@app.command()
@_polite
def report(folder: Folder) -> None:
    """Write report.html from a run's files.

    \b
    Example:
      tailorpo report runs/short
    """
    from tailorpo.report import write_report
    from tailorpo.rundir import RunDirectory

    typer.echo(f"report: {write_report(RunDirectory.open(folder))}")


@app.command()
@_polite
def sample(
    source: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run, a model folder, or `emoji`.")],
    prompts: Annotated[
        list[str], typer.Option("--prompts", help="A prompt, a file of prompts or a bundled list; may be repeated.")
    ],
    lora: Annotated[Path | None, typer.Option(help="Folder of a LoRA; a run has its own.", show_default=False)] = None,
    base: Annotated[bool, typer.Option("--base", help="Draw without the run's LoRA.")] = False,
    seed: Annotated[int, typer.Option(help="Fixes the noise: the same seed, the same pictures.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Pictures per prompt.")] = 4,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.", show_default="the run's, or 20")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Weight of the prompt.", show_default="the run's, or 5")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for PNG files and the contact sheet.")] = Path("samples"),
    device: Device = None,
) -> None:
    """Draw pictures, as PNG files and one contact sheet.

    \b
    Examples:
      tailorpo sample emoji --prompts "a cat" --prompts "a red apple on a blue background"
      tailorpo sample runs/short --prompts animals_unseen --seed 1 --count 2 --out pictures
      tailorpo sample /models/sd15 --lora runs/sd15/lora --prompts prompts.txt
    """
    from tailorpo.sampling import draw

    _use(device)
    with _display(None) as reporter:
        sheet, number = draw(
            source,
            prompts,
            lora=lora,
            base=base,
            seed=seed,
            count=count,
            steps=steps,
            guidance_scale=guidance_scale,
            out=out,
            reporter=reporter,
        )
    typer.echo(f"{number} pictures and their contact sheet: {sheet}")


@app.command()
@_polite
def export(
    folder: Folder,
    format: Annotated[
        Format | None,
        typer.Option("--format", help="Whose names the LoRA's file has.", show_default="diffusers"),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="The whole base model with the LoRA in its weights, in diffusers' format.")
    ] = False,
    dtype: Annotated[DType, typer.Option(help="Of the exported weights.")] = "float32",
    out: Annotated[
        Path | None, typer.Option(help="The folder to make.", show_default="RUN/export/FORMAT or RUN/export/merged")
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(help="The base model's id on the hub, for the model card.", show_default="what its folder says"),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Also upload it to the Hugging Face hub.", show_default="nothing sent"),
    ] = None,
) -> None:
    """Write a LoRA for other programs, or a merged model.

    With a model card that says what was trained and measured. diffusers: for `pipe.load_lora_weights`; kohya: for
    ComfyUI, A1111, Forge; peft: for PeftModel.

    \b
    Examples:
      tailorpo export runs/short --format kohya --dtype float16
      tailorpo export runs/short --merge --out aligned-model
      tailorpo export runs/short --push-to-hub me/my-lora
    """
    if push_to_hub:
        os.environ.pop("HF_HUB_OFFLINE", None)  # the one command that is asked to use the network
    from tailorpo.export import Trained
    from tailorpo.export import export as export_
    from tailorpo.hub import connect, push

    if merge and format is not None:
        raise UserError("--merge writes a whole model, in diffusers' format; leave --format out")
    kind = "merged" if merge else format or "diffusers"
    hub = connect(push_to_hub) if push_to_hub else None
    trained = Trained.open(folder)
    path = export_(trained, out or folder / "export" / kind, format=kind, dtype=dtype, base_id=base_model)
    typer.echo(f"exported: {path.resolve()}")
    if push_to_hub and hub:
        typer.echo(f"uploaded: {push(path, push_to_hub, hub)}")


@app.command()
@_polite
def pairs(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The folder for pairs.jsonl and the pictures.")] = Path("pairs"),
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompts",
            help="A prompt, a file of prompts or a bundled list; may be repeated.",
            show_default="the recipe's",
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Pairs per prompt.")] = 4,
    device: Device = None,
) -> None:
    """Make a data set of preference pairs, for Diffusion-DPO.

    The recipe's base model draws two pictures from the same prompt; its reward says which is better.

    \b
    Examples:
      tailorpo pairs recipes/emoji_diffusion_dpo.yaml --out runs/emoji-pairs
      tailorpo pairs recipes/emoji_tailorpo.yaml reward.name=colourfulness --prompts animals --count 2 --out pairs
    """
    from tailorpo.pair_drawing import draw_pairs
    from tailorpo.prompts import load_prompts
    from tailorpo.run import Run
    from tailorpo.sampling import prompt_texts

    _use(device)
    run = Run.load(_run_file(recipe), overrides or (), files=False)  # the pairs it may name are yet to be made
    texts = [text for prompt in prompts for text in prompt_texts(prompt)] if prompts else load_prompts(run.prompts)
    with _display(None) as reporter:
        drawn = draw_pairs(run, texts, count=count, out=out, reporter=reporter)
    typer.echo(f"left out: {drawn.ties} pairs with equal rewards, {drawn.invalid} with a reward that is not finite")
    typer.echo(f"{drawn.pairs} pairs: {drawn.path}")


@app.command()
@_polite
def show(recipe: Recipe, overrides: Overrides = None) -> None:
    """Show settings, cost and code path of a recipe.

    Every setting is spelt out; files that are missing are named, with exit code 2.

    \b
    Examples:
      tailorpo show recipes/emoji_tailorpo_g.yaml
      tailorpo show recipes/emoji_tailorpo_g.yaml algorithm.update=buffered
    """
    from tailorpo.describe import cost_table, path_table
    from tailorpo.run import Run

    run = Run.load(_run_file(recipe), overrides or (), files=False)
    console = _console()
    console.print(run.to_yaml(), markup=False, highlight=False)
    console.print(cost_table(run))
    console.print(f"Processes: {run.batch.batches} at most can share an update (batch.trajectories / batch.micro)\n")
    console.print(path_table(run))
    missing = run.missing()
    if missing:
        raise UserError(
            "\n".join(["the settings are sound, but to train this is missing:", *(f"  - {m}" for m in missing)])
        )


@app.command()
@_polite
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="h200, h100, a100, l40s, rtx4090, rtx3090, l4 or t4; this (measured now) or cpu (the same).",
            show_default="every GPU in the table",
        ),
    ] = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="Of an hour of --device, in any currency.", show_default=False)
    ] = None,
    efficiency: Annotated[
        float | None,
        typer.Option(min=0.001, max=1, help="Share of the peak that is reached.", show_default="0.25; 0.6 in float32"),
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="sd15, sd21 or sdxl, instead of what is in model.path.", show_default=False)
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Load rewards of unknown size and count them.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Predict operations, memory, hours and money of a recipe.

    Nothing is loaded but config.json files; the weights need not be there.

    \b
    Examples:
      tailorpo plan recipes/sd15_aesthetic_tailorpo_g.yaml
      tailorpo plan recipes/sd15_aesthetic_tailorpo_g.yaml model.dtype=bfloat16 --device h100 --price 2.50
      tailorpo plan recipes/emoji_tailorpo_g.yaml --device this
    """
    from tailorpo.plan.command import show_plan
    from tailorpo.run import Run

    if price is not None and device is None:
        raise UserError("--price is of one device; say which with --device")
    show_plan(
        Run.load(_run_file(recipe), overrides or (), files=False),
        device=device,
        price=price,
        efficiency=efficiency,
        architecture=architecture,
        measure=measure,
        console=None if json_ else _console(),
    )


@app.command()
@_polite
def rewards() -> None:
    """List the rewards.

    With whether gradients pass through them, which TailorPO-G needs, what they need and where to get it.
    """
    from tailorpo.rewards import describe_rewards

    words = {True: "yes", False: "no", None: "as it says"}
    table = Table("name", "gradient", "what it rewards", "needs", "unit", box=None, pad_edge=False)
    for reward in describe_rewards():
        cells = (reward.name, words[reward.differentiable], reward.summary, reward.needs, reward.units)
        table.add_row(*map(escape, cells))
    console = _console()
    console.print(table)
    console.print("Nothing is downloaded for you. To fill the folder (here DIR) that is a reward's `path`:")
    for reward in describe_rewards():
        for each in reward.downloads:
            note = f"  # {reward.name}: {each.size}; licence: {each.licence}"
            console.print(note, each.command("DIR"), sep="\n  ", markup=False, highlight=False, soft_wrap=True)


@app.command("serve-reward")
@_polite
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

    _use(device)
    run = Run.load(_run_file(recipe), overrides or (), files=False)  # the model it names is not needed
    with make_server(run.reward, host=host, port=port) as server:
        typer.echo(announcement(server))
        sys.stdout.flush()
        server.serve_forever()


@app.command()
@_polite
def models() -> None:
    """List the models."""
    from tailorpo.describe import model_table

    _console().print(model_table())


@app.command()
@_polite
def experiment(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Which; --list shows them.")] = None,
    overrides: Overrides = None,
    list_: Annotated[bool, typer.Option("--list", help="List the experiments.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cells and what they cost; run nothing.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time; each is a process with one thread.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="One update of every variant, as a smoke test.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Only these cells, e.g. 'tailorpo*'; may be repeated.")
    ] = None,
    recipes: Annotated[Path, typer.Option(help="The folder of the recipes.")] = Path("recipes"),
    results: Annotated[
        Path | None,
        typer.Option(
            help="The folder of the results.",
            show_default="benchmarks/results/experiments; below --work with --quick or overrides",
        ),
    ] = None,
    work: Annotated[Path, typer.Option(help="The folder of the runs.")] = Path("runs/experiments"),
    states: Annotated[int | None, typer.Option(min=2, help="step-reward: states per step.")] = None,
    continuations: Annotated[int | None, typer.Option(min=2, help="step-reward: of each sibling.")] = None,
    pairs: Annotated[int | None, typer.Option(min=1, help="gradient-direction: pairs of trajectories.")] = None,
    page: Annotated[
        Path | None, typer.Option("--docs", help="Put the results into this page or folder.", show_default=False)
    ] = None,
    cell: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run one of the paper's experiments.

    Finished cells are skipped; one that was stopped goes on from its checkpoint.

    \b
    Examples:
      tailorpo experiment --list
      tailorpo experiment methods --dry-run        the cells, what they cost, what is finished
      tailorpo experiment methods --jobs 2         run them, two at a time
      tailorpo experiment methods --only 'tailorpo-g.*'
      tailorpo experiment --docs docs              tables and plots into its pages
    """
    from tailorpo.experiments import command, conduct
    from tailorpo.experiments.grid import Grid
    from tailorpo.experiments.grid import quick as quick_
    from tailorpo.experiments.runner import Places

    committed = Path("benchmarks/results/experiments")
    if page is not None:
        from tailorpo.experiments.docs import include

        missing = include(page, results or committed)
        typer.echo(f"{page} is up to date; not measured yet: {', '.join(missing) or 'nothing'}")
        return
    if list_ or name is None:
        _console().print(command.experiment_table())
        return
    found, settings = conduct.find(name), tuple(overrides or ())
    own = work / "quick" if quick else work
    # What was not run as the catalogue says stays out of the committed results.
    sizes = {"states": states, "continuations": continuations, "pairs": pairs}
    changed = quick or settings or any(sizes.values())
    written = results or (own / "results" if changed else committed)
    places = Places(written, own)
    if not isinstance(found, Grid):
        start = conduct.settings_of(found, recipes=recipes, overrides=settings, sizes=sizes, smoke=quick)
        command.print_measurement(found, start, _console())
        if not dry_run:
            with _display(None) as reporter:
                conduct.run_measurement(found, start, places, reporter=reporter)
            typer.echo(f"results: {written / name}.json, .md and .webp")
        return
    if any(sizes.values()):
        raise UserError(f"{name} is a grid of training runs; --states, --continuations and --pairs are not for it")
    grid = conduct.Conduct(
        grid=quick_(found) if quick else found,
        places=places,
        recipes=recipes,
        overrides=settings,
        only=tuple(only or ()),
    )
    if cell is not None:
        with _display(None) as reporter:
            grid.run_one(cell, reporter=reporter)
    elif dry_run:
        command.print_plan(grid, _console())
    else:
        folders = ["--recipes", str(recipes), "--results", str(written), "--work", str(work)]
        arguments = [*settings, *folders, *(["--quick"] if quick else [])]
        command.run(grid, jobs=jobs, console=_console(), arguments=arguments)


def _told(processes: Processes, begin: Callable[[], _T]) -> _T:
    """What the main process finds on its disk, told to all."""
    with processes.together():
        found = begin() if processes.main else None
    return cast("_T", processes.broadcast(found))


@contextmanager
def _at_work(run: Run, directory: RunDirectory, processes: Processes) -> Generator[Reporter]:
    """The directory kept from others, and the display, where there is one."""
    from tailorpo._distributed import unused_settings
    from tailorpo.progress import Silent

    with ExitStack() as stack:
        with processes.together():
            if processes.main:
                stack.enter_context(directory.lock())
        reporter = stack.enter_context(_display(run)) if processes.main else Silent()
        unused = unused_settings()
        if unused:
            reporter.note(unused)
        yield reporter


def _train(run: Run, directory: RunDirectory, processes: Processes) -> None:
    """Train to the end, evaluate, report; say how to go on if it is stopped."""
    from tailorpo.train import train as train_

    if processes.main:
        typer.echo(f"run: {directory.path}")
    try:
        with _at_work(run, directory, processes) as reporter:
            model = train_(run, directory, reporter=reporter, processes=processes)
            results = _evaluate(run, directory, model, reporter=reporter, processes=processes)
    except KeyboardInterrupt:
        if processes.main:
            _say(f"stopped; go on with `tailorpo resume {directory.path}`")
        raise typer.Exit(130) from None
    if processes.main:
        _print_results(results)
        typer.echo(f"report: {(directory.path / 'report.html').resolve()}")


def _evaluate(
    run: Run, directory: RunDirectory, model: Any, *, reporter: Reporter, processes: Processes
) -> dict[str, Any]:
    from tailorpo.evaluate import evaluate
    from tailorpo.report import write_report

    results = evaluate(run, directory, model, reporter=reporter, processes=processes)
    if processes.main:
        reporter.phase("writing the report")
        write_report(directory)
    return results


def _print_results(results: dict[str, Any]) -> None:
    from tailorpo.describe import result_table

    _console().print(result_table(results))


@contextmanager
def _display(run: Run | None) -> Generator[Reporter]:
    from tailorpo.progress import display

    with display(_console(), total=run.updates if run else 0) as reporter:
        yield reporter


def _console() -> Console:
    """Where results go. A pipe gets lines as long as they are, not folded at 80 characters."""
    return Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _use(device: str | None) -> None:
    if device is not None:
        os.environ["TAILORPO_DEVICE"] = device


def _run_file(recipe: Path) -> Path:
    return recipe / "run.yaml" if (recipe / "run.yaml").is_file() else recipe


def _default_folder(recipe: Path) -> Path:
    name = recipe.name if recipe.is_dir() else recipe.stem
    stem = f"{re.sub(r'[^A-Za-z0-9._-]', '-', name)}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, number = Path("runs") / stem, 1
    while folder.exists():
        number += 1
        folder = Path("runs") / f"{stem}-{number}"
    return folder
