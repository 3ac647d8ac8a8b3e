"""The clip as the weights of a running tuning make it, from a noised copy: for looking at, while it is tuned."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import host
from ..schedule import add_noise, alphas_cumprod

STEPS = 4
# Of all noise levels: so noisy that only the clip's coarse layout is given, and the rest is the weights' doing.
START = 0.7


@torch.no_grad()
def reconstruct(session: host.TrainingUNet, steps: int = STEPS, seed: int = 0) -> Tensor:
    """Noise the clip and bring it back by ``steps`` steps of DDIM (arXiv 2010.02502, eta 0).

    ``session``: within its ``prepared``. Returns latents [frames, c, h, w], float32, in the UNet's own scale. The
    noise is the same at each call, from a generator of its own, and no gradient is left: the tuning goes on as if
    nothing had been looked at.
    """
    x0 = session.latents
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed)).to(x0)
    alpha_bars = alphas_cumprod(session.sigmas).tolist()
    first = int(START * (len(alpha_bars) - 1))
    timesteps = [round(first * (steps - i) / steps) for i in range(steps)]
    for timestep in timesteps:
        alpha_bar = alpha_bars[timestep]
        x = add_noise(x0, noise, alpha_bar)
        signal, spread = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        predicted = session.predict(x, timestep)
        if session.prediction == "epsilon":
            x0, noise = (x - spread * predicted) / signal, predicted
        else:
            x0, noise = signal * x - spread * predicted, spread * x + signal * predicted
    return x0
