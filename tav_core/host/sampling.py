"""Run sampler functions through the host's guider, so that everything that chains with a MODEL applies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ..control.run import ControlledRun
from .controlled import controlled_guider
from .model import Conditioning, ModelPatcher
from .windows import keep_noise

# (step from 0, denoised x0, noisy x, number of steps), both latents [frames, c, h, w] in the UNet's own scale.
StepCallback = Callable[[int, Tensor, Tensor, int], None]


def run_sampler(
    model: ModelPatcher,
    sampler: Callable[..., Tensor],
    sigmas: Tensor,
    conditioning: tuple[Conditioning, Conditioning],
    guidance: float,
    latent: Tensor,
    *,
    noise: Tensor | None = None,
    noise_mask: Tensor | None = None,
    seed: int = 0,
    callback: StepCallback | None = None,
    control: ControlledRun | None = None,
    **options: Any,
) -> Tensor:
    """Run a sampler function with the host's classifier-free guidance.

    ``conditioning``: positive and negative. ``latent`` [frames, c, h, w] in LATENT scale. ``noise``: the clip's, added
    to it at sigmas[0], none by default. ``seed``: for draws of the host's own. ``control``: an edit
    control. ``options`` go to the sampler function. Returns samples in LATENT scale.
    """
    if noise is None:
        noise = torch.zeros_like(latent)
    else:
        model = model.clone()
        keep_noise(model.model_options)
    sampler_object = comfy.samplers.KSAMPLER(partial(sampler, **options))
    shared: dict[str, Any] = {"callback": callback, "disable_pbar": callback is None, "seed": seed}
    if control is not None:
        guider = controlled_guider(model, conditioning, guidance, control)
        samples = guider.sample(noise, latent, sampler_object, sigmas, denoise_mask=noise_mask, **shared)
        return samples.to(comfy.model_management.intermediate_device())
    return comfy.sample.sample_custom(
        model, noise, guidance, sampler_object, sigmas, *conditioning, latent, noise_mask=noise_mask, **shared
    )


def paste_masked(edited: Tensor, original: Tensor, noise_mask: Tensor) -> Tensor:
    """Return ``edited`` where a LATENT's noise mask is 1 and ``original`` where it is 0; both [frames, c, h, w]."""
    mask = comfy.sampler_helpers.prepare_mask(noise_mask, edited.shape, edited.device)
    return edited * mask + original.to(edited) * (1 - mask)
