"""Timesteps, noise levels and the two scales a noisy latent is written in.

``alpha_bar`` is DDPM's cumulative product; ``sigma = sqrt((1 - alpha_bar) / alpha_bar)``. The released
code keeps latents variance-preserving (VP): ``sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise``. ComfyUI's
samplers keep them variance-exploding (VE): ``x0 + sigma noise`` = VP * sqrt(1 + sigma^2).
"""

from __future__ import annotations

from torch import Tensor


def ddim_timesteps(steps: int, train_steps: int = 1000) -> list[int]:
    """Return ascending timesteps of a DDIM trajectory, from 1.

    Where ``steps`` divides ``train_steps``: leading spacing 1, 1 + r, 1 + 2r, ... with r = train_steps / steps, as the
    released DDIM scheduler is configured (steps_offset 1). For other numbers leading spacing ends short of noise
    (600 of 1000 steps at 600), so they are spaced evenly from 1 to the last timestep. Raises ValueError for numbers
    below 1 or above ``train_steps``.
    """
    if not 1 <= steps <= train_steps:
        raise ValueError(f"steps must lie between 1 and {train_steps}, not {steps}")
    last = train_steps - 1
    if train_steps % steps == 0:
        return [min(1 + i * (train_steps // steps), last) for i in range(steps)]
    gaps = steps - 1
    # In integers, halves rounded up: numbers that lie at least 1 apart stay apart.
    return [1 + (2 * i * (last - 1) + gaps) // (2 * gaps) for i in range(steps)]


def inversion_sigmas(sigmas: Tensor, steps: int) -> Tensor:
    """Ascending noise levels of a DDIM inversion, [steps + 1].

    ``sigmas``: the model's own table, one per training timestep [train_steps]. The clip itself counts as
    noise level alpha_bar[0] (the released scheduler's set_alpha_to_one=False), so that is the first entry.
    """
    return sigmas[[0, *ddim_timesteps(steps, len(sigmas))]].float()


def sampling_sigmas(sigmas: Tensor, steps: int, last: str = "clip noise level") -> Tensor:
    """Descending noise levels of DDIM sampling, [steps + 1]: the inversion's, backwards.

    ``last`` = "clip noise level" ends at alpha_bar[0] as the released code does and as the inversion
    began; "zero" ends at sigma 0, which is what stock samplers with the ddim_uniform scheduler do.
    """
    levels = inversion_sigmas(sigmas, steps).flip(0)
    if last == "zero":
        levels[-1] = 0.0
    return levels


def to_ve(latent: Tensor, sigma: Tensor | float) -> Tensor:
    """Variance-preserving latent -> the host's variance-exploding scale."""
    return latent * (1 + sigma**2) ** 0.5


def to_vp(latent: Tensor, sigma: Tensor | float) -> Tensor:
    """The host's variance-exploding latent -> variance-preserving."""
    return latent / (1 + sigma**2) ** 0.5


def alphas_cumprod(sigmas: Tensor) -> Tensor:
    """alpha_bar per training timestep from the sigma table, same shape."""
    return 1 / (1 + sigmas.double() ** 2)


def add_noise(x0: Tensor, noise: Tensor, alpha_bar: float) -> Tensor:
    """VP latent at one noise level: sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise."""
    return alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * noise


def training_target(x0: Tensor, noise: Tensor, alpha_bar: float, prediction: str) -> Tensor:
    """Return the training target: the noise ("epsilon") or v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x0."""
    if prediction == "epsilon":
        return noise
    return alpha_bar**0.5 * noise - (1 - alpha_bar) ** 0.5 * x0
