"""DDIM sampling, with the released code's last step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .schedule import to_vp


def ddim_sample(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    eta: float = 0.0,
    noise_seed: int = 0,
) -> Tensor:
    """DDIM (arXiv 2010.02502, equation 12) as a sampler function in k-diffusion's manner.

    ``model``: denoiser ``(x, sigma [rows]) -> x0``. ``x``: noisy latent [frames, c, h, w] at ``sigmas[0]``,
    variance-exploding. ``sigmas``: descending, ``schedule.sampling_sigmas``. ``eta``: 0 (deterministic) to 1
    (DDPM's variance); its noise is drawn from ``noise_seed``. Returns the latent in the variance-preserving
    scale, which at the last level alpha_bar[0] is the released code's output, and at 0 is the clean latent.

    In the variance-exploding scale DDIM with eta 0 is Euler's method.
    """
    generator = torch.Generator().manual_seed(noise_seed)
    rows = x.new_ones([x.shape[0]])
    for i in range(len(sigmas) - 1):
        now, down = sigmas[i], sigmas[i + 1]
        denoised = model(x, now * rows, **(extra_args or {}))
        if callback is not None:
            callback({"x": x, "i": i, "sigma": now, "sigma_hat": now, "denoised": denoised})
        fresh = eta * down * ((now**2 - down**2) / now**2) ** 0.5
        kept = (down**2 - fresh**2) ** 0.5
        x = denoised + (x - denoised) * (kept / now)
        if eta > 0:
            x = x + fresh * torch.randn(x.shape, generator=generator).to(x)
    return to_vp(x, sigmas[-1])
