"""Schedules, samplers and whole pictures against diffusers' own scheduler and pipeline, and DDIM against Bayes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from tailorpo.noise import Noise
from tailorpo.policy import Policy
from tailorpo.prediction import to_x0_and_epsilon
from tailorpo.rollout import rollout_chains, start_trajectories
from tailorpo.samplers import DDIM
from tailorpo.schedule import ddpm_schedule, scaled_linear_alphas_cumprod

SD15: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@pytest.mark.parametrize("steps", [1, 20, 50])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_every_step_is_the_one_of_the_ddim_scheduler(steps: int, eta: float, kind: Any) -> None:
    theirs = DDIMScheduler(**SD15, prediction_type=kind)
    theirs.set_timesteps(steps)
    ours = ddpm_schedule(theirs.alphas_cumprod, steps)
    assert ours.time.tolist() == theirs.timesteps.tolist()
    g = torch.Generator().manual_seed(0)
    x, output, noise = (torch.randn(2, 4, 8, 8, generator=g) for _ in range(3))
    for k, time in enumerate(theirs.timesteps):
        expected = theirs.step(output, time, x, eta=eta, variance_noise=noise if eta else None)
        x0, epsilon = to_x0_and_epsilon(output, x, alpha=float(ours.alpha[k]), sigma=float(ours.sigma[k]), kind=kind)
        step = DDIM(steps=steps, eta=eta).step(x0, epsilon, ours, k=k)
        torch.testing.assert_close(x0, expected.pred_original_sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(step.sample(noise), expected.prev_sample, rtol=1e-4, atol=1e-4)


def test_trailing_spacing_with_zero_terminal_snr() -> None:
    theirs = DDIMScheduler(
        **SD15, prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
    )
    theirs.set_timesteps(20)
    ours = ddpm_schedule(theirs.alphas_cumprod, 20, spacing="trailing")
    assert ours.time.tolist() == theirs.timesteps.tolist()
    assert float(ours.alpha[0]) == pytest.approx(0.0, abs=1e-6)


def test_ddim_with_eta_one_is_the_bayes_posterior() -> None:
    """q(x_s | x_t, x_0) from the joint Gaussian of (x_s, x_t) given x_0, by conditioning; no DDIM formula in sight."""
    schedule = ddpm_schedule(scaled_linear_alphas_cumprod(beta_start=0.00085, beta_end=0.012, steps=1000), 20)
    x_t, x_0 = torch.tensor([[[[0.7]]]], dtype=torch.float64), torch.tensor([[[[-1.3]]]], dtype=torch.float64)
    for k in range(20):
        (a_t, s_t), (a_s, s_s) = ((float(schedule.alpha[i]), float(schedule.sigma[i])) for i in (k, k + 1))
        forward = a_t / a_s  # x_t = forward x_s + noise of the rest
        cov_st, var_t = forward * s_s**2, s_t**2
        mean = a_s * x_0 + cov_st / var_t * (x_t - a_t * x_0)
        variance = s_s**2 - cov_st**2 / var_t
        step = DDIM().step(x_0, (x_t - a_t * x_0) / s_t, schedule, k=k)
        torch.testing.assert_close(step.mean, mean, rtol=1e-9, atol=1e-9)
        assert step.std == pytest.approx(variance**0.5, rel=1e-7)


def test_noise_weight_is_the_derivative_of_the_mean_and_large_at_t_51() -> None:
    schedule = ddpm_schedule(scaled_linear_alphas_cumprod(beta_start=0.00085, beta_end=0.012, steps=1000), 20)
    sampler, x = DDIM(), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for k in range(20):
        epsilon = torch.ones_like(x).requires_grad_()
        x0 = (x - float(schedule.sigma[k]) * epsilon) / float(schedule.alpha[k])
        step = sampler.step(x0, epsilon, schedule, k=k)
        (slope,) = torch.autograd.grad(step.mean.sum(), epsilon)
        assert sampler.noise_weight(schedule, k) == pytest.approx(abs(float(slope)) / step.std, rel=1e-9)
    assert sampler.noise_weight(schedule, 18) == pytest.approx(5.43, abs=0.01)  # t = 51, paper.md caution 4


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_plain_pipeline_with_our_lora_draws_our_pictures(
    eta: float, tiny_policy: Callable[..., Policy], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny_policy(eta=eta, moved=0.1)
    policy.model.save_lora(tmp_path)
    prompts, noise = ["a cat", "a dog"], Noise(0)
    trajectories = start_trajectories(policy, prompts, noise=noise, keys=[("x", 0), ("x", 1)])
    initial = trajectories.latents
    ours = rollout_chains(policy, trajectories, noise=noise)

    # Hand the pipeline's scheduler the very noise of our steps, in its order.
    steps = iter([noise.normals(initial.shape[1:], trajectories.keys, "step", k) for k in range(20)])
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddim.randn_tensor", lambda *_, **__: next(steps))
    pipe: Any = StableDiffusionPipeline.from_pretrained(str(tiny_folder), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": prompts, "num_inference_steps": 20, "guidance_scale": 5.0, "eta": eta, "output_type": "latent"}
    base = pipe(latents=initial.clone(), **{**call, "eta": 0.0}).images
    pipe.load_lora_weights(str(tmp_path))
    theirs = pipe(latents=initial.clone(), **call).images
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    if eta == 0:
        assert (theirs - base).abs().max() > 0.05  # the LoRA does something
