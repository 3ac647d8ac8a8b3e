"""Invert and sample a clip in one call each: a subset of what ``tav_core.pipeline`` offers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from tune_a_video.tav_core import host, schedule
from tune_a_video.tav_core.invert import ddim_invert
from tune_a_video.tav_core.sample import ddim_sample

Callback = Callable[..., None] | None


def invert(model: Any, latent: Tensor, conditioning: Any, steps: int = 50, callback: Callback = None) -> Tensor:
    """Return the noise [frames, c, h, w] at which DDIM inversion of a latent ends."""
    sigmas = schedule.inversion_sigmas(host.sigma_table(model), steps)
    return host.run_sampler(model, ddim_invert, sigmas, conditioning, conditioning, 1.0, latent, callback=callback)


def sample(
    model: Any,
    latent: Tensor,
    positive: Any,
    negative: Any,
    steps: int = 50,
    guidance: float = 12.5,
    callback: Callback = None,
) -> Tensor:
    """Return the latent [frames, c, h, w] that DDIM sampling makes of inverted noise."""
    sigmas = schedule.sampling_sigmas(host.sigma_table(model), steps)
    return host.run_sampler(model, ddim_sample, sigmas, positive, negative, guidance, latent, callback=callback)
