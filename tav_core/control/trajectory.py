"""The latents that a DDIM inversion passes through: the source branch of a controlled edit starts from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..schedule import to_ve, to_vp


@dataclass(frozen=True)
class Trajectory:
    """A clip at every noise level of its inversion.

    ``clip``: the clean latent [frames, c, h, w]. ``latents``: [steps, frames, c, h, w], one per level above the clip's,
    variance-preserving, so that half precision has the same error at every level. Both in LATENT scale. ``sigmas``:
    [steps + 1], ascending, the clip's own level first. ``conditioning``: the sentence of the inversion.
    """

    clip: Tensor
    latents: Tensor
    sigmas: Tensor
    conditioning: Any = None

    @property
    def megabytes(self) -> float:
        """Return the size of the stored latents; the clip is not counted, an inverted LATENT holds it anyway."""
        return self.latents.numel() * self.latents.element_size() / 1e6

    def at(self, sigma: float) -> Tensor:
        """Return the clip at a noise level, [frames, c, h, w], float32, variance-exploding.

        Between two levels the path of DDIM is a straight line in that scale; outside them the nearest level is taken.
        """
        sigma = min(max(sigma, float(self.sigmas[0])), float(self.sigmas[-1]))
        above = int(torch.searchsorted(self.sigmas, sigma * (1 - 1e-6)))
        upper = self._level(above)
        top = float(self.sigmas[above])
        if above == 0 or sigma >= top * (1 - 1e-6):
            return upper
        bottom = float(self.sigmas[above - 1])
        return torch.lerp(self._level(above - 1), upper, (sigma - bottom) / (top - bottom))

    def _level(self, number: int) -> Tensor:
        # With --gpu-only the clip is on the GPU, and the latents in CPU memory.
        stored = self.clip.to(self.latents.device) if number == 0 else self.latents[number - 1]
        return to_ve(stored.float(), float(self.sigmas[number]))


class Recorder:
    """Keep the latents of an inversion as it goes, in CPU memory; an argument of ``invert.ddim_invert``.

    ``scale``: the factor from LATENT scale to the model's own. ``dtype``: what the latents are stored in.
    """

    def __init__(self, steps: int, clip: Tensor, scale: float, dtype: torch.dtype) -> None:
        self.latents = torch.empty(steps, *clip.shape, dtype=dtype)
        self._scale = scale

    def __call__(self, step: int, x: Tensor, sigma: Tensor) -> None:
        """Keep the latent that a step (from 0) arrived at, variance-exploding in the model's scale."""
        self.latents[step] = (to_vp(x, sigma) / self._scale).to("cpu", self.latents.dtype)
