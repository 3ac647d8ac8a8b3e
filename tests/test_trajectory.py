"""The trajectory of an inversion: what is kept of it, how exactly, and what a refined one gains."""

from __future__ import annotations

from typing import Any

import pack_nodes
import pytest
import torch
from torch import Tensor
from tune_a_video.tav_core import host, schedule
from tune_a_video.tav_core.control.trajectory import Trajectory
from tune_a_video.tav_core.inflate import Inflation
from tune_a_video.tav_core.pipeline import invert, invert_and_keep, sample
from unets import UNETS, build_model

STEPS = 5
CLIP = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)) / 0.18215
PROMPT: list[Any] = [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1)), {}]]


@pytest.fixture(scope="module")
def model() -> Any:
    with torch.inference_mode():
        return host.inflate_model(build_model(UNETS["tiny"]), Inflation())


def test_the_inversion_is_the_same_with_and_without_its_trajectory(model: Any) -> None:
    with torch.inference_mode():
        alone = invert(model, CLIP, PROMPT, STEPS)
        kept, trajectory = invert_and_keep(model, CLIP, PROMPT, STEPS)
    assert torch.equal(alone, kept)
    assert trajectory.latents.shape == (STEPS, *CLIP.shape) and torch.equal(trajectory.clip, CLIP)
    assert trajectory.megabytes == pytest.approx(STEPS * CLIP.numel() * 4 / 1e6)
    torch.testing.assert_close(trajectory.at(float(trajectory.sigmas[-1])), kept, rtol=1e-5, atol=1e-4)
    assert trajectory.conditioning is PROMPT


def test_half_precision_halves_it_and_is_close(model: Any) -> None:
    with torch.inference_mode():
        _, full = invert_and_keep(model, CLIP, PROMPT, STEPS)
        _, half = invert_and_keep(model, CLIP, PROMPT, STEPS, dtype=torch.float16)
    assert half.megabytes == full.megabytes / 2
    for sigma in full.sigmas.tolist()[1:]:
        there, here = full.at(sigma), half.at(sigma)
        assert (there - here).norm() / there.norm() < 5e-4


def line(levels: list[float]) -> Trajectory:
    """A clip of ones whose noise is ones: at sigma it is 1 + sigma in the variance-exploding scale."""
    sigmas = torch.tensor(levels)
    latents = schedule.to_vp((1 + sigmas[1:]).view(-1, 1, 1, 1, 1), sigmas[1:].view(-1, 1, 1, 1, 1))
    return Trajectory(torch.full((1, 1, 1, 1), float(schedule.to_vp(1 + sigmas[:1], sigmas[:1]))), latents, sigmas)


@pytest.mark.parametrize("sigma", [0.03, 0.5, 1.0, 3.7, 9.0])
def test_between_levels_the_path_is_a_straight_line(sigma: float) -> None:
    assert float(line([0.03, 0.5, 2.0, 9.0]).at(sigma)) == pytest.approx(1 + sigma, rel=1e-5)


def test_outside_the_levels_the_nearest_one_is_taken() -> None:
    path = line([0.03, 0.5, 9.0])
    assert float(path.at(0.0)) == pytest.approx(1.03) and float(path.at(50.0)) == pytest.approx(10.0)


def test_24_frames_of_512_pixels_fit_into_80_megabytes() -> None:
    latents = torch.empty(50, 24, 4, 64, 64, device="meta")
    assert Trajectory(latents[0], latents, torch.empty(51)).megabytes < 80


def test_a_refined_inversion_gives_the_clip_back_more_exactly(model: Any) -> None:
    def off(refine: bool) -> float:
        with torch.inference_mode():
            noise = invert(model, CLIP, PROMPT, 20, refine=refine)
            return float((sample(model, noise, PROMPT, PROMPT, 20, 1.0) - CLIP).norm() / CLIP.norm())

    assert off(True) < 0.7 * off(False)


def first(out: Any) -> dict[str, Any]:
    return (out.args if hasattr(out, "args") else out.result)[0]


@pytest.mark.comfyui
def test_the_node_keeps_it_unless_told_otherwise(model: Any) -> None:
    def keys(**options: Any) -> set[str]:
        return set(first(pack_nodes.DDIMInvert.execute(model, {"samples": CLIP}, PROMPT, STEPS, **options)))

    with torch.inference_mode():
        assert keys() - keys(trajectory="none") == {"tav_trajectory"}
        half: Tensor = first(pack_nodes.DDIMInvert.execute(model, {"samples": CLIP}, PROMPT, STEPS, trajectory="fp16"))[
            "tav_trajectory"
        ].latents
        assert half.dtype == torch.float16
        inverted = first(pack_nodes.DDIMInvert.execute(model, {"samples": CLIP}, PROMPT, STEPS))
        edited = first(pack_nodes.TAVSample.execute(model, PROMPT, PROMPT, inverted, STEPS, 2.0, 0.0, 0))
        assert set(edited) == {"samples"}
