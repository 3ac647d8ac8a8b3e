"""What clips of any length cost in context windows: the most memory and the time of guided sampling steps."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from allocations import Allocations
from steps import DTYPES, GUIDANCE, conditioning
from tune_a_video.tav_core import host, schedule
from tune_a_video.tav_core.inflate import Inflation, initial_temporal
from tune_a_video.tav_core.motion.file import Motion
from tune_a_video.tav_core.sample import ddim_sample
from unets import UNETS, build_model

STEPS = 2


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """A row for every number of frames, whole and in windows: GiB beside the weights, seconds of a step a frame."""
    torch.set_num_threads(arguments.threads)
    rows = []
    print(f"{'frames':>7}{'':>20}{'peak':>12}{'a frame':>12}")
    with torch.inference_mode():
        model = build_model(UNETS[arguments.unet], dtype=DTYPES[arguments.precision])
        motion = Motion(initial_temporal(host.unet_of(model), lambda path: True, 0))
        inflated = host.inflate_model(model, Inflation(), motion)
        for frames in arguments.frames:
            for window in (None, arguments.window):
                row = {"frames": frames, "window": window, **_cost(inflated, frames, arguments.size, window)}
                rows.append(row)
                name = f"windows of {window}" if window else "whole"
                print(f"{frames:>7}{name:>20}{row['peak_gib']:>8.3f} GiB{row['s_per_frame']:>10.3f} s", flush=True)
    return {"rows": rows}


def _cost(model: Any, frames: int, size: int, window: int | None) -> dict[str, float]:
    """The two figures; memory is counted in one run and time measured in another."""
    if window:
        model = _windowed(model, window)
    latents = torch.randn(frames, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(0))
    positive, negative = (conditioning(model, seed) for seed in (1, 2))
    sigmas = schedule.sampling_sigmas(host.sigma_table(model), STEPS)

    def sample() -> None:
        host.run_sampler(model, ddim_sample, sigmas, positive, negative, GUIDANCE, latents)

    counted = Allocations()
    with counted:
        sample()
    began = time.perf_counter()
    sample()
    return {"peak_gib": counted.peak / 2**30, "s_per_frame": (time.perf_counter() - began) / STEPS / frames}


def _windowed(model: Any, length: int) -> Any:
    """What Context Windows (Manual) makes of a model: windows of frames that overlap by a quarter."""
    from comfy import context_windows

    model = model.clone()
    model.model_options["context_handler"] = context_windows.IndexListContextHandler(
        context_schedule=context_windows.get_matching_context_schedule("standard_static"),
        fuse_method=context_windows.get_matching_fuse_method("pyramid"),
        context_length=length,
        context_overlap=length // 4,
        dim=0,
    )
    context_windows.create_prepare_sampling_wrapper(model)
    return model
