"""Timesteps, noise levels, scales."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tune_a_video.tav_core import schedule

# How long an example takes says more about the machine than about the code.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

SIGMAS = torch.linspace(0.03, 14.6, 1000)


def test_fifty_steps_are_the_released_ones() -> None:
    assert schedule.ddim_timesteps(50) == list(range(1, 982, 20))
    assert schedule.ddim_timesteps(1000) == [*range(1, 1000), 999]
    assert schedule.ddim_timesteps(5, 10) == [1, 3, 5, 7, 9]


def test_alpha_bars_are_those_that_the_sigmas_were_made_of() -> None:
    alpha_bars = torch.linspace(0.9991, 0.0047, 1000, dtype=torch.float64)
    sigmas = ((1 - alpha_bars) / alpha_bars).sqrt().float()
    ours = schedule.alphas_cumprod(sigmas)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, alpha_bars, rtol=1e-6, atol=0)


@patient
@given(st.integers(1, 1000))
def test_timesteps_ascend_within_the_table(steps: int) -> None:
    timesteps = schedule.ddim_timesteps(steps)
    assert len(timesteps) == steps and timesteps[0] == 1 and timesteps[-1] <= 999
    assert timesteps == sorted(timesteps)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_other_step_counts_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 1000"):
        schedule.ddim_timesteps(steps)


@patient
@given(st.integers(1, 500))
def test_sampling_walks_the_inversion_back(steps: int) -> None:
    up = schedule.inversion_sigmas(SIGMAS, steps)
    assert torch.equal(schedule.sampling_sigmas(SIGMAS, steps), up.flip(0))
    assert up[0] == SIGMAS[0] and bool((up.diff() > 0).all())
    to_zero = schedule.sampling_sigmas(SIGMAS, steps, "zero")
    assert to_zero[-1] == 0 and torch.equal(to_zero[:-1], up.flip(0)[:-1])


@patient
@given(st.floats(0, 1000))
def test_scales_are_inverse(sigma: float) -> None:
    x = torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(schedule.to_vp(schedule.to_ve(x, sigma), sigma), x)


@patient
@given(st.floats(0.01, 0.99))
def test_v_and_epsilon_tell_the_same(alpha_bar: float) -> None:
    x0, noise = torch.randn(2, 7, dtype=torch.float64)
    noisy = schedule.add_noise(x0, noise, alpha_bar)
    v = schedule.training_target(x0, noise, alpha_bar, "v")
    torch.testing.assert_close(alpha_bar**0.5 * noisy - (1 - alpha_bar) ** 0.5 * v, x0)
    assert schedule.training_target(x0, noise, alpha_bar, "epsilon") is noise
