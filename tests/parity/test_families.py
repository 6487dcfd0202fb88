"""Steps and whole pictures of every family against diffusers: epsilon, v and x_0, spacings, zero terminal SNR, SDXL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from tiny import ZERO_SNR, save_tiny_model, save_tiny_xl_model, tiny_scheduler

from tailorpo.errors import UserError
from tailorpo.models import DiffusionModel, LoRA, ModelConfig
from tailorpo.noise import Noise
from tailorpo.policy import Policy
from tailorpo.prediction import to_x0_and_epsilon
from tailorpo.rollout import rollout_chains, start_trajectories
from tailorpo.samplers import DDIM
from tailorpo.schedule import ddpm_schedule

PROMPTS = ["a cat", "a very long dog"]


def load(folder: Path, **changes: Any) -> DiffusionModel:
    return ModelConfig(path=str(folder), **{"lora": None, **changes}).load("cpu", seed=3)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_every_step_is_the_one_of_the_ddim_scheduler(eta: float, kind: Any, spacing: Any, zero_snr: bool) -> None:
    theirs = tiny_scheduler(prediction_type=kind, timestep_spacing=spacing, rescale_betas_zero_snr=zero_snr)
    theirs.set_timesteps(20)
    ours = ddpm_schedule(theirs.alphas_cumprod, 20, spacing=spacing)
    assert ours.time.tolist() == theirs.timesteps.tolist()
    pure = zero_snr and spacing != "leading"
    assert (float(ours.alpha[0]) == 0) == pure  # exactly, not nearly
    if spacing == "linspace":
        return  # diffusers' own steps do not meet there: see ddpm_schedule
    g = torch.Generator().manual_seed(0)
    x, output, noise = (torch.randn(2, 4, 8, 8, generator=g) for _ in range(3))
    for k, time in enumerate(theirs.timesteps):
        if kind == "epsilon" and pure and k == 0:
            continue  # x_0 is 0 / 0: refused, see below
        expected = theirs.step(output, time, x, eta=eta, variance_noise=noise if eta else None)
        x0, epsilon = to_x0_and_epsilon(output, x, alpha=float(ours.alpha[k]), sigma=float(ours.sigma[k]), kind=kind)
        step = DDIM(steps=20, eta=eta).step(x0, epsilon, ours, k=k)
        torch.testing.assert_close(x0, expected.pred_original_sample, rtol=1e-4, atol=1e-4)
        previous = expected.prev_sample
        if pure and k == 0 and eta:
            # All of 1 - a' is fresh noise. diffusers adds epsilon times the root of what is left of it in float32, a
            # rounding error of either sign, so that it may give NaN.
            left = theirs.alphas_cumprod[int(theirs.timesteps[1])]
            previous = left.sqrt() * x0 + (1 - left).sqrt() * noise
        torch.testing.assert_close(step.sample(noise), previous, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 30, 999, 1000])
def test_a_step_ends_where_the_next_begins(spacing: Any, steps: int) -> None:
    abar = tiny_scheduler().alphas_cumprod.double()
    schedule = ddpm_schedule(abar, steps, spacing=spacing)
    assert len(schedule.time) == steps
    torch.testing.assert_close(schedule.alpha[:-1] ** 2, abar[schedule.time], rtol=1e-12, atol=0)
    # The last two times of "leading" with 1000 steps are both below its offset.
    assert (schedule.time.diff() < 0).sum() >= steps - 2


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_noise_weight_is_the_derivative_by_the_networks_output(kind: Any) -> None:
    zero_snr = kind != "epsilon"
    abar = tiny_scheduler(rescale_betas_zero_snr=zero_snr).alphas_cumprod
    schedule, sampler = ddpm_schedule(abar, 20, spacing="trailing"), DDIM()
    for k in range(20):
        output = torch.ones(1, 1, 1, 1, dtype=torch.float64, requires_grad=True)
        alpha, sigma = float(schedule.alpha[k]), float(schedule.sigma[k])
        x0, epsilon = to_x0_and_epsilon(output, torch.zeros_like(output), alpha=alpha, sigma=sigma, kind=kind)
        step = sampler.step(x0, epsilon, schedule, k=k)
        (slope,) = torch.autograd.grad(step.mean.sum(), output)
        assert sampler.noise_weight(schedule, k, kind=kind) == pytest.approx(abs(float(slope)) / step.std, rel=1e-7)


def test_epsilon_at_pure_noise_is_refused_and_v_is_not(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", **{**ZERO_SNR, "prediction_type": "epsilon"})
    with pytest.raises(UserError, match=r"zero terminal SNR.*model\.prediction_type: v_prediction"):
        Policy(load(folder), DDIM())
    assert float(Policy(load(folder, prediction_type="v_prediction"), DDIM()).schedule.alpha[0]) == 0
    # The run file's word against the model's: the ordinary noise levels, which never reach pure noise.
    ordinary = Policy(load(folder, zero_terminal_snr=False), DDIM())
    assert float(ordinary.schedule.alpha[0]) > 0.05
    other = save_tiny_model(tmp_path / "other")
    declared = load(other, zero_terminal_snr=True, prediction_type="v_prediction").schedule(20)
    assert float(declared.alpha[0]) == 0
    assert int(declared.time[0]) == 999


def compare(pipe: Any, model: DiffusionModel, **call: Any) -> None:
    """A whole eta-0 picture from the same noise: ours, decoded, and the pipeline's."""
    policy = Policy(model, DDIM(steps=10, eta=0.0, guidance_scale=5.0))
    noise = Noise(0)
    start = start_trajectories(policy, PROMPTS, noise=noise, keys=[("x", 0), ("x", 1)])
    initial = start.latents.clone()
    ours = rollout_chains(policy, start, noise=noise)
    pipe.set_progress_bar_config(disable=True)
    settings = {"prompt": PROMPTS, "num_inference_steps": 10, "guidance_scale": 5.0, "eta": 0.0, **call}
    theirs = pipe(latents=initial.clone(), **settings, output_type="latent").images
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    pictures = pipe(latents=initial.clone(), **settings, output_type="pt").images
    torch.testing.assert_close(model.decode(ours), pictures, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scheduler", [{"prediction_type": "v_prediction"}, {"prediction_type": "sample"}, ZERO_SNR])
def test_a_picture_of_sd_is_the_pipelines(scheduler: dict[str, Any], tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", **scheduler)
    compare(StableDiffusionPipeline.from_pretrained(str(folder), safety_checker=None), load(folder))


@pytest.mark.parametrize("size", [None, (24, 16)])
@pytest.mark.parametrize("zeros", [True, False])
def test_a_picture_of_sdxl_is_the_pipelines(zeros: bool, size: tuple[int, int] | None, tmp_path: Path) -> None:
    folder = save_tiny_xl_model(tmp_path / "model")
    pipe = StableDiffusionXLPipeline.from_pretrained(str(folder), force_zeros_for_empty_prompt=zeros)
    pipe.save_pretrained(str(folder))
    height, width = size or (16, 16)
    model = load(folder, family="sdxl", size=size)
    assert model.picture_shape == (3, height, width)
    compare(pipe, model, height=height, width=width)


def test_the_plain_sdxl_pipeline_with_our_lora_draws_our_pictures(tmp_path: Path) -> None:
    folder = save_tiny_xl_model(tmp_path / "model")
    model = load(folder, family="sdxl", lora=LoRA(rank=2, alpha=3.0, targets="attention+conv"))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.trainable().items():
            if ".lora_B." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_lora(tmp_path)
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(str(folder))
    with pytest.raises(AssertionError, match="not close"):
        compare(pipe, model, height=16, width=16)  # without the LoRA it is another model
    pipe.load_lora_weights(str(tmp_path))
    compare(pipe, model, height=16, width=16)
    again = load(folder, family="sdxl", lora=LoRA(rank=2, alpha=3.0, targets="attention+conv"))
    again.load_lora(tmp_path)
    for name, parameter in again.trainable().items():
        torch.testing.assert_close(parameter, model.trainable()[name])


def test_whatever_sampler_the_folder_names_its_noise_levels_are_read(tmp_path: Path) -> None:
    from diffusers import EulerDiscreteScheduler

    folder = save_tiny_model(tmp_path / "model")
    expected = load(folder).schedule(20)
    # SD XL's own folder names Euler; leading with an offset of 1, as it does.
    settings = DDIMScheduler.load_config(str(folder), subfolder="scheduler")
    EulerDiscreteScheduler.from_config(settings).save_pretrained(str(folder / "scheduler"))
    torch.testing.assert_close(load(folder).schedule(20).alpha, expected.alpha)
