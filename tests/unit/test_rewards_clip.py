"""Rewards on CLIP towers against transformers' own CLIPModel.forward, on tiny models with random weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_rewards import MEAN, PROMPTS, STD, pictures, save_head, save_tiny_aesthetic, save_tiny_clip
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from tailorpo.errors import RewardError
from tailorpo.rewards import Aesthetic, ClipPreference, ClipScore, EmojiJudge, EmojiPreference, PickScore, Scorer
from tailorpo.rewards.aesthetic import HEAD
from tailorpo.rewards.clip import CHUNK, ClipScorer
from tailorpo.rewards.preprocess import Preprocess


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def reward(folder: Path) -> ClipScorer:
    return ClipPreference(path=str(folder)).load("cpu")


def oracle(folder: Path, images: Tensor) -> np.ndarray:
    """transformers' forward on the whole batch, padded to the longest prompt; the diagonal of its matrix."""
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = CLIPTokenizer.from_pretrained(folder)(list(PROMPTS), padding=True, return_tensors="pt")
    pixels = (images.numpy() - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    with torch.no_grad():
        output = model(pixel_values=torch.from_numpy(pixels).float(), **tokens)
    return np.diag(output.logits_per_image.numpy())


def test_the_score_is_the_diagonal_of_the_models_own_logits(folder: Path, reward: ClipScorer) -> None:
    images = pictures()
    scores = reward(images, PROMPTS)
    assert scores.dtype == torch.float32
    assert np.allclose(scores.numpy(), oracle(folder, images), rtol=1e-4, atol=1e-5)
    assert scores.std() > 1e-3


def test_order_company_and_repetition_do_not_change_a_score(reward: ClipScorer) -> None:
    images, order = pictures(), [3, 1, 0, 2]
    together = reward(images, PROMPTS)
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)])
    assert torch.allclose(alone, together, rtol=1e-5, atol=1e-5)
    permuted = reward(images[order], [PROMPTS[i] for i in order])
    assert torch.allclose(permuted, together[order], rtol=1e-5, atol=1e-5)
    assert torch.equal(reward(images, PROMPTS), together)


def test_the_gradient_reaches_the_pictures_and_not_the_weights(reward: ClipScorer) -> None:
    images = pictures(2).requires_grad_()
    Scorer([(reward, 1.0)])(images, PROMPTS[:2]).sum().backward()
    assert images.grad is not None
    direction, step = images.grad / images.grad.norm(), 2e-2
    with torch.no_grad():
        ahead, behind = (reward(images + sign * step * direction, PROMPTS[:2]).sum() for sign in (1, -1))
    assert float(ahead - behind) / (2 * step) == pytest.approx(float(images.grad.norm()), rel=2e-2)
    assert all(not p.requires_grad and p.grad is None and p.dtype == torch.float32 for p in reward.model.parameters())


def test_a_model_in_training_mode_is_put_into_eval_mode(folder: Path) -> None:
    config = CLIPConfig.from_pretrained(folder)
    config.vision_config.attention_dropout = 0.5
    model = CLIPModel.from_pretrained(folder, config=config).train()
    reward = ClipScorer(model, Preprocess(size=32), tokenize=lambda _: [52, 1, 53], name="tiny")
    assert torch.equal(reward(pictures(), PROMPTS), reward(pictures(), PROMPTS))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (47, 47), (48, 71), (80, 50)])
def test_resizing_agrees_with_pillow(reward: ClipScorer, height: int, width: int) -> None:
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 5 + y / 9), np.cos(x / 7), np.sin(y / 3)], axis=-1)
    pixels = ((waves + 1) * 127.5).round().astype(np.uint8)
    short = min(height, width)
    resized = Image.fromarray(pixels).resize(
        (int(32 * width / short), int(32 * height / short)), Image.Resampling.BICUBIC
    )
    left, top = (resized.width - 32) // 2, (resized.height - 32) // 2
    expected = np.asarray(resized.crop((left, top, left + 32, top + 32)), dtype=np.float64) / 255
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    got = reward.preprocess(images)[0].permute(1, 2, 0).numpy() * np.array(STD) + np.array(MEAN)
    assert np.abs(got - expected).max() < 1.6 / 255  # Pillow rounds to bytes after each of its two passes


