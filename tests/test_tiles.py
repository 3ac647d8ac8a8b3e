"""Packs that cut pictures into tiles stack them on the batch axis: a tile's frames stay one video."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from tune_a_video.tav_core import host, pipeline
from tune_a_video.tav_core.errors import Refusal
from tune_a_video.tav_core.host.inflated_model import layout_of
from tune_a_video.tav_core.inflate import Inflation, Layout
from unets import UNETS, build_model

pytestmark = pytest.mark.comfyui

FRAMES, WIDTH = 3, 16


def prompt(seed: int) -> list[Any]:
    return [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(seed)), {}]]


def stacked(apply_model: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
    """Evaluate the left and the right half of the pictures in one batch, as Tiled Diffusion does."""
    x, c = args["input"], args["c"]
    c = {
        key: value.repeat(2, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) else value
        for key, value in c.items()
    }
    tiles = torch.cat(x.split(WIDTH // 2, dim=-1))
    return torch.cat(apply_model(tiles, args["timestep"].repeat(2), **c).chunk(2), dim=-1)


def one_by_one(apply_model: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
    halves = args["input"].split(WIDTH // 2, dim=-1)
    return torch.cat([apply_model(half, args["timestep"], **args["c"]) for half in halves], dim=-1)


@torch.inference_mode()
def test_stacked_tiles_equal_tiles_one_by_one() -> None:
    noise = torch.randn(FRAMES, 4, 8, WIDTH, generator=torch.Generator().manual_seed(0))

    def sampled(tiler: Callable[..., Tensor]) -> Tensor:
        model = host.inflate_model(build_model(UNETS["tiny"]), Inflation())
        model.set_model_unet_function_wrapper(tiler)
        return pipeline.sample(model, noise, prompt(1), prompt(2), 2, 3.0)

    torch.testing.assert_close(sampled(stacked), sampled(one_by_one), rtol=0, atol=1e-4)


def test_a_video_is_as_long_as_there_are_sigmas() -> None:
    sigmas = torch.ones(5)
    assert layout_of(5, {"sigmas": sigmas, "cond_or_uncond": [0]}) == Layout(5, 1)
    assert layout_of(30, {"sigmas": sigmas, "cond_or_uncond": [0, 1]}) == Layout(5, 6)
    # Hosts that put a frame ahead of a window, or give no sigmas: all rows of a conditioning are a video.
    assert layout_of(12, {"sigmas": sigmas, "cond_or_uncond": [0, 1]}) == Layout(6, 2)
    assert layout_of(8, {"cond_or_uncond": [0, 1]}) == Layout(4, 2)


def test_tiles_of_windows_are_refused() -> None:
    with pytest.raises(Refusal, match="Tiled Diffusion"):
        layout_of(20, {"sigmas": torch.ones(5), "cond_or_uncond": [0, 1], "context_window": object()})


def test_tiles_under_edit_control_are_refused() -> None:
    from tune_a_video.tav_core.control.injection import Call
    from tune_a_video.tav_core.host.controlled import _KEY, control_of

    call: Any = object.__new__(Call)
    with pytest.raises(Refusal, match="Take the tiles off"):
        control_of(Layout(3, 4), torch.zeros(12, 4, 8, 8), {_KEY: call, "cond_or_uncond": [0, 1]})
