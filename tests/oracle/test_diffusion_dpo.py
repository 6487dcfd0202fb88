"""The loss of Diffusion-DPO against densities, by hand and by count, on a tiny random Stable Diffusion."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny_model
from torch import Tensor
from torch.distributions import Normal

from tailorpo.algorithms.diffusion_dpo import DiffusionDPO, NoisedPairs
from tailorpo.models import LoRA, ModelConfig
from tailorpo.models.sd import StableDiffusion
from tailorpo.models.toy import GaussianMixture
from tailorpo.noise import Noise
from tailorpo.pair_dataset import PairLatents
from tailorpo.policy import Policy
from tailorpo.rollout import start_trajectories
from tailorpo.samplers import DDIM

MakePolicy = Callable[..., Policy]
METHOD = DiffusionDPO(pairs="not read")
NOISE = Noise(0)


def some_pairs(count: int = 5, *, same: bool = False) -> PairLatents:
    """Random latents; winners and losers under prompts of their own, or the loser's copied from the winner's."""
    pictures = Noise(5).normal((2 * count, 4, 8, 8), "pictures")
    prompts = [f"a {'abcdefgh'[row]}" for row in range(count)]
    losers = prompts if same else [f"{prompt} {prompt}" for prompt in prompts]
    return PairLatents(pictures, torch.arange(count), torch.arange(count) + count, prompts, losers)


def keys(count: int, first: int = 0) -> list[tuple[str, int]]:
    return [("train", first + row) for row in range(count)]


@contextmanager
def calls(policy: Policy) -> Iterator[list[dict[str, Any]]]:
    """What the UNet is given and returns, call by call."""
    seen: list[dict[str, Any]] = []

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        text = kwargs["encoder_hidden_states"].detach()
        seen.append({"x": args[0].detach(), "time": args[1], "text": text, "output": output[0]})

    unet: Any = policy.model.unet  # type: ignore[attr-defined]
    handle = unet.register_forward_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


def gradients(policy: Policy, loss: Tensor) -> dict[str, Tensor]:
    parameters = policy.model.trainable()
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), retain_graph=True), strict=True))


@pytest.fixture(scope="module")
def v_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("v") / "model", prediction_type="v_prediction", seed=1)


def v_policy(folder: Path) -> Policy:
    model = StableDiffusion.load(ModelConfig(path=str(folder), lora=LoRA(rank=2)), torch.device("cpu"), seed=3)
    with torch.no_grad():
        for name, parameter in model.trainable().items():
            if ".lora_B." in name:
                parameter.copy_(0.05 * Noise(9).normal(parameter.shape, name))
    return Policy(model, DDIM(guidance_scale=5.0))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("reduction", "beta"), [("mean", 5000.0), ("sum", 0.4)])
def test_loss_and_gradient_are_those_of_normal_densities_in_float64(
    tiny_policy: MakePolicy, v_folder: Path, kind: str, reduction: Any, beta: float
) -> None:
    """Half a squared distance is a log-density: the logit is a difference of log-ratios of normal distributions around
    the outputs, and the target is read off the noised latents that the network was given."""
    policy = tiny_policy(moved=0.05) if kind == "epsilon" else v_policy(v_folder)
    pairs, method = some_pairs(), DiffusionDPO(pairs="not read", beta=beta, reduction=reduction)
    with calls(policy) as seen:
        sample = method.evaluate(policy, pairs, keys(3), noise=NOISE)
    loss = method.loss(policy, sample)

    abar = policy.model.scheduler.alphas_cumprod.double()[seen[0]["time"]].view(-1, 1, 1, 1)  # type: ignore[attr-defined]
    x, x0 = seen[0]["x"].double(), pairs.pictures.double()
    chosen = [NOISE.integer(5, *key, "pair") for key in keys(3)]
    clean = x0[[*chosen, *(5 + row for row in chosen)]]
    epsilon = (x - abar.sqrt() * clean) / (1 - abar).sqrt()
    target = epsilon if kind == "epsilon" else abar.sqrt() * epsilon - (1 - abar).sqrt() * clean
    policy_density, reference_density = (Normal(call["output"].double(), 1.0) for call in seen)
    log_ratio = (policy_density.log_prob(target) - reference_density.log_prob(target).detach()).flatten(1)
    log_ratio = log_ratio.mean(1) if reduction == "mean" else log_ratio.sum(1)
    oracle = -(torch.sigmoid(beta * (log_ratio[:3] - log_ratio[3:]))).log()

    assert float((oracle.detach() - math.log(2)).abs().max()) > 0.01
    torch.testing.assert_close(loss.double(), oracle, rtol=1e-4, atol=1e-5)
    expected = gradients(policy, oracle.sum())
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in gradients(policy, loss.sum()).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5 * largest)


def test_the_gradient_is_the_slope_of_the_loss(tiny_policy: MakePolicy) -> None:
    """Central differences along the gradient: the reference stays where it is when the adapter moves."""
    policy, pairs = tiny_policy(moved=0.05), some_pairs()
    parameters = policy.model.trainable()

    def loss() -> Tensor:
        return METHOD.loss(policy, METHOD.evaluate(policy, pairs, keys(2), noise=NOISE)).sum()

    slopes = gradients(policy, loss())
    norm = float(torch.cat([value.flatten() for value in slopes.values()]).norm())
    size = 0.02 / norm  # the loss moves by 0.02, far above rounding
    values: list[float] = []
    for sign in (1, -2):
        with torch.no_grad():
            for name, slope in slopes.items():
                parameters[name].add_(sign * size * slope / norm)
        values.append(float(loss().detach()))
    assert (values[0] - values[1]) / (2 * size) == pytest.approx(norm, rel=0.02)


def test_before_the_first_update_the_loss_is_log_2_and_swapping_negates_the_gradient(tiny_policy: MakePolicy) -> None:
    policy, pairs = tiny_policy(), some_pairs()
    swapped = replace(
        pairs,
        winner=pairs.loser,
        loser=pairs.winner,
        prompts_winner=pairs.prompts_loser,
        prompts_loser=pairs.prompts_winner,
    )
    both: list[dict[str, Tensor]] = []
    for each in (pairs, swapped):
        sample = METHOD.evaluate(policy, each, keys(2), noise=NOISE)
        assert sample.logit.tolist() == [0.0, 0.0]
        assert sample.figures()["accuracy"].tolist() == [0.5, 0.5]
        loss = METHOD.loss(policy, sample)
        assert loss.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-6)
        both.append(gradients(policy, loss.sum()))
    assert max(float(value.abs().max()) for value in both[0].values()) > 0
    for name, value in both[0].items():
        torch.testing.assert_close(value, -both[1][name], rtol=1e-3, atol=1e-5)


def test_a_picture_against_itself_has_no_gradient(tiny_policy: MakePolicy) -> None:
    """Only if time and noise are the same for both."""
    policy, pairs = tiny_policy(moved=0.05), some_pairs(same=True)
    sample = METHOD.evaluate(policy, replace(pairs, loser=pairs.winner), keys(3), noise=NOISE)
    assert sample.logit.tolist() == [0.0, 0.0, 0.0]
    alone = gradients(policy, sample.gain_winner.sum())
    for name, value in gradients(policy, sample.logit.sum()).items():
        assert float(value.abs().max()) <= 1e-5 * float(alone[name].abs().max())


def test_one_time_and_one_noise_for_both_pictures_and_for_policy_and_reference(tiny_policy: MakePolicy) -> None:
    policy, pairs = tiny_policy(moved=0.05), some_pairs()
    with calls(policy) as seen:
        METHOD.evaluate(policy, pairs, keys(4), noise=NOISE)
    first, second = seen
    assert torch.equal(first["x"], second["x"])
    assert torch.equal(first["time"], second["time"])
    times = first["time"]
    assert torch.equal(times[:4], times[4:])
    assert len(set(times.tolist())) > 1
    alphas: Tensor = policy.model.alphas_cumprod[times].view(-1, 1, 1, 1)
    rows = torch.tensor([NOISE.integer(5, *key, "pair") for key in keys(4)])
    noises = (first["x"] - alphas.sqrt() * pairs.pictures[torch.cat([rows, rows + 5])]) / (1 - alphas).sqrt()
    torch.testing.assert_close(noises[:4], noises[4:], rtol=1e-3, atol=1e-3)
    assert not torch.equal(first["text"][:4], first["text"][4:]), "each picture has its own prompt"


def test_times_are_uniform_over_all_training_times() -> None:
    method, mixture = METHOD, GaussianMixture(torch.ones(1), torch.zeros(1, 2), covariances=torch.eye(2)[None])
    policy = Policy(mixture, DDIM(guidance_scale=1.0))
    pairs = PairLatents(Noise(1).normal((2, 2, 1, 1)), torch.tensor([0]), torch.tensor([1]), [""], [""])
    time = method.evaluate(policy, pairs, keys(2000), noise=NOISE).time
    assert int(time.min()) < 5
    assert int(time.max()) > 994
    counts = torch.histc(time.float(), bins=10, min=0, max=1000)
    assert float(((counts - 200) ** 2 / 200).sum()) < 27.9, "chi-squared with 9 degrees of freedom, p = 0.001"


@pytest.mark.parametrize(("guidance_scale", "forwards"), [(5.0, 2), (1.0, 4)])
def test_the_count_is_what_goes_through_the_network(
    tiny_policy: MakePolicy, guidance_scale: float, forwards: int
) -> None:
    """Two pictures through policy and reference: four latents, which are two guided forwards, or four unguided ones."""
    policy = tiny_policy(guidance_scale=guidance_scale)
    with calls(policy) as seen:
        METHOD.evaluate(policy, some_pairs(), keys(3), noise=NOISE)
    items = sum(len(call["x"]) for call in seen)
    cost = METHOD.cost(20, METHOD.trained_steps(20, noise=NOISE, update=0))
    assert not cost.guided
    assert items == 3 * cost.forwards == policy.evaluations
    assert sum(len(call["x"]) for call in seen if call["output"].requires_grad) == 3 * cost.backwards
    assert policy.forwards == 3 * forwards
    # A step of the sampler counts in the same unit.
    cond = policy.model.encode(["a cat"])
    with calls(policy) as seen:
        policy.step(torch.zeros(1, *policy.model.latent_shape), 3, cond)
    assert len(seen[0]["x"]) == policy.sampler.evaluations_per_forward
    assert policy.forwards == 3 * forwards + 1


def test_rows_do_not_depend_on_their_batch(tiny_policy: MakePolicy) -> None:
    policy, pairs = tiny_policy(moved=0.05), some_pairs()
    together = METHOD.evaluate(policy, pairs, keys(3), noise=NOISE)
    whole = gradients(policy, METHOD.loss(policy, together).sum())
    parts: dict[str, Tensor] = {}
    for row in range(3):
        alone = METHOD.evaluate(policy, pairs, keys(1, row), noise=NOISE)
        assert int(alone.time) == int(together.time[row])
        torch.testing.assert_close(alone.logit[0], together.logit[row], rtol=1e-3, atol=1e-4)
        for name, value in gradients(policy, METHOD.loss(policy, alone).sum()).items():
            parts[name] = parts.get(name, torch.zeros_like(value)) + value
    largest = max(float(value.abs().max()) for value in whole.values())
    for name, value in whole.items():
        torch.testing.assert_close(value, parts[name], rtol=1e-2, atol=1e-4 * largest)


def test_figures_are_the_four_errors(tiny_policy: MakePolicy) -> None:
    policy, pairs = tiny_policy(moved=0.05), some_pairs()
    sample = METHOD.evaluate(policy, pairs, keys(3), noise=NOISE)
    figures = sample.figures()
    bracket = (figures["error_winner"] - figures["error_winner_reference"]) - (
        figures["error_loser"] - figures["error_loser_reference"]
    )
    torch.testing.assert_close(sample.logit.detach() / 256, -bracket / 2, rtol=1e-3, atol=1e-7)
    assert figures["accuracy"].tolist() == [float(value > 0) for value in sample.logit]
    assert not any(value.requires_grad for value in figures.values())


def test_collect_finishes_nothing(tiny_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy()
    monkeypatch.setattr(DiffusionDPO, "load", lambda self, model: some_pairs())
    trajectories = start_trajectories(policy, ["a cat", "a dog"], noise=NOISE, keys=keys(2))
    before, done = trajectories.latents.clone(), list[int]()
    samples = METHOD.collect(
        policy, trajectories, trained=(0,), score=lambda images, prompts: pytest.fail("scored"), noise=NOISE,
        on_step=done.append,
    )  # fmt: skip
    (sample,) = samples
    assert isinstance(sample, NoisedPairs)
    assert sample.k is None
    assert torch.equal(trajectories.latents, before)
    assert trajectories.reward is not None
    assert bool(trajectories.reward.isnan().all())
    assert done == [20]


def test_the_mixture_predicts_at_a_time_of_each_row_what_it_predicts_one_by_one() -> None:
    means, covariances = torch.tensor([[1.0, 0.0], [-1.0, 0.5]]), 0.3 * torch.eye(2).repeat(2, 1, 1)
    model = GaussianMixture(torch.tensor([0.4, 0.6]), means, covariances=covariances)
    x, times = Noise(2).normal((3, 2, 1, 1)), torch.tensor([3, 500, 998])
    together = model.predict(x, times, model.encode([""] * 3), guidance_scale=1.0)
    for row in range(3):
        alone = model.predict(x[row : row + 1], int(times[row]), model.encode([""]), guidance_scale=1.0)
        torch.testing.assert_close(together[row], alone[0])


def test_a_guided_prediction_takes_a_time_for_each_row_too(tiny_policy: MakePolicy) -> None:
    model, times = tiny_policy().model, torch.tensor([3, 500])
    x, cond = Noise(2).normal((2, *model.latent_shape)), tiny_policy().model.encode(["a cat", "a dog"])
    with torch.no_grad():
        together = model.predict(x, times, cond, guidance_scale=3.0)
        for row in range(2):
            one = slice(row, row + 1)
            alone = model.predict(x[one], int(times[row]), cond.rows(one), guidance_scale=3.0)
            torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-5)
