"""DDIM inversion: from a clip to the noise that the model maps back to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .schedule import to_ve


def ddim_invert(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    refine: bool = False,
    keep: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Walk a clean latent up the noise levels (a sampler function in k-diffusion's manner).

    ``model``: denoiser ``(x, sigma [rows]) -> x0``, x and x0 in the variance-exploding scale. ``x``: clean
    latent [frames, c, h, w]. ``sigmas``: ascending, ``schedule.inversion_sigmas``. Returns the inverted
    latent at the last sigma, variance-exploding: what a sampler without added noise starts from.

    Released code (``ddim_loop``, ``next_step``): at each step the network is evaluated at the *higher* of
    the two timesteps on the latent of the lower one, hence the rescaling of its input. The released helper
    ignores v-prediction; here a v becomes noise at the level that the network was evaluated at.

    ``refine``: evaluate the network once more, on the latent that the step arrived at, which is the one that sampling
    evaluates it on. One pass of a fixed-point iteration (arXiv 2312.12540); it doubles the time. ``keep`` gets the
    number, the latent and the noise level of every step.
    """
    x = to_ve(x, sigmas[0])
    rows = x.new_ones([x.shape[0]])
    for i in range(len(sigmas) - 1):
        now, up = sigmas[i], sigmas[i + 1]
        seen = x * ((1 + up**2) / (1 + now**2)) ** 0.5
        denoised = model(seen, up * rows, **(extra_args or {}))
        eps = (seen - denoised) / up
        if refine:
            seen = x + (up - now) * eps
            denoised = model(seen, up * rows, **(extra_args or {}))
            eps = (seen - denoised) / up
        if callback is not None:
            callback({"x": x, "i": i, "sigma": now, "sigma_hat": up, "denoised": denoised})
        x = x + (up - now) * eps
        if keep is not None:
            keep(i, x, up)
    return x
