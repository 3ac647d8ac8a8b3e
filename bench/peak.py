"""Compare the planner's predicted memory of a tuning step with the measured peak."""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch
from allocations import Allocations
from steps import DTYPES, UNET_NAMES, conditioning, random_latent
from tune_a_video.tav_core.tuning import memory_plan
from tune_a_video.tav_core.tuning.trainer import Trainer, TuneSettings
from tune_a_video.tav_core.tuning.training_unet import training_unet
from unets import UNETS, build_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the shapes to compare at."""
    parser.add_argument("--unet", nargs="+", default=["tiny", "sd15"], choices=UNET_NAMES)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=list(DTYPES))
    parser.add_argument("--frames", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128], help="pixels, square")
    parser.add_argument("--frames-per-step", type=int, default=0, help="One-Shot Tune's frames_per_step, 0 = all")


def run(
    unet: list[str], precision: list[str], frames: list[int], sizes: list[int], frames_per_step: int = 0
) -> dict[str, Any]:
    """Return a row per shape, precision and level: predicted and measured GiB beside weights and optimiser."""
    rows = []
    print(f"{'unet':<6}{'clip':>14}{'prec.':>7}{'level':>11}{'predicted':>12}{'measured':>12}{'ratio':>7}")
    for name, dtype in itertools.product(unet, precision):
        with torch.inference_mode():
            model = build_model(UNETS[name])
            for count, size, level in itertools.product(frames, sizes, memory_plan.LEVELS):
                predicted, measured = _peaks(model, count, size, DTYPES[dtype], level, frames_per_step)
                row = {
                    "unet": name,
                    "frames": count,
                    "frames_per_step": frames_per_step,
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


def _peaks(
    model: Any, frames: int, size: int, precision: torch.dtype, level: memory_plan.Level, frames_per_step: int
) -> tuple[float, float]:
    """Return predicted and measured bytes of the second step; the first one also makes the optimiser's state."""
    allocations = Allocations()
    latent = random_latent(frames, size, size)
    settings = TuneSettings(steps=2, frames_per_step=frames_per_step)
    with training_unet(model, latent, conditioning(model, 1), precision, frames_per_step) as unet:
        trainer = Trainer(unet, settings)
        trainer.plan = memory_plan.Plan.all_at(trainer.costs, level)
        steps = iter(trainer)
        next(steps)
        if model.load_device.type != "cuda":
            with allocations:
                next(steps)
            return trainer.plan.bytes, allocations.peak
        torch.cuda.synchronize()
        # The first step's gradients are still allocated; the second step frees them before it begins.
        before = torch.cuda.memory_allocated() - trainer.plan.gradients
        torch.cuda.reset_peak_memory_stats()
        next(steps)
        torch.cuda.synchronize()
        return trainer.plan.bytes, torch.cuda.max_memory_allocated() - before
