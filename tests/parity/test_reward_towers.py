"""ImageReward and HPSv2 against their official networks, rewritten in plain torch: names and shapes at full size, and
equal scores at a tiny size, through the files and the public `load`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from official_models import Shapes, State, image_reward, open_clip_cosine
from tiny_rewards import (
    HEADS,
    TEXT_HEADS,
    WORDS,
    pictures,
    save_tiny_hpsv2,
    save_tiny_image_reward,
    shrink_hpsv2,
    shrink_image_reward,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from tailorpo.rewards import HPSv2, ImageReward, hpsv2
from tailorpo.rewards import image_reward as ours
from tailorpo.rewards.weights import load_strictly

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
PROMPTS = ["a cat", "red horse snail", "dogs on a hill", ""]


def fixture(name: str) -> dict[str, tuple[int, ...]]:
    shapes = json.loads((FIXTURES / name).read_text())["shapes"]
    return {key: tuple(shape) for key, shape in shapes.items()}


def on_meta(shapes: Shapes) -> State:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def numbers(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


# -- Full size, no weights -----------------------------------------------------------------------------------------


def test_the_fixtures_account_for_every_byte_of_the_official_files_but_the_container() -> None:
    # Sizes of ImageReward.pt (float32, one int64 buffer) and HPS_v2*_compressed.pt (float16) on huggingface.co.
    shapes = fixture("image_reward_shapes.json")
    assert len(shapes) == 625
    floats = numbers(shapes) - 512
    assert floats == 445_737_984 + 927_969
    assert 0 < 1_786_880_927 - 4 * floats - 8 * 512 < 500 * len(shapes)
    shapes = fixture("hpsv2_shapes.json")
    assert len(shapes) == 686
    for size in (1_972_484_501, 1_972_490_005):
        assert 0 < size - 2 * numbers(shapes) < 500 * len(shapes)


def test_every_name_of_image_reward_has_its_place_and_only_the_named_ones_are_dropped() -> None:
    official = fixture("image_reward_shapes.json")
    vision, text, head = ours.to_blip(on_meta(official))
    with torch.device("meta"):
        blip = BlipVisionModel(BlipVisionConfig(**ours.VISION))
        reader = BlipTextModel(BlipTextConfig(**ours.TEXT), add_pooling_layer=False)
    load_strictly(blip, vision, name="image_reward", source=Path("f"))
    load_strictly(reader, text, name="image_reward", source=Path("f"))
    assert sorted(head) == sorted(f"layers.{n}.{kind}" for n in (0, 2, 4, 6, 7) for kind in ("weight", "bias"))
    dropped = [f"blip.{name}_proj.{kind}" for name in ("vision", "text") for kind in ("weight", "bias")]
    assert len(vision) + len(text) + len(head) == len(official) - len(dropped) - 1  # position_ids
    assert ours.to_blip(on_meta({name: official[name] for name in dropped})) == ({}, {}, {})


def test_every_name_of_hpsv2_has_its_place() -> None:
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(**hpsv2.CONFIG))
    state = hpsv2.to_clip(on_meta(fixture("hpsv2_shapes.json")))
    load_strictly(model, state, name="hpsv2", source=Path("f"))
    assert len(state) == 686 + 2 * 2 * (32 + 24)  # one stack of query, key and value became three, weight and bias


def gigaflops(forward: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    return counter.get_total_flops() / 1e9


def test_costs_are_those_in_the_docs() -> None:
    with torch.device("meta"):
        pixels, prompt = torch.empty(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.long)
        huge, base = CLIPModel(CLIPConfig(**hpsv2.CONFIG)), CLIPModel(CLIPConfig())
        sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        large = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, patch_size=14, projection_dim=768))
        blip = BlipVisionModel(BlipVisionConfig(**ours.VISION))
        reader = BlipTextModel(BlipTextConfig(**ours.TEXT), add_pooling_layer=False)
        costs = {
            "hpsv2, pickscore": gigaflops(lambda: huge.get_image_features(pixel_values=pixels)),
            "their prompts": gigaflops(lambda: huge.get_text_features(input_ids=prompt)),
            "clip_score": gigaflops(lambda: base.get_image_features(pixel_values=pixels)),
            "its prompts": gigaflops(lambda: base.get_text_features(input_ids=prompt)),
            "aesthetic": gigaflops(lambda: large(pixel_values=pixels)),
            "image_reward": gigaflops(
                lambda: reader(input_ids=prompt[:, :35], encoder_hidden_states=blip(pixels).last_hidden_state)
            ),
        }
    assert {name: round(cost, 1) for name, cost in costs.items()} == {
        "hpsv2, pickscore": 334.6,
        "their prompts": 47.1,
        "clip_score": 8.8,
        "its prompts": 6.0,
        "aesthetic": 162.0,
        "image_reward": 137.8,
    }
    parts = ((huge, 986.1), (base, 151.3), (large, 304.0), (nn.ModuleList([blip, reader]), 445.3))
    assert all(
        sum(weight.numel() for weight in net.parameters()) / 1e6 == pytest.approx(size, abs=0.05) for net, size in parts
    )


# -- ImageReward, tiny ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    folder = tmp_path_factory.mktemp("image_reward")
    return folder, save_tiny_image_reward(folder)


def official_image_reward(state: State, images: Tensor) -> Tensor:
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})
    tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    return image_reward(
        state, (images - MEAN) / STD, tokens["input_ids"], tokens["attention_mask"], heads=HEADS, text_heads=TEXT_HEADS
    )


def test_image_reward_scores_as_the_official_network(blip: tuple[Path, State], monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_image_reward(monkeypatch)
    folder, state = blip
    scores = ImageReward(path=str(folder)).load("cpu")(pictures(), PROMPTS)
    expected = official_image_reward(state, pictures())
    assert scores.std() > 0.01
    assert (scores - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("changes", "least"),
    [
        ({"vision": {"hidden_act": "quick_gelu"}}, 1e-4),
        ({"text": {"hidden_act": "quick_gelu"}}, 1e-4),
        ({"vision": {"layer_norm_eps": 1e-5}}, 1e-4),  # transformers' default for BLIP's vision tower
        ({"text": {"num_attention_heads": 4}}, 1e-3),
    ],
)
def test_the_comparison_would_notice_other_settings_of_image_reward(
    blip: tuple[Path, State], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], least: float
) -> None:
    shrink_image_reward(monkeypatch, **changes)
    folder, state = blip
    scores = ImageReward(path=str(folder)).load("cpu")(pictures(), PROMPTS)
    assert (scores - official_image_reward(state, pictures())).abs().max() > least


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv.weight", "query", "pixels", "position"])
def test_the_comparison_would_notice_weights_in_the_wrong_place(
    blip: tuple[Path, State], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def damaged(state: State) -> tuple[State, State, State]:
        vision, text, head = to_blip(state)
        if name == "blocks.0.attn.qkv.weight":  # query and key swapped
            q, k, v = vision["encoder.layers.0.self_attn.qkv.weight"].chunk(3)
            vision["encoder.layers.0.self_attn.qkv.weight"] = torch.cat([k, q, v])
        elif name == "query":
            attention = "encoder.layer.1.attention.self."
            swapped = {f"{attention}query.weight": text[f"{attention}key.weight"]}
            text |= {**swapped, f"{attention}key.weight": text[f"{attention}query.weight"]}
        elif name == "pixels":
            vision["embeddings.patch_embedding.weight"] = vision["embeddings.patch_embedding.weight"].flip(1)
        else:
            vision["embeddings.position_embedding"] = vision["embeddings.position_embedding"].roll(1, dims=1)
        return vision, text, head

    to_blip = ours.to_blip
    shrink_image_reward(monkeypatch)
    monkeypatch.setattr(ours, "to_blip", damaged)
    folder, state = blip
    scores = ImageReward(path=str(folder)).load("cpu")(pictures(), PROMPTS)
    assert (scores - official_image_reward(state, pictures())).abs().max() > 1e-4


# -- HPSv2, tiny ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    folder = tmp_path_factory.mktemp("hpsv2")
    return folder, save_tiny_hpsv2(folder)


def official_hpsv2(clip: tuple[Path, State], images: Tensor) -> Tensor:
    folder, state = clip
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    ids = torch.zeros(len(PROMPTS), 16, dtype=torch.long)  # open_clip pads with zeros and does not mask them
    for row, prompt in enumerate(PROMPTS):
        tokens = tokenizer(prompt, truncation=True, max_length=16)["input_ids"]
        ids[row, : len(tokens)] = torch.tensor(tokens)
    return open_clip_cosine(state, (images - MEAN) / STD, ids, heads=HEADS, text_heads=TEXT_HEADS)


def test_hpsv2_scores_as_the_official_network(clip: tuple[Path, State], monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(size=28)
    shrink_hpsv2(monkeypatch)
    scores = HPSv2(path=str(clip[0])).load("cpu")(images, PROMPTS)
    expected = official_hpsv2(clip, images)
    assert scores.std() > 0.01
    assert (scores - expected).abs().max() < 1e-5
    other = HPSv2(path=str(clip[0]), version="2.0").load("cpu")(images, PROMPTS)  # its own file: the signs are turned
    assert (other + expected).abs().max() < 1e-5


def test_the_comparison_would_notice_openais_gelu(clip: tuple[Path, State], monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(size=28)
    shrink_hpsv2(monkeypatch, hidden_act="quick_gelu")
    scores = HPSv2(path=str(clip[0])).load("cpu")(images, PROMPTS)
    assert (scores - official_hpsv2(clip, images)).abs().max() > 1e-4


def transposed(state: State) -> None:
    state["text_projection.weight"] = state["text_projection.weight"].T.contiguous()


def swapped(state: State) -> None:
    query, key = (f"vision_model.encoder.layers.1.self_attn.{letter}_proj.weight" for letter in "qk")
    state[query], state[key] = state[key], state[query]


def exchanged(state: State) -> None:
    first, second = (f"text_model.encoder.layers.0.layer_norm{number}.weight" for number in (1, 2))
    state[first], state[second] = state[second], state[first]


@pytest.mark.parametrize("damage", [transposed, swapped, exchanged])
def test_the_comparison_would_notice_weights_of_hpsv2_in_the_wrong_place(
    clip: tuple[Path, State], monkeypatch: pytest.MonkeyPatch, damage: Callable[[State], None]
) -> None:
    to_clip = hpsv2.to_clip

    def damaged(state: State) -> State:
        renamed = to_clip(state)
        damage(renamed)
        return renamed

    monkeypatch.setattr(hpsv2, "to_clip", damaged)
    images = pictures(size=28)
    shrink_hpsv2(monkeypatch)
    scores = HPSv2(path=str(clip[0])).load("cpu")(images, PROMPTS)
    assert (scores - official_hpsv2(clip, images)).abs().max() > 1e-4
