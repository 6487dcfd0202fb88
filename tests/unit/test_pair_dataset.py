"""The data set of preference pairs: what is read, what is refused and how, and what becomes of the pictures."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from tailorpo import pair_dataset
from tailorpo.algorithms.diffusion_dpo import DiffusionDPO
from tailorpo.errors import UserError
from tailorpo.images import load_png, save_png
from tailorpo.models import ModelConfig
from tailorpo.models.sd import StableDiffusion
from tailorpo.pair_dataset import encode_pairs, load_picture, pair_problems, read_pairs


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number in range(4):
        save_png(torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(number)), tmp_path / f"{number}.png")
    return tmp_path


@pytest.fixture
def model(tiny_folder: Path) -> StableDiffusion:
    return StableDiffusion.load(ModelConfig(path=str(tiny_folder), lora=None), torch.device("cpu"))


def test_prompts_are_one_for_both_or_one_for_each(pictures: Path) -> None:
    path = write(
        pictures,
        {"prompt": "a cat", "winner": "0.png", "loser": "1.png", "reward_winner": 2, "reward_loser": None},
        "",
        {"prompt_winner": "a dog", "prompt_loser": "a pig", "winner": str(pictures / "2.png"), "loser": "0.png"},
    )
    first, second = read_pairs(path)
    assert (first.prompt_winner, first.prompt_loser, first.line) == ("a cat", "a cat", 1)
    assert (second.prompt_winner, second.prompt_loser, second.line) == ("a dog", "a pig", 3)
    assert second.winner == pictures / "2.png"
    assert second.loser == first.winner


def test_every_mistake_is_reported_at_once_with_its_line(pictures: Path) -> None:
    (pictures / "text.png").write_text("no picture")
    path = write(
        pictures,
        {"prompt": "a cat", "winner": "0.png", "loser": "1.png"},
        "{not json",
        ["a cat"],
        {"prompt": "a cat", "winner": "0.png", "loser": "0.png"},
        {"prompt": "a cat", "winner": "gone.png", "loser": "text.png"},
        {"promt": "a cat", "winner": "0.png"},
        {"prompt": 3, "winner": "0.png", "loser": None},
        {"prompt": "a", "prompt_winner": "b", "prompt_loser": "c", "winner": "0.png", "loser": "1.png"},
        {"prompt_winner": "b", "winner": "0.png", "loser": "1.png"},
    )
    found = pair_problems(path)
    for number, words in (
        (2, "not JSON: Expecting property name"),
        (3, 'expected an object such as {"prompt"'),
        (4, "winner and loser are the same picture"),
        (5, f"winner: there is no picture {pictures / 'gone.png'}"),
        (5, f"loser: {pictures / 'text.png'} is not a picture"),
        (6, "unknown key `promt`; did you mean `prompt`?"),
        (6, "`prompt` is missing"),
        (6, "`loser` is missing"),
        (7, "`prompt` has to be text, got 3"),
        (7, "`loser` has to be text, got null"),
        (8, "either `prompt` or `prompt_winner` and `prompt_loser`, not both"),
        (9, "`prompt_loser` is missing"),
    ):
        assert [each for each in found if each.startswith(f"line {number}: {words}")], (number, words, found)
    assert len(found) == 12
    with pytest.raises(UserError) as error:
        read_pairs(path)
    assert all(each in str(error.value) for each in found)


def test_what_is_not_a_list_of_pairs(pictures: Path) -> None:
    assert pair_problems(pictures / "gone.jsonl") == ["no such file"]
    assert pair_problems(pictures) == ["this is a folder; name the file in it that lists the pairs"]
    assert pair_problems(write(pictures, "")) == ["there is no pair in it"]
    binary = pictures / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    assert pair_problems(binary)[0].startswith("it cannot be read: 'utf-8' codec")


def test_many_mistakes_are_counted_not_written_out(pictures: Path) -> None:
    found = pair_problems(write(pictures, *(["{"] * 80)))
    assert len(found) == 51
    assert found[-1] == "and 30 more mistakes"


def test_parquet_needs_pyarrow_and_says_so(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pictures / "pairs.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setattr(pair_dataset, "find_spec", lambda name: None)
    (found,) = pair_problems(path)
    assert "pip install pyarrow" in found


def test_parquet_holds_the_same_columns(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A null is a column that the row does not use. pyarrow is not needed for the tests; where it is, it is used."""
    rows = [
        {"prompt": "a cat", "prompt_winner": None, "prompt_loser": None, "winner": "0.png", "loser": "1.png"},
        {"prompt": None, "prompt_winner": "b", "prompt_loser": "c", "winner": "1.png", "loser": "gone.png"},
    ]
    path = pictures / "pairs.parquet"
    path.write_bytes(b"not parquet")
    try:
        import pyarrow  # type: ignore[import-not-found]
        import pyarrow.parquet  # type: ignore[import-not-found]
    except ImportError:
        table = SimpleNamespace(to_pylist=lambda: rows)
        monkeypatch.setattr(pair_dataset, "find_spec", lambda name: object())
        monkeypatch.setattr(pair_dataset, "import_module", lambda name: SimpleNamespace(read_table=lambda path: table))
    else:
        (found,) = pair_problems(path)
        assert "cannot be read as parquet" in found
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert pair_problems(path) == [f"line 2: loser: there is no picture {pictures / 'gone.png'}"]


