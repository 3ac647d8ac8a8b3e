"""The noise in an inverted latent: taken out of it, and replaced in part."""

from __future__ import annotations

import torch
from torch import Tensor


def added_noise(latent: Tensor, clip: Tensor, sigma: float, scale: float) -> Tensor:
    """Return the noise that makes ``latent`` of ``clip`` at ``sigma``: latent = clip + sigma noise / scale.

    The host keeps the unmasked part of a clean latent plus noise, so a masked edit needs the two apart. Both
    [frames, c, h, w] in LATENT scale; ``scale``: the factor from it to the model's own.
    """
    return scale * (latent - clip) / sigma


def freed_noise(noise: Tensor, share: float, seed: int, mask: Tensor | None = None) -> Tensor:
    """Replace a share of the variance of inverted noise by fresh noise that all frames have in common.

    sqrt(1 - share) noise + sqrt(share) fresh (MotionDirector, arXiv 2310.08465, with p = 1 - share). ``noise``:
    [frames, c, h, w] of unit variance. ``mask``: [frames, 1, h, w], 1 where the noise is freed; None for everywhere.
    """
    generator = torch.Generator().manual_seed(seed)
    fresh = torch.randn(1, *noise.shape[1:], generator=generator).to(noise)
    freed = (1 - share) ** 0.5 * noise + share**0.5 * fresh
    return freed if mask is None else torch.lerp(noise, freed, mask.to(noise))