def test_long_prompts_are_cut_and_empty_ones_scored(reward: ClipScorer) -> None:
    scores = reward(pictures(2), ["a very long prompt " * 50, ""])
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), r"there is no folder .*; it has to hold a transformers CLIPModel"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing in"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is not valid JSON"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "blip"}'),
            r"a 'blip' model, not a CLIPModel",
        ),
        (lambda folder: [p.unlink() for p in folder.glob("[tv]o*.*")], r"no tokenizer"),
        (
            lambda folder: (folder / "tokenizer.json").rename(folder / "vocab.json"),
            r"no tokenizer \(tokenizer\.json, or vocab\.json and merges\.txt\)",
        ),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), r"preprocessor_config\.json is missing"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"0" * 64), r"cannot be read: SafetensorError"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"cannot be read: OSError"),
    ],
)
def test_a_folder_that_cannot_be_used(folder: Path, tmp_path: Path, damage, message: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy)
    with pytest.raises(RewardError, match=message):
        ClipPreference(path=str(copy)).load("cpu")


def test_weights_that_are_missing_are_not_filled_with_noise(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    model = CLIPModel.from_pretrained(copy)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("text_model")}
    model.save_pretrained(copy, state_dict=state)
    with pytest.raises(RewardError, match=r"weights are missing in .*text_model"):
        ClipPreference(path=str(copy)).load("cpu")


def test_features_and_the_threshold_of_good_pictures(folder: Path, reward: ClipScorer, tmp_path: Path) -> None:
    features = reward.embed(pictures(3))
    assert features.shape[0] == 3
    assert torch.allclose(features.norm(dim=-1), torch.ones(3), atol=1e-6)
    assert reward.good_threshold is None
    copy = Path(shutil.copytree(folder, tmp_path / "clip"))
    for text, expected in (('{"threshold": 1.5, "n": 7}', 1.5), ('{"n": 7}', None)):
        (copy / "quality.json").write_text(text)
        assert ClipPreference(path=str(copy)).load("cpu").good_threshold == expected
    (copy / "quality.json").write_text('{"threshold": "high"}')
    with pytest.raises(RewardError, match="is no number"):
        ClipPreference(path=str(copy)).load("cpu")


@pytest.mark.parametrize("config", [EmojiPreference(), EmojiJudge()], ids=lambda config: config.name)
def test_bundled_rewards_are_ready_to_use(config: EmojiPreference | EmojiJudge) -> None:
    reward = config.load("cpu")
    images, prompts = pictures(2, 64).requires_grad_(), ["a cat", "a red apple on a blue background"]
    scores = reward(images, prompts)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    assert (scores != reward(images, prompts[::-1])).all()
    assert all(weight.dtype == torch.float32 and not weight.requires_grad for weight in reward.model.parameters())


def test_bundled_rewards_say_where_they_come_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tailorpo.rewards.clip_preference._ASSETS", tmp_path)
    with pytest.raises(RewardError, match=r"'emoji_judge'.*reinstall tailorpo, or run `make miniature`"):
        EmojiJudge().load("cpu")


@pytest.fixture
def aesthetic(tmp_path: Path) -> Path:
    return save_tiny_aesthetic(tmp_path / "aesthetic")


def test_the_aesthetic_score_is_its_layers_one_after_the_other(folder: Path, aesthetic: Path) -> None:
    reward = Aesthetic(path=str(aesthetic)).load("cpu")
    images = pictures().requires_grad_()
    scores = Scorer([(reward, 1.0)])(images, PROMPTS)
    # The same number another way: the whole CLIPModel's embedding, and the chain of layers that the library multiplies
    # out.
    pixels = (images.detach().numpy() - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        embeddings = model(
            pixel_values=torch.from_numpy(pixels).float(), input_ids=torch.ones(4, 3).long()
        ).image_embeds
    state = torch.load(aesthetic / HEAD, weights_only=True)
    for number in (0, 2, 4):
        embeddings = F.linear(embeddings, state[f"layers.{number}.weight"], state[f"layers.{number}.bias"])
    assert np.allclose(scores.detach().numpy(), embeddings[:, 0].numpy(), rtol=1e-4, atol=1e-4)
    assert scores.std() > 1e-3
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path: path.unlink(),
            r"is missing in .*\n  curl -L .*improved-aesthetic-predictor.*3\.7 MB; Apache",
        ),
        (lambda path: path.write_bytes(b"no weights"), r"linearMSE\.pth cannot be read"),
        (lambda path: torch.save({"weight": torch.ones(2)}, path), r"it holds \['weight'\], expected only.*layers\.N"),
        (lambda path: torch.save([1, 2], path), r"holds no weights"),
        (lambda path: save_head(path, (768, 4, 1)), r"from the 24 numbers .* its layers are \(4, 768\), \(1, 4\)"),
        (lambda path: save_head(path, (24, 4, 2)), r"to one score; its layers are \(4, 24\), \(2, 4\)"),
    ],
)
def test_an_aesthetic_head_that_cannot_be_used(aesthetic: Path, make, message: str) -> None:
    make(aesthetic / HEAD)
    with pytest.raises(RewardError, match=message):
        Aesthetic(path=str(aesthetic)).load("cpu")