def test_pictures_are_reduced_and_cut_in_the_middle_but_never_enlarged(tmp_path: Path) -> None:
    # 60 wide: ten pixels red, forty of a grey ramp, ten blue; 40 high. Its middle square is the ramp.
    wide = Image.new("RGB", (60, 40), (255, 0, 0))
    wide.paste((0, 0, 255), (50, 0, 60, 40))
    for column in range(40):
        wide.paste((6 * column,) * 3, (10 + column, 0, 11 + column, 40))
    wide.save(tmp_path / "wide.png")
    small = load_picture(tmp_path / "wide.png", size=(20, 20))
    assert small.shape == (3, 20, 20)
    ramp = (6 * torch.arange(40.0).view(20, 2).mean(dim=1) / 255).expand(3, 20, 20)
    assert float((small - ramp)[:, :, 2:-2].abs().max()) < 0.01
    assert float((small - ramp).abs().max()) < 0.1, "what little of the cut-off sides the filter reaches"
    exact = load_picture(tmp_path / "wide.png", size=(40, 60))
    assert torch.equal(exact, load_png(tmp_path / "wide.png"))
    with pytest.raises(UserError, match=r"60x40 pixels, fewer than the 64x40 that the model draws"):
        load_picture(tmp_path / "wide.png", size=(40, 64))


def test_latents_are_the_scaled_posterior_means_each_picture_once(pictures: Path, model: StableDiffusion) -> None:
    path = write(
        pictures,
        {"prompt": "a", "winner": "2.png", "loser": "0.png"},
        {"prompt": "b", "winner": "0.png", "loser": "1.png"},
    )
    heard: list[tuple[int, int]] = []
    pairs = encode_pairs(path, model, on_picture=lambda done, total: heard.append((done, total)))
    assert heard == [(3, 3)]
    assert pairs.pictures.shape == (3, *model.latent_shape)
    assert pairs.pictures.dtype == torch.float32
    assert pairs.winner.tolist() == [0, 1]
    assert pairs.loser.tolist() == [1, 2]
    assert list(pairs.prompts_winner) == list(pairs.prompts_loser) == ["a", "b"]
    # diffusers' own posterior, by sampling: its mean is the latent, in the network's scale
    image = load_png(pictures / "2.png")[None] * 2 - 1
    with torch.no_grad():
        posterior = model.vae.encode(image).latent_dist
        draws = torch.stack([posterior.sample(torch.Generator().manual_seed(i)) for i in range(400)])
    error = (draws.mean(dim=0) * model.vae.config["scaling_factor"] - pairs.pictures[0]).abs()
    assert float((error / (posterior.std * model.vae.config["scaling_factor"] / 20)).max()) < 5, "400 draws"


def test_pictures_that_cannot_be_decoded_are_all_named(pictures: Path, model: StableDiffusion) -> None:
    whole = (pictures / "0.png").read_bytes()
    (pictures / "torn.png").write_bytes(whole[: len(whole) // 2])
    save_png(torch.zeros(3, 8, 8), pictures / "tiny.png")
    path = write(
        pictures,
        {"prompt": "a", "winner": "1.png", "loser": "torn.png"},
        {"prompt": "b", "winner": "tiny.png", "loser": "torn.png"},
    )
    assert pair_problems(path) == []
    with pytest.raises(UserError) as error:
        encode_pairs(path, model)
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith(f"  - line 1: cannot read the picture {pictures / 'torn.png'}")
    assert "line 2" in lines[2]
    assert "8x8 pixels, fewer than the 16x16" in lines[2]


def test_a_data_set_is_encoded_once_for_a_model(pictures: Path, model: StableDiffusion) -> None:
    path = write(pictures, {"prompt": "a", "winner": "2.png", "loser": "0.png"})
    first = DiffusionDPO(pairs=str(path)).load(model)
    assert DiffusionDPO(pairs=str(path), beta=1.0).load(model) is first
