"""Time what an inflated evaluation costs in Python before its first kernel: entering and leaving it, no UNet run."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import torch
from steps import UNET_NAMES, inflated
from unets import UNETS, build_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the UNets and how often each is entered."""
    parser.add_argument("--unet", nargs="+", default=["sd15", "sdxl"], choices=UNET_NAMES)
    parser.add_argument("--calls", type=int, default=50)


def run(unet: list[str], calls: int) -> dict[str, Any]:
    """Return and print the median processor time of a call in milliseconds, by UNet, and that of the first call."""
    figures = {name: _milliseconds(name, calls) for name in unet}
    for name, (first, median) in figures.items():
        print(f"{name:>8}  {median:.2f} ms a call, {first:.1f} ms the first")
    return {name: {"first_ms": first, "median_ms": median} for name, (first, median) in figures.items()}


class _Executor:
    """Stands in the place of the model's own evaluation."""

    def __init__(self, base_model: Any) -> None:
        self.class_obj, self.original = base_model, base_model._apply_model

    def __call__(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return x


@torch.inference_mode()
def _milliseconds(name: str, calls: int) -> tuple[float, float]:
    model: Any = build_model(UNETS["tiny"])
    model.model.diffusion_model = openaimodel.UNetModel(**{**UNETS[name], "device": "meta"})
    model = inflated(model)
    (wrapper,) = model.get_wrappers("apply_model", "tune-a-video")
    model.model.current_patcher = model
    x, sigmas = torch.zeros(8, 4, 8, 8), torch.ones(8)
    options = {"sigmas": sigmas, "sample_sigmas": sigmas, "cond_or_uncond": [0], "uuids": ["a"]}
    times = []
    for _ in range(calls + 1):
        start = time.process_time()
        wrapper(_Executor(model.model), x, sigmas, transformer_options=options)
        times.append(1e3 * (time.process_time() - start))
    return times[0], statistics.median(times[1:])
