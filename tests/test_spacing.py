"""Every number of DDIM steps reaches noise, and divisors of the table keep the released spacing."""

from __future__ import annotations

import pytest
import torch
from tune_a_video.tav_core import schedule


def released(steps: int, train_steps: int) -> list[int]:
    """Leading spacing with an offset of one."""
    return [min(1 + i * (train_steps // steps), train_steps - 1) for i in range(steps)]


@pytest.mark.parametrize("train_steps", [50, 997, 1000])
def test_every_number_of_steps_ends_at_noise(train_steps: int) -> None:
    for steps in range(1, train_steps + 1):
        timesteps = schedule.ddim_timesteps(steps, train_steps)
        assert len(timesteps) == steps and timesteps[0] == 1
        if train_steps % steps == 0:
            assert timesteps == released(steps, train_steps)
            continue
        assert timesteps[-1] == train_steps - 1
        gaps = {after - before for before, after in zip(timesteps, timesteps[1:], strict=False)}
        assert min(gaps) > 0 and max(gaps) - min(gaps) <= 1


def test_sampling_starts_where_the_inversion_ends() -> None:
    sigmas = torch.linspace(0.03, 14.6, 1000)
    for steps in (30, 600, 628, 999):
        up = schedule.inversion_sigmas(sigmas, steps)
        assert up[-1] == sigmas[-1] and bool((up.diff() > 0).all())
        assert torch.equal(schedule.sampling_sigmas(sigmas, steps), up.flip(0))
