"""Measure long clips, whole and in context windows: peak memory and time of guided sampling steps."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from allocations import Allocations
from steps import DTYPES, UNET_NAMES, conditioning, inflated, random_latent
from tune_a_video.tav_core import pipeline
from unets import UNETS, build_model

STEPS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, the clip lengths and the window."""
    parser.add_argument("--unet", default="tiny", choices=UNET_NAMES)
    parser.add_argument("--precision", default="fp32", choices=list(DTYPES))
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--size", type=int, default=64, help="pixels, square")
    parser.add_argument("--window", type=int, default=8, help="frames")


def run(unet: str, precision: str, frames: list[int], size: int, window: int) -> dict[str, Any]:
    """Return a row per clip length, whole and in windows: GiB beside the weights, seconds per step and frame."""
    rows = []
    print(f"{'frames':>7}{'':>20}{'peak':>12}{'a frame':>12}")
    with torch.inference_mode():
        whole = inflated(build_model(UNETS[unet], dtype=DTYPES[precision]))
        models = {"whole": (None, whole), f"windows of {window}": (window, _windowed(whole, window))}
        for count in frames:
            for name, (length, model) in models.items():
                row = {"frames": count, "window": length, **_cost(model, count, size)}
                rows.append(row)
                print(f"{count:>7}{name:>20}{row['peak_gib']:>8.3f} GiB{row['s_per_frame']:>10.3f} s", flush=True)
    return {"rows": rows}


def _cost(model: Any, frames: int, size: int) -> dict[str, float]:
    """Return both figures; one run counts memory and another one measures time."""
    latent = random_latent(frames, size, size)
    positive, negative = (conditioning(model, seed) for seed in (1, 2))
    with Allocations() as counted:
        pipeline.sample(model, latent, positive, negative, STEPS)
    began = time.perf_counter()
    pipeline.sample(model, latent, positive, negative, STEPS)
    return {"peak_gib": counted.peak / 2**30, "s_per_frame": (time.perf_counter() - began) / STEPS / frames}


def _windowed(model: Any, length: int) -> Any:
    """Set what Context Windows (Manual) sets on a model: windows of frames that overlap by a quarter."""
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
