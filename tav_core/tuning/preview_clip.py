"""Make the clip with the weights of a running tuning, from a noised copy, for a look at what they have learnt."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cancel import raise_if_cancelled
from ..schedule import add_noise, alphas_cumprod
from .training_unet import TrainingUNet

STEPS = 4
# Share of the noise levels to start at: only the clip's coarse layout is left, and the weights make the rest.
START = 0.7


@torch.no_grad()
def reconstruct(unet: TrainingUNet, frames: int, steps: int = STEPS, seed: int = 0) -> Tensor:
    """Noise the clip's first frames and bring them back by ``steps`` steps of DDIM (arXiv 2010.02502, eta 0).

    ``unet``: with its training forwards for as many frames swapped in. Returns latents [frames, c, h, w], float32, in
    the UNet's own scale. The noise is the same at each call, from a generator of its own, and no gradient is left, so
    the tuning is not disturbed.
    """
    x0, shown = unet.latents[:frames], torch.arange(frames)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed)).to(x0)
    alpha_bars = alphas_cumprod(unet.sigmas).tolist()
    first = int(START * (len(alpha_bars) - 1))
    timesteps = [round(first * (steps - i) / steps) for i in range(steps)]
    for timestep in timesteps:
        raise_if_cancelled()
        alpha_bar = alpha_bars[timestep]
        x = add_noise(x0, noise, alpha_bar)
        signal, spread = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        predicted = unet.predict(x, timestep, shown)
        if unet.prediction == "epsilon":
            x0, noise = (x - spread * predicted) / signal, predicted
        else:
            x0, noise = signal * x - spread * predicted, spread * x + signal * predicted
    return x0
