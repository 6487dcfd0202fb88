"""Rewards with files to fetch: what is missing and how it is said, damaged and foreign files, invariances.

And that none of it needs torchvision.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_rewards import (
    PROMPTS,
    pictures,
    save_tiny_hpsv2,
    save_tiny_image_reward,
    shrink_hpsv2,
    shrink_image_reward,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from tailorpo.errors import RewardError
from tailorpo.rewards import (
    Aesthetic,
    ClipScore,
    Download,
    HPSv2,
    ImageReward,
    NeedsFiles,
    PickScore,
    Scorer,
    describe_rewards,
    hpsv2,
)
from tailorpo.rewards.affine_head import AffineHead
from tailorpo.rewards.clip import CHUNK
from tailorpo.rewards.weights import build_strictly, load_strictly, read_weights

# -- What is missing -----------------------------------------------------------------------------------------------


def test_a_download_says_what_is_missing_and_how_to_get_it(tmp_path: Path) -> None:
    download = Download(repository="who/what", files=("a.pt|a.safetensors", "b.json"), size="1 GB", licence="MIT")
    assert download.missing(tmp_path) == ["a.pt", "b.json"]
    assert download.command("DIR") == "hf download who/what a.pt b.json --local-dir DIR"
    (tmp_path / "a.safetensors").touch()
    assert download.missing(tmp_path) == ["b.json"]
    plain = Download(repository="https://x.org/y%2Bz", files=("y+z",), size="1 kB", licence="MIT")
    assert plain.command("DIR") == "curl -L --create-dirs -o DIR/y+z https://x.org/y%2Bz"


REWARDS: tuple[Callable[[str], Any], ...] = (
    lambda path: Aesthetic(path=path),
    lambda path: ImageReward(path=path),
    lambda path: HPSv2(path=path),
    lambda path: PickScore(path=path),
    lambda path: ClipScore(path=path),
)


@pytest.mark.parametrize("make", REWARDS)
def test_an_empty_folder_ends_in_the_commands_that_fill_it(make: Callable[[str], Any], tmp_path: Path) -> None:
    reward = make(str(tmp_path))
    assert isinstance(reward, NeedsFiles)
    with pytest.raises(RewardError) as caught:
        reward.load("cpu")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"reward '{reward.name}': this is missing in {tmp_path}")
    assert [line.strip() for line in lines[1:]] == reward.missing()
    assert all(f"--local-dir {tmp_path} " in line or f"-o {tmp_path}/" in line for line in reward.missing())


def test_hpsv2_asks_for_the_file_of_its_version_only(tmp_path: Path) -> None:
    wanted = {version: HPSv2(path=str(tmp_path), version=version).missing()[0] for version in ("2.0", "2.1")}
    assert " HPS_v2_compressed.pt " in wanted["2.0"]
    assert " HPS_v2.1_compressed.pt " in wanted["2.1"]
    (tmp_path / "HPS_v2.1_compressed.pt").touch()
    assert HPSv2(path=str(tmp_path), version="2.0").missing()[0] == wanted["2.0"]
    assert not any("HPS_v2" in line for line in HPSv2(path=str(tmp_path), version="2.1").missing())


def test_rewards_that_clean_prompts_say_so_where_ftfy_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tailorpo.rewards.clean_text.find_spec", lambda name: None)
    assert HPSv2(path=str(tmp_path)).missing()[-1].startswith("pip install ftfy ")
    assert ClipScore(path=str(tmp_path), convention="paper").missing()[-1].startswith("pip install ftfy ")
    assert not any("ftfy" in line for line in ClipScore(path=str(tmp_path)).missing())


def test_every_reward_with_files_names_their_size_and_licence() -> None:
    rows = [row for row in describe_rewards() if row.downloads]
    names = ["aesthetic", "image_reward", "hpsv2", "pickscore", "clip_score", "hpsv3"]
    assert [row.name for row in rows] == names
    assert all(each.size and each.licence and each.files for row in rows for each in row.downloads)


# -- Files that cannot be used -------------------------------------------------------------------------------------


@pytest.fixture
def blip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shrink_image_reward(monkeypatch)
    save_tiny_image_reward(tmp_path)
    return tmp_path


@pytest.fixture
def clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shrink_hpsv2(monkeypatch)
    save_tiny_hpsv2(tmp_path)
    return tmp_path


def edit(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    loaded = torch.load(path, weights_only=True)
    change(loaded.get("state_dict", loaded))
    torch.save(loaded, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blip.visual_encoder.norm.bias"), r"1 missing, such as post_layernorm\.bias"),
        (lambda s: s.update(extra=torch.ones(1)), r"1 left over, such as extra"),
        (lambda s: s.update({"blip.text_encoder.pooler.w": torch.ones(1)}), r"1 left over, such as pooler\.w"),
        (
            lambda s: s.update({"blip.visual_encoder.pos_embed": torch.ones(1, 5, 32)}),
            r"1 of another shape, such as embeddings\.position_embedding",
        ),
        (lambda s: s.pop("mlp.layers.4.bias"), r"expected only layers\.N\.weight"),
        (lambda s: s.update({"mlp.layers.7.weight": torch.ones(1, 5)}), r"does not lead from the 24 numbers"),
    ],
)
def test_an_image_reward_of_another_shape(blip: Path, change: Any, message: str) -> None:
    edit(blip / "ImageReward.pt", change)
    with pytest.raises(RewardError, match=message):
        ImageReward(path=str(blip)).load("cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("visual.proj"), r"1 missing, such as visual_projection\.weight"),
        (lambda s: s.update({"visual.head.weight": torch.ones(1)}), r"1 left over, such as visual\.head\.weight"),
        (
            lambda s: s.update({"transformer.resblocks.1.attn.in_proj_weight": torch.ones(10, 24)}),
            r"3 missing, such as text_model.*k_proj.*1 left over",
        ),
    ],
)
def test_an_hpsv2_of_another_shape(clip: Path, change: Any, message: str) -> None:
    edit(clip / "HPS_v2.1_compressed.pt", change)
    with pytest.raises(RewardError, match=message):
        HPSv2(path=str(clip)).load("cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a\ncat\n", r"vocab\.txt is not the vocabulary of bert-base-uncased: 2 lines, without \[PAD\]"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n" + b"word\n" * 20, r"24 lines, more than the 20 the model knows"),
        (b"\xff\xfe", r"vocab\.txt cannot be read"),
    ],
)
def test_a_vocabulary_that_is_none(blip: Path, text: bytes, message: str) -> None:
    (blip / "vocab.txt").write_bytes(text)
    with pytest.raises(RewardError, match=message):
        ImageReward(path=str(blip)).load("cpu")


def test_a_tokenizer_of_another_model(clip: Path) -> None:
    vocab = json.loads((clip / "vocab.json").read_text())
    vocab["<|endoftext|>"], vocab["<|startoftext|>"] = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
    for file in clip.glob("tokenizer*"):
        file.unlink()
    (clip / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(RewardError, match=r"the tokenizer in .* is not CLIP's"):
        HPSv2(path=str(clip)).load("cpu")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code of a weights file ran",))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b""), r"f\.pt cannot be read"),
        (lambda path: path.write_bytes(b"<html>not found</html>"), r"f\.pt cannot be read"),
        (lambda path: path.write_bytes(pickle.dumps(Evil(), protocol=2)), r"f\.pt cannot be read: UnpicklingError"),
        (lambda path: torch.save({"state_dict": {"a": Evil()}}, path), r"f\.pt cannot be read: UnpicklingError"),
        (lambda path: torch.save({"epoch": 3}, path), r"f\.pt holds no weights"),
        (lambda path: torch.save({}, path), r"f\.pt holds no weights"),
    ],
)
def test_a_file_that_holds_no_weights_and_runs_no_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], write: Any, message: str
) -> None:
    write(tmp_path / "f.pt")
    with pytest.raises(RewardError, match=message):
        read_weights(tmp_path / "f.pt", name="x")
    assert "code of a weights file ran" not in capsys.readouterr().out


def test_the_three_formats_of_weights(tmp_path: Path) -> None:
    state = {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.float16)}
    torch.save(state, tmp_path / "new.pt")
    torch.save({"state_dict": state}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "safe.safetensors")
    for name in ("new.pt", "old.pt", "safe.safetensors"):
        read = read_weights(tmp_path / name, name="x")
        assert all(torch.equal(read[key], value) and read[key].dtype == value.dtype for key, value in state.items())


# -- Building ------------------------------------------------------------------------------------------------------


def test_a_built_network_is_the_saved_one_in_float32_with_its_unsaved_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_hpsv2(monkeypatch)
    config = CLIPConfig(**hpsv2.CONFIG)
    original = CLIPModel(config).half()
    state = {name: value.clone() for name, value in original.state_dict().items()}
    model = build_strictly(CLIPModel, config, state, name="x", source=Path("f"))
    assert all(torch.equal(value, state[name].float()) for name, value in model.state_dict().items())
    buffers = dict(model.named_buffers())
    assert set(buffers) == {f"{tower}_model.embeddings.position_ids" for tower in ("text", "vision")}
    assert all(torch.equal(value, torch.arange(value.shape[1])[None]) for value in buffers.values())
    assert not model.training
    assert all(not weight.requires_grad and weight.dtype == torch.float32 for weight in model.parameters())


def test_strict_loading_fills_a_module_without_memory() -> None:
    source = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    load_strictly(module, source.double().state_dict(), name="x", source=Path("f"))
    assert torch.equal(module[0].weight, source[0].weight.float())
    assert module[0].weight.dtype == torch.float32
    with pytest.raises(RewardError, match=r"2 missing, such as 1\.bias; 1 left over, such as c"):
        load_strictly(module, {**source[0].state_dict(prefix="0."), "c": torch.ones(1)}, name="x", source=Path("f"))


def test_the_multiplied_head_is_its_five_layers() -> None:
    generator = torch.Generator().manual_seed(0)
    widths = (768, 1024, 128, 64, 16, 1)
    state: dict[str, Tensor] = {}
    for number, index in zip((0, 2, 4, 6, 7), range(5), strict=True):
        state[f"layers.{number}.weight"] = torch.randn(widths[index + 1], widths[index], generator=generator) / 28
        state[f"layers.{number}.bias"] = torch.randn(widths[index + 1], generator=generator)
    features = F.normalize(torch.randn(5, 768, generator=generator), dim=-1)
    head = AffineHead.of(dict(reversed(state.items())), 768, name="x", source=Path("f"))
    chain = features
    for number in (0, 2, 4, 6, 7):
        chain = F.linear(chain, state[f"layers.{number}.weight"], state[f"layers.{number}.bias"])
    assert torch.allclose(head(features), chain[:, 0], atol=1e-5)


# -- Invariances ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["image_reward", "hpsv2"])
def path(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if request.param == "hpsv2":
        shrink_hpsv2(monkeypatch)
        save_tiny_hpsv2(tmp_path)
    else:
        shrink_image_reward(monkeypatch)
        save_tiny_image_reward(tmp_path)
    return tmp_path


def load(path: Path, dtype: Any = "float32") -> Any:
    kind = ImageReward if (path / "ImageReward.pt").is_file() else HPSv2
    return kind(path=str(path), dtype=dtype).load("cpu")


def test_order_company_and_repetition_do_not_change_a_score(path: Path) -> None:
    reward, images = load(path), pictures(CHUNK + 2)
    prompts = ["a cat", "red horse on a hill", "dog", ""] * 8 + ["a snail", "cat cat cat cat cat cat"]
    together = reward(images, prompts)
    alone = torch.cat([reward(images[i : i + 1], prompts[i : i + 1]) for i in range(len(images))])
    assert together.std() > 0.01
    assert torch.allclose(alone, together, atol=2e-6)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.allclose(reward(images[order], [prompts[i] for i in order]), together[order], atol=2e-6)
    assert torch.equal(reward(images, prompts), together)


def test_the_gradient_reaches_the_pictures_and_not_the_weights(path: Path) -> None:
    reward, images = load(path), pictures(2, 48).requires_grad_()
    Scorer([(reward, 1.0)])(images, PROMPTS[:2]).sum().backward()
    assert images.grad is not None
    direction, step = images.grad / images.grad.norm(), 1e-2
    with torch.no_grad():
        ahead, behind = (reward(images + sign * step * direction, PROMPTS[:2]).sum() for sign in (1, -1))
    assert float(ahead - behind) / (2 * step) == pytest.approx(float(images.grad.norm()), rel=2e-2)
    networks = [value for value in vars(reward).values() if isinstance(value, nn.Module)]
    assert networks
    assert all(not weight.requires_grad and weight.grad is None for net in networks for weight in net.parameters())
    assert not any(net.training for net in networks)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_and_keeps_the_gradient(path: Path, dtype: str) -> None:
    images = pictures().requires_grad_()
    scores = [load(path, kind)(images, PROMPTS) for kind in ("float32", dtype)]
    assert scores[1].dtype == torch.float32
    assert 0 < (scores[0] - scores[1]).abs().max() < 0.05
    gradients = [torch.autograd.grad(score.sum(), images)[0].flatten() for score in scores]
    assert F.cosine_similarity(*gradients, dim=0) > 0.95


def test_the_prompt_counts(path: Path) -> None:
    reward, images = load(path), pictures(1).expand(3, -1, -1, -1)
    scores = reward(images, ["a cat", "a dog", "cat " * 60])
    assert len(set(scores.tolist())) == 3


def test_image_reward_reads_thirty_five_tokens(blip: Path) -> None:
    reward, images = ImageReward(path=str(blip)).load("cpu"), pictures(1).expand(2, -1, -1, -1)
    longest = "cat " * 33  # and [CLS], [SEP]
    scores = reward(images, [longest, longest + "dog red"])
    assert scores[0].item() == pytest.approx(scores[1].item(), abs=1e-6)
    last = reward(images, [longest, "cat " * 32 + "dog"])
    assert (last[0] - last[1]).abs() > 1e-4


def test_hpsv2_cleans_prompts_and_says_how_it_resized(clip: Path) -> None:
    images = pictures(1, 60)
    reward = HPSv2(path=str(clip)).load("cpu")
    assert torch.equal(reward(images, ["cat"]), reward(images, ["\uff43&#97;t "]))
    old = HPSv2(path=str(clip), antialias=False).load("cpu")
    assert (old(images, ["cat"]) - reward(images, ["cat"])).abs() > 1e-4


# -- Without torchvision -------------------------------------------------------------------------------------------

WITHOUT_TORCHVISION = """
import sys
sys.modules["torchvision"] = None
sys.path.insert(0, sys.argv[1])
import pytest, tiny_rewards as tiny
from pathlib import Path
from tailorpo.rewards import Aesthetic, ClipPreference, ClipScore, HPSv2, ImageReward, PickScore
patch, root = pytest.MonkeyPatch(), Path(sys.argv[2])
tiny.save_tiny_aesthetic(root)
tiny.shrink_image_reward(patch), tiny.save_tiny_image_reward(root)
for kind in (Aesthetic, ClipPreference, PickScore, ClipScore, ImageReward):
    print(kind.__name__, kind(path=str(root)).load("cpu")(tiny.pictures(2), ["a cat", "dog"]).isfinite().all().item())
tiny.shrink_hpsv2(patch), tiny.save_tiny_hpsv2(root)
print("HPSv2", HPSv2(path=str(root)).load("cpu")(tiny.pictures(2), ["a cat", "dog"]).isfinite().all().item())
assert sys.modules["torchvision"] is None
"""


def test_no_reward_needs_torchvision(tmp_path: Path) -> None:
    tests = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", WITHOUT_TORCHVISION, str(tests), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    names = ("Aesthetic", "ClipPreference", "PickScore", "ClipScore", "ImageReward", "HPSv2")
    # transformers imports deepspeed where it is installed, which logs to stdout with a date in brackets.
    said = [line for line in result.stdout.splitlines() if not line.startswith("[")]
    assert said == [f"{name} True" for name in names]
