"""Drawing pictures from a run or a model folder, for `tailorpo sample`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load

from tailorpo._distributed import pick_device
from tailorpo.errors import UserError
from tailorpo.images import contact_sheet, save_png
from tailorpo.models import LoRA, ModelConfig
from tailorpo.models.source import family_of
from tailorpo.noise import Noise
from tailorpo.policy import Policy
from tailorpo.prompts import BUNDLED, read_prompts
from tailorpo.rollout import sample_images
from tailorpo.rundir import RUN, RunDirectory
from tailorpo.samplers import DDIM
from tailorpo.trained import LORA_FILE, load_trained, trained_folder

if TYPE_CHECKING:
    from tailorpo.train import Reporter


def draw(
    source: str,
    prompts: Sequence[str],
    *,
    lora: Path | None,
    base: bool,
    seed: int,
    count: int,
    steps: int | None,
    guidance_scale: float | None,
    out: Path,
    reporter: Reporter,
) -> tuple[Path, int]:
    """Draw `count` pictures per prompt and write each, and a contact sheet.

    The noise of a picture depends on the seed, the prompt and its number alone, so that a base and an aligned model can
    be compared picture by picture.

    Returns:
        The path of the contact sheet, and the number of pictures.

    Raises:
        UserError: there is no such model, LoRA or prompt file.
    """
    texts = [text for prompt in prompts for text in prompt_texts(prompt)]
    config, sampler, adapter = _model(source, lora=lora, base=base)
    sampler = replace(
        sampler,
        steps=sampler.steps if steps is None else steps,
        guidance_scale=sampler.guidance_scale if guidance_scale is None else guidance_scale,
    )
    reporter.phase("loading the model")
    model = config.load(pick_device(), seed=seed)
    if adapter is not None:
        load_trained(model, config, adapter)
    jobs = [(text, number) for text in texts for number in range(count)]
    keys = [("sample", text, number) for text, number in jobs]
    reporter.phase("drawing")
    images = sample_images(
        Policy(model, sampler),
        [text for text, _ in jobs],
        noise=Noise(seed),
        keys=keys,
        on_batch=lambda done: reporter.step(done, len(jobs)),
    )
    for index, (image, (text, number)) in enumerate(zip(images, jobs, strict=True)):
        slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "prompt"
        save_png(image, out / f"{index // count + 1:03d}-{slug}-{number + 1}.png")
    captions = [text for text, _ in jobs]
    sheet = contact_sheet(list(images), captions, columns=count if count > 1 else 8)
    return save_png(sheet, out / "contact_sheet.png"), len(jobs)


def prompt_texts(text: str) -> tuple[str, ...]:
    """What `--prompts` means: a bundled list by name, the lines of a file, or the text itself as a prompt."""
    if text in BUNDLED:
        return BUNDLED[text]
    if Path(text).suffix == ".txt" or (len(text) < 256 and Path(text).is_file()):
        return read_prompts(Path(text))
    if not text.strip():
        raise UserError("--prompts: an empty prompt")
    return (text.strip(),)


def _model(source: str, *, lora: Path | None, base: bool) -> tuple[ModelConfig, DDIM, Path | None]:
    """The model, its sampler, and the folder of trained weights to load, if any."""
    if base and lora is not None:
        raise UserError("--base and --lora exclude each other")
    folder = Path(source).expanduser()
    if not (folder / RUN).is_file():
        shape = None if lora is None else lora_shape(lora)
        return ModelConfig(family=family_of(source), path=source, lora=shape), DDIM(), lora
    directory = RunDirectory.open(folder)
    run = directory.run
    if base:
        return replace(run.model, lora=None, full=False), run.sampler, None
    if lora is not None:
        return replace(run.model, lora=lora_shape(lora), full=False), run.sampler, lora
    return run.model, run.sampler, trained_folder(run.model, directory)


def lora_shape(folder: Path) -> LoRA:
    """Rank and targets of a saved LoRA, read from the names and shapes in the file.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = folder / LORA_FILE
    try:
        tensors = load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise UserError(f"there is no readable LoRA at {path} ({error})") from error
    shapes = {name: tensor.shape for name, tensor in tensors.items() if name.endswith(".lora_A.weight")}
    ranks = {shape[0] for shape in shapes.values()}
    if len(ranks) != 1:
        raise UserError(f"the LoRA at {path} is not one that tailorpo writes: ranks {sorted(ranks) or 'missing'}")
    convolutions = any(".conv1." in name or ".conv2." in name for name in shapes)
    return LoRA(rank=ranks.pop(), targets="attention+conv" if convolutions else "attention")