# -- PickScore and CLIPScore ---------------------------------------------------------------------------------------


def test_pickscore_reads_the_buffers_of_its_old_checkpoint_and_scores_as_the_model_does(
    folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "pickscore"))
    state = load_file(copy / "model.safetensors")
    for tower, length in (("text_model", 16), ("vision_model", 17)):
        state[f"{tower}.embeddings.position_ids"] = torch.arange(length)[None].flip(1).contiguous()  # not to be used
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    images = pictures()
    scores = PickScore(path=str(copy)).load("cpu")(images, PROMPTS)
    assert np.allclose(scores.numpy(), oracle(folder, images), rtol=1e-4, atol=1e-5)


def test_conventions_of_clip_score(folder: Path, tmp_path: Path) -> None:
    images, prompts = pictures(), ["a cat", "\uff52\uff45\uff44", "dog", "sn&#97;il"]
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():  # turned against the first prompt's features, so that cosines of both signs come up
        texts = model.get_text_features(
            **CLIPTokenizer.from_pretrained(folder)(prompts, padding=True, return_tensors="pt")
        )
        away = F.normalize(texts.pooler_output.mean(0), dim=0)
        weight = model.visual_projection.weight
        weight -= torch.outer(away, away @ weight)
    folder = Path(shutil.copytree(folder, tmp_path / "clip"))
    model.save_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    pixels = torch.from_numpy((images.numpy() - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))).float()

    def cosine(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            output = model(pixel_values=pixels, **tokens)
        return F.cosine_similarity(output.image_embeds, output.text_embeds)

    def scored(convention) -> Tensor:
        return ClipScore(path=str(folder), convention=convention).load("cpu")(images, prompts)

    plain = cosine(prompts)
    assert plain.min() < 0 < plain.max()  # or else nothing would be clipped
    assert torch.allclose(scored("cosine"), plain, atol=1e-6)
    assert torch.allclose(scored("torchmetrics"), 100 * plain.clamp(min=0), atol=1e-4)
    texts = [f"A photo depicts {text}" for text in ("a cat", "red", "dog", "snail")]
    assert torch.allclose(scored("paper"), 2.5 * cosine(texts).clamp(min=0), atol=1e-6)
    assert not torch.allclose(cosine(texts), plain, atol=1e-3)


def test_a_batch_of_more_than_one_chunk(folder: Path, aesthetic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, prompts = pictures(CHUNK + 3), ["a cat", "dog", "red"] * 11 + ["", "horse"]
    for reward in (ClipScore(path=str(folder)).load("cpu"), Aesthetic(path=str(aesthetic)).load("cpu")):
        together = reward(images, prompts)
        parts = [reward(images[i : i + 5], prompts[i : i + 5]) for i in range(0, len(images), 5)]
        assert together.shape == (CHUNK + 3,)
        assert torch.allclose(together, torch.cat(parts), atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_and_keeps_the_gradient(folder: Path, dtype) -> None:
    images = pictures().requires_grad_()
    exact = PickScore(path=str(folder)).load("cpu")(images, PROMPTS)
    reward = PickScore(path=str(folder), dtype=dtype).load("cpu")
    scores = reward(images, PROMPTS)
    assert scores.dtype == torch.float32
    assert 0 < (scores - exact).abs().max() < 0.05 * exact.abs().max()
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    (expected,) = torch.autograd.grad(exact.sum(), images)
    assert F.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0) > 0.97
