"""Commands that draw pictures or write models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from tailorpo.cli.support import Device, Folder, Overrides, Recipe, display, run_file, use_device
from tailorpo.errors import UserError

Format = Literal["diffusers", "kohya", "peft"]
DType = Literal["float32", "bfloat16", "float16"]


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

    use_device(device)
    with display(None) as reporter:
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

    use_device(device)
    run = Run.load(run_file(recipe), overrides or (), files=False)  # the pairs it may name are yet to be made
    texts = [text for prompt in prompts for text in prompt_texts(prompt)] if prompts else load_prompts(run.prompts)
    with display(None) as reporter:
        drawn = draw_pairs(run, texts, count=count, out=out, reporter=reporter)
    typer.echo(f"left out: {drawn.ties} pairs with equal rewards, {drawn.invalid} with a reward that is not finite")
    typer.echo(f"{drawn.pairs} pairs: {drawn.path}")
