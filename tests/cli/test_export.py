"""`tailorpo export`: files, the model card, the upload, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from synthetic_run import fabricate
from tiny_run import refused, settings, tailorpo, write_recipe

from tailorpo.base_model import BaseModel
from tailorpo.errors import TailorpoError, UserError
from tailorpo.hub import connect, push
from tailorpo.model_card import ModelCard, render_card
from tailorpo.models import ModelConfig
from tailorpo.run import Run
from tailorpo.rundir import RunDirectory

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A finished run of two updates with alpha = 2 rank and convolutions; tests do not change it."""
    folder = tmp_path_factory.mktemp("export")
    model = {"path": str(tiny_folder), "lora": {"rank": 2, "alpha": 4.0, "targets": "attention+conv"}}
    recipe = write_recipe(folder, tiny_folder, model=model, updates=2, optimizer={"lr": 0.05})
    result = tailorpo("train", recipe, "--out", folder / "my run")
    assert result.exit_code == 0, result.output
    return folder / "my run"


def exported(run: Path, out: Path, *options: str) -> Path:
    result = tailorpo("export", run, "--out", out, *options)
    assert result.exit_code == 0, result.output
    assert result.output.strip() == f"exported: {out.resolve()}"
    return out


def draw(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipe("a cat", num_inference_steps=3, guidance_scale=2.0, latents=latents, output_type="latent").images


def test_training_writes_what_it_did_into_the_file(run: Path) -> None:
    with safe_open(run / "lora" / LORA, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["tailorpo.updates"] == metadata["ss_steps"] == "2"
    assert metadata["tailorpo.lora_alpha"] == "4"
    assert metadata["ss_network_alpha"] == "2"  # the scale is in the tensors of this file


def test_the_whole_way_from_a_run_to_the_same_pictures(run: Path, tiny_folder: Path, tmp_path: Path) -> None:
    pipe: Any = StableDiffusionPipeline.from_pretrained(str(tiny_folder), safety_checker=None)
    base = draw(pipe)
    pipe.load_lora_weights(str(run / "lora"))
    expected = draw(pipe)
    assert (expected - base).abs().max() > 1e-3
    folder = exported(run, tmp_path / "merged", "--merge")
    torch.testing.assert_close(
        draw(StableDiffusionPipeline.from_pretrained(str(folder))), expected, rtol=1e-4, atol=1e-4
    )
    for format, file in (("diffusers", LORA), ("kohya", "my-run.safetensors")):
        folder = exported(run, tmp_path / format, "--format", format)
        fresh: Any = StableDiffusionPipeline.from_pretrained(str(tiny_folder), safety_checker=None)
        fresh.load_lora_weights(str(folder), weight_name=file)
        torch.testing.assert_close(draw(fresh), expected, rtol=1e-4, atol=1e-4)
        assert (folder / "before_after.png").read_bytes() == (run / "samples/eval/side_by_side.png").read_bytes()


def test_diffusers_format_is_the_file_of_the_run_and_half_precision_its_rounding(run: Path, tmp_path: Path) -> None:
    whole, state = load_file(exported(run, tmp_path / "a") / LORA), load_file(run / "lora" / LORA)
    assert whole.keys() == state.keys()
    assert all(torch.equal(whole[name], state[name]) for name in state)
    half = load_file(exported(run, tmp_path / "b", "--dtype", "bfloat16") / LORA)
    assert all(torch.equal(half[name], state[name].bfloat16()) for name in state)
    kohya = load_file(exported(run, tmp_path / "c", "--dtype", "float16", "--format", "kohya") / "my-run.safetensors")
    assert {name.endswith(".alpha"): tensor.dtype for name, tensor in kohya.items()} == {
        True: torch.float32,
        False: torch.float16,
    }


def test_without_out_it_goes_into_the_run(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    assert tailorpo("export", copy).exit_code == 0
    assert (copy / "export" / "diffusers" / LORA).is_file()
    assert tailorpo("export", copy, "--merge").exit_code == 0
    assert (copy / "export" / "merged" / "model_index.json").is_file()
    assert "exists already; give another folder with --out" in refused("export", copy)


def test_what_it_refuses(run: Path, tmp_path: Path, tiny_folder: Path) -> None:
    assert "nowhere is not a run directory" in refused("export", tmp_path / "nowhere")
    assert "leave --format out" in refused("export", run, "--merge", "--format", "kohya")
    assert "'ckpt'" in refused("export", run, "--format", "ckpt")
    begun = tmp_path / "begun"
    RunDirectory.create(begun, Run.from_dict(settings(tiny_folder)))
    assert "has no LoRA to export" in refused("export", begun)
    stopped = shutil.copytree(run, tmp_path / "stopped")
    text = (stopped / "run.yaml").read_text()
    (stopped / "run.yaml").write_text(text.replace("updates: 2", "updates: 9"))
    output = refused("export", stopped, "--out", tmp_path / "out")
    assert "is not finished: its LoRA has 2 of 9 updates. Go on with `tailorpo resume" in output
    foreign = shutil.copytree(run, tmp_path / "foreign")
    save_file(load_file(run / "lora" / LORA), foreign / "lora" / LORA)
    assert "does not say how far it was trained" in refused("export", foreign, "--out", tmp_path / "out")
    moved = shutil.copytree(run, tmp_path / "moved")
    (moved / "run.yaml").write_text(text.replace(str(tiny_folder), str(tmp_path / "gone")))
    assert f"there is no folder or file {tmp_path / 'gone'}" in refused("export", moved, "--out", tmp_path / "out")
    damaged = shutil.copytree(run, tmp_path / "damaged")
    (damaged / "lora" / LORA).write_bytes(b"nothing of the kind")
    assert "is not a readable safetensors file" in refused("export", damaged, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".export-*"))


def card(folder: Path, **changes: Any) -> str:
    made = {"base_id": None, "updates": 60, "format": "kohya", "dtype": "float16", "file": "x.safetensors", **changes}
    text = render_card(
        ModelCard(directory=RunDirectory(folder), base=BaseModel.read(ModelConfig(path="emoji")), **made),
        sheet=bool(changes),
    )
    assert not re.search(r"\{[{%]|%\}|\n\n\n", text)
    return text


def front_matter(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def rows(text: str, columns: int) -> list[list[str]]:
    """The cells of a card's tables with that many columns, without headings."""
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [row for row in found if len(row) == columns and not row[0].startswith(("---", "measure"))]


def numbers(cell: str) -> list[float]:
    """Every number in a cell, with its digits."""
    text = cell.replace("\u2212", "-").replace("\u202f", " ").replace(",", "")
    return [float(number) for number in re.findall(r"[-+]?\d+(?:\.\d+)?", text.replace(". ", " "))]


def agree(cell: str, *values: float) -> bool:
    """Whether a cell shows the values, each to the digits that it shows."""
    shown = re.findall(r"[-+]?[\d]+(?:\.(\d+))?", cell.replace("\u2212", "-"))
    pairs = list(zip(numbers(cell.replace(", ", " ")), shown, values, strict=True))
    return all(abs(number - value) <= 0.5000001 * 10.0 ** -len(digits) for number, digits, value in pairs)


def test_every_number_on_the_card_is_the_one_in_eval_json(tmp_path: Path) -> None:
    folder = fabricate(tmp_path / "run")
    evaluation = json.loads((folder / "eval.json").read_text())
    text = card(folder)
    groups = {"": "all", "never seen in training": "unseen"}
    labels = {metric["label"]: (name, metric) for name, metric in evaluation["metrics"].items()}
    checked = set()
    for row in rows(text, 7) + rows(text, 6):
        label, unit = row[0].rsplit(", ", 1) if row[0].endswith((", %", ", kB")) else (row[0], "")
        name, metric = labels[label]
        assert unit == {"share": "%", "pictures": ""}.get(metric["unit"], metric["unit"])
        prompts, base, aligned, difference, last = row[-5:]
        count, _, group = prompts.partition(" ")
        data = evaluation["groups"][groups[group]]["metrics"][name]
        scale = 100 if unit == "%" else 1
        assert int(count) == data["n"]
        assert agree(base, scale * data["base"])
        assert agree(aligned, scale * data["aligned"])
        assert agree(difference, *(scale * data[key] for key in ("difference", "low", "high")))
        if metric["role"] in ("diversity", "alarm"):
            assert agree(last, *(100 * data[key] for key in ("ratio", "ratio_low", "ratio_high")))
        else:
            assert last == f"{data['wins']} of {data['n']}"
        checked.add((name, groups[group]))
    assert checked == {(name, group) for name in evaluation["metrics"] for group in groups.values()}
    assert "| network evaluations | 16,800 guided forwards" in text


def test_the_card_says_how_to_load_each_format_and_states_no_licence(tmp_path: Path) -> None:
    folder = fabricate(tmp_path / "run")
    text = card(folder)
    front = front_matter(text)
    assert front["library_name"] == "diffusers"
    assert front["instance_prompt"] is None
    assert "lora" in front["tags"]
    assert not {"license", "base_model"} & front.keys()
    assert "TODO" in text.partition("## Licence")[2]
    assert 'pipe.load_lora_weights("THIS FOLDER OR REPOSITORY", weight_name="x.safetensors")' in text
    assert "of a size that ComfyUI and A1111 do not know" in text
    known = card(folder, base_id="some-one/sd", format="diffusers")
    assert front_matter(known)["base_model"] == "some-one/sd"
    assert front_matter(known)["base_model_relation"] == "adapter"
    assert 'from_pretrained("some-one/sd")' in known
    assert "![Before and after" in known
    merged = card(folder, base_id="some-one/sd", format="merged", file=None)
    assert front_matter(merged)["base_model_relation"] == "finetune"
    assert "lora" not in front_matter(merged)["tags"]
    assert "load_lora_weights" not in merged
    assert "PeftModel.from_pretrained(pipe.unet" in card(folder, format="peft")


def test_the_card_does_not_praise_what_was_not_shown(tmp_path: Path) -> None:
    worse = card(fabricate(tmp_path / "worse", judge_gain=-0.9))
    assert "**The trained reward rose, but the held-out judge finds the pictures worse.**" in worse
    unjudged = card(fabricate(tmp_path / "unjudged", judge_gain=None))
    assert "No judge apart from the reward was asked" in unjudged
    assert "| held-out judge | none |" in unjudged
    assert "variety was lost" in card(fabricate(tmp_path / "alike", diversity_ratio=0.5))
    unmeasured = card(fabricate(tmp_path / "unmeasured", evaluated=False))
    assert "**Nothing was measured.**" in unmeasured
    assert not rows(unmeasured, 7)


def test_no_path_of_this_machine_is_on_a_card_or_in_a_file(run: Path, tiny_folder: Path, tmp_path: Path) -> None:
    for options in ([], ["--format", "kohya"], ["--format", "peft"], ["--merge"]):
        folder = exported(run, tmp_path / f"out{len(options)}{'-'.join(options)}", *options)
        for path in folder.rglob("*"):
            if path.is_file():
                assert str(tiny_folder.parent).encode() not in path.read_bytes(), path
                assert str(run.parent).encode() not in path.read_bytes(), path
    assert f"path: {tiny_folder.name}" in (folder / "README.md").read_text()


class FakeHub:
    """Remembers what it is told, and what is in the folder at that moment."""

    def __init__(self, error: Exception | None = None) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.error = error

    def create_repo(self, repo_id: str, **options: Any) -> None:
        if self.error:
            raise self.error
        self.told.append((repo_id, options))

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        files = {path.name for path in Path(folder_path).iterdir()}
        self.told.append((repo_id, {"files": files, "message": commit_message}))


def test_pushing_makes_a_private_repository_and_uploads_the_folder(run: Path, tmp_path: Path) -> None:
    folder = exported(run, tmp_path / "out")
    hub = FakeHub()
    assert push(folder, "me/my-lora", hub) == "https://huggingface.co/me/my-lora"
    (created, options), (uploaded, content) = hub.told
    assert (created, options) == ("me/my-lora", {"private": True, "exist_ok": True})
    assert uploaded == "me/my-lora"
    assert content["files"] == {LORA, "README.md", "before_after.png"}
    with pytest.raises(TailorpoError, match=r"the upload to me/x failed \(no way\). The export is in .*out"):
        push(folder, "me/x", FakeHub(ConnectionError("no way")))
    assert (folder / LORA).is_file()


def test_pushing_needs_a_token_and_a_whole_name_before_anything_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    output = refused("export", run, "--out", tmp_path / "out", "--push-to-hub", "me/my-lora")
    assert "there is no token for the Hugging Face hub" in output
    assert "expected owner/name" in refused("export", run, "--out", tmp_path / "out", "--push-to-hub", "my-lora")
    with pytest.raises(UserError, match="Repo id"):
        connect("me/my lora")
    assert not (tmp_path / "out").exists()
