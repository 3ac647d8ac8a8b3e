"""v-prediction with zero terminal SNR: the last noise level is 4,500, and any number of steps gives the clip back."""

from __future__ import annotations

from typing import Any

import comfy.model_sampling
import pytest
import torch
from torch import Tensor
from tune_a_video.tav_core import host, pipeline, schedule
from tune_a_video.tav_core.control.settings import Control
from tune_a_video.tav_core.errors import Refusal
from tune_a_video.tav_core.inflate import Inflation
from tune_a_video.tav_core.tuning.trainer import TuneSettings
from unets import UNETS, build_model

LATENT = 5 * torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPT = [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1)), {}]]
OTHER = [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(2)), {}]]


def zero_snr_model() -> Any:
    """A MODEL as ModelSamplingDiscrete with zsnr makes it, smooth as a trained one."""
    model = build_model(UNETS["tiny-v"], prediction="v")
    sampling, v = comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION
    kind = type("ModelSamplingAdvanced", (sampling, v), {})
    model.add_object_patch("model_sampling", kind(model.model.model_config, zsnr=True))
    with torch.inference_mode():
        for value in model.model.diffusion_model.out[2].parameters():
            value.mul_(0.2)
    return model


def asked(unet: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, stand_in: bool) -> list[float]:
    """Note the timesteps that the UNet is asked for. ``stand_in``: a few operations answer in its place."""
    forward, noted = unet.forward, []
    mix = torch.randn(4, 4, generator=torch.Generator().manual_seed(3)) / 2

    def noting(x: Tensor, timesteps: Tensor, context: Tensor, *rest: Any, **options: Any) -> Tensor:
        assert torch.isfinite(x).all()
        assert len(timesteps.unique()) == 1
        noted.append(float(timesteps[0]))
        if not stand_in:
            return forward(x, timesteps, context, *rest, **options)
        at = (timesteps / 300).cos().view(-1, 1, 1, 1)
        return 0.3 * torch.tanh(torch.einsum("nchw,cd->ndhw", x, mix) + at + context.mean((1, 2)).view(-1, 1, 1, 1))

    monkeypatch.setattr(unet, "forward", noting)
    return noted


# An inflated UNet where it takes seconds.
@pytest.mark.parametrize(("steps", "stand_in"), [(37, False), (37, True), (600, True), (1000, True)])
@torch.inference_mode()
def test_the_clip_comes_back_at_guidance_1(steps: int, stand_in: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zero_snr_model()
    sigmas = host.sigma_table(model)
    assert 4000 < float(sigmas[-1]) < 5000
    timesteps = asked(model.model.diffusion_model, monkeypatch, stand_in)
    if not stand_in:
        model = host.inflate_model(model, Inflation())
    finite: list[bool] = []

    def watch(step: int, x0: Tensor, x: Tensor, total: int) -> None:
        finite.append(bool(torch.isfinite(x0).all() and torch.isfinite(x).all()))

    noise = pipeline.invert(model, LATENT, PROMPT, steps, watch)
    expected = [float(each) for each in schedule.ddim_timesteps(steps)]
    assert timesteps == expected and expected[-1] == 999
    timesteps.clear()
    back = pipeline.sample(model, noise, PROMPT, OTHER, steps, 1.0, callback=watch)
    assert timesteps == expected[::-1]
    assert len(finite) == 2 * steps and all(finite)
    # Inversion evaluates a step at its lower latent: an error of first order.
    assert (back - LATENT).norm() < (1 / steps + 1e-3) * LATENT.norm()
    # Scaled as noise, and not the clip.
    assert 0.8 < float(noise.std() * host.model_scale(model) / sigmas[-1]) < 1.2


@pytest.mark.comfyui
@pytest.mark.parametrize("steps", [7, 10])
@torch.inference_mode()
def test_edits_of_every_kind_stay_finite(steps: int) -> None:
    model = host.inflate_model(zero_snr_model(), Inflation())
    noise, trajectory = pipeline.invert_and_keep(model, LATENT, PROMPT, steps)
    plain = pipeline.sample(model, noise, PROMPT, OTHER, steps, 7.5)
    masked = {"clip": LATENT, "noise_mask": torch.ones(1, 8, 8).tril()}
    for options in ({"eta": 1.0, "seed": 3}, {"last_step": "zero"}, masked):
        edited = pipeline.sample(model, noise, PROMPT, OTHER, steps, 7.5, **options)
        assert torch.isfinite(edited).all() and not torch.equal(edited, plain)
    control = Control(self_share=0.8, layers="all", feature_share=0.6, proximal=0.3, fresh_noise=0.3)
    run = pipeline.controlled(model, control, trajectory, noise, PROMPT)
    edited = pipeline.sample(model, noise, PROMPT, OTHER, steps, 7.5, control=run)
    assert torch.isfinite(edited).all() and not torch.equal(edited, plain)


@torch.inference_mode()
def test_a_tuning_learns_from_the_last_timestep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its target there is the clip itself, negative."""
    model = zero_snr_model()
    last = schedule.alphas_cumprod(host.sigma_table(model))[-1]
    x0, noise = torch.ones(2), torch.zeros(2)
    torch.testing.assert_close(schedule.training_target(x0, noise, float(last), "v"), -x0)
    motion, losses = pipeline.tune(model, LATENT, PROMPT, TuneSettings(steps=4, learning_rate=1e-3))
    assert all(loss == loss and loss < 1e3 for loss in losses) and len(set(losses)) == 4
    assert all(torch.isfinite(value).all() for value in motion.tensors.values())


@torch.inference_mode()
def test_a_level_that_is_infinite_is_refused() -> None:
    """Signal of exactly zero has no noise level; the host's own nodes leave a trace of it."""
    model = zero_snr_model()
    sampling = model.get_model_object("model_sampling")
    sampling.set_sigmas(torch.cat([sampling.sigmas[:-1], torch.tensor([torch.inf])]))
    with pytest.raises(Refusal, match="^model: its sampling .*Remove the node"):
        host.check_model(model)
