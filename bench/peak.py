"""Compare the planner's predicted memory of a tuning step with the measured peak."""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch
from allocations import Allocations
from steps import DTYPES, UNET_NAMES, conditioning, random_latent
from tune_a_video.tav_core.tuning import memory_plan
from tune_a_video.tav_core.tuning.trainer import TuneSettings, one_shot_tune
from unets import UNETS, build_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the shapes to compare at."""
    parser.add_argument("--unet", nargs="+", default=["tiny", "sd15"], choices=UNET_NAMES)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=list(DTYPES))
    parser.add_argument("--frames", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128], help="pixels, square")


def run(unet: list[str], precision: list[str], frames: list[int], sizes: list[int]) -> dict[str, Any]:
    """Return a row per shape, precision and level: predicted and measured GiB beside weights and optimiser."""
    rows = []
    print(f"{'unet':<6}{'clip':>14}{'prec.':>7}{'level':>11}{'predicted':>12}{'measured':>12}{'ratio':>7}")
    for name, dtype in itertools.product(unet, precision):
        with torch.inference_mode():
            model = build_model(UNETS[name])
            for count, size, level in itertools.product(frames, sizes, memory_plan.LEVELS):
                predicted, measured = _peaks(model, count, size, DTYPES[dtype], level)
                row = {
                    "unet": name,
                    "frames": count,
                    "size": size,
                    "precision": dtype,
                    "level": level,
                    "predicted_gib": predicted / 2**30,
                    "measured_gib": measured / 2**30,
                    "ratio": predicted / measured,
                }
                rows.append(row)
                clip = f"{count}x{size}x{size}"
                print(
                    f"{name:<6}{clip:>14}{dtype:>7}{level:>11}{row['predicted_gib']:>8.3f} GiB"
                    f"{row['measured_gib']:>8.3f} GiB{row['ratio']:>7.2f}",
                    flush=True,
                )
    worst = max(abs(row["ratio"] - 1) for row in rows)
    print(f"{len(rows)} shapes; the worst prediction is {worst:.1%} off")
    return {"rows": rows, "worst": worst}


def _peaks(model: Any, frames: int, size: int, precision: torch.dtype, level: memory_plan.Level) -> tuple[float, float]:
    """Return predicted and measured bytes of the second step; the first one also makes the optimiser's state."""
    allocations = Allocations()
    plans: list[memory_plan.Plan] = []
    before = 0.0

    def on_step(step: int) -> None:
        nonlocal before
        if model.load_device.type == "cuda":
            torch.cuda.synchronize()
            if step == 0:
                # The first step's gradients are still allocated; the second step frees them before it begins.
                before = torch.cuda.memory_allocated() - plans[0].gradients
                torch.cuda.reset_peak_memory_stats()
            else:
                allocations.peak = int(torch.cuda.max_memory_allocated() - before)
        elif step == 0:
            allocations.__enter__()
        else:
            allocations.__exit__(None, None, None)

    one_shot_tune(
        model,
        random_latent(frames, size, size),
        conditioning(model, 1),
        TuneSettings(steps=2),
        precision=precision,
        level=level,
        on_plan=plans.append,
        on_step=on_step,
    )
    return plans[0].bytes, allocations.peak
