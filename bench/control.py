"""Time edit control against plain sampling: a step while it acts, a step afterwards, and finding its mask."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from steps import DTYPES, add_model_arguments, conditioning, device_name, inflated, random_latent, synchronize
from tune_a_video.tav_core import pipeline
from tune_a_video.tav_core.control.settings import PRESETS, Control
from unets import UNETS, build_model

KINDS = [name for name, preset in PRESETS.items() if preset.acts]
# The share of the steps in which control acts; the step at its end belongs to neither half.
_SHARE = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, the clip and the presets."""
    add_model_arguments(parser)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--presets", nargs="+", choices=KINDS, default=KINDS, metavar="PRESET")


@torch.inference_mode()
def run(
    unet: str, precision: str, steps: int, warmup: int, frames: int, size: int, presets: list[str]
) -> dict[str, Any]:
    """Return and print seconds of a plain step, and by preset the times of it that control takes."""
    model = inflated(build_model(UNETS[unet], dtype=DTYPES[precision]))
    latent, prompts = random_latent(frames, size, size), [conditioning(model, seed) for seed in (1, 2)]
    count = 2 * (steps + warmup)
    inverted, trajectory = pipeline.invert_and_keep(model, latent, prompts[0], count)

    def seconds(control: Control | None) -> list[float]:
        run = control and pipeline.controlled(model, control, trajectory, inverted, prompts[0])
        return _seconds(
            model, lambda on_step: pipeline.sample(model, inverted, *prompts, count, callback=on_step, control=run)
        )

    # A mask of a quarter, in the middle: what a thing in a picture takes.
    mask = torch.zeros(1, size, size)
    mask[:, size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = 1
    # Other programs can only slow a step down: the fastest is the best estimate.
    plain = min(seconds(None)[warmup:])
    rows = {}
    for name in presets:
        preset = PRESETS[name]
        shares = {key: _SHARE for key in ("self_share", "cross_share", "feature_share") if getattr(preset, key) > 0}
        timed = seconds(replace(preset, mask=mask, **shares))
        halves = timed[warmup : count // 2 - 1], timed[count // 2 + warmup :]
        active, afterwards = (min(half) / plain for half in halves)
        rows[name] = {"active": active, "afterwards": afterwards}
    looks = _time_to_find(model, inverted, trajectory, prompts) / plain
    figures = {
        "unet": unet,
        "precision": precision,
        "frames": frames,
        "size": size,
        "device": device_name(model.load_device),
        "plain_s": plain,
        "times_of_plain": rows,
        "finding_the_mask_in_steps": looks,
    }
    print(f"plain step: {plain:.4g} s; finding the mask takes {looks:.2f} of them")
    for name, row in rows.items():
        print(f"{name:>14}  {row['active']:.2f} while control acts, {row['afterwards']:.2f} afterwards")
    return figures


def _seconds(model: Any, sample: Callable[[Callable[..., None]], Any]) -> list[float]:
    """Return the seconds between the steps of a sampling."""
    stamps: list[float] = []

    def on_step(*_: Any) -> None:
        synchronize(model.load_device)
        stamps.append(_now(model))

    sample(on_step)
    return [after - before for before, after in pairwise(stamps)]


def _now(model: Any) -> float:
    """Return seconds; without an accelerator the processor's own, so that other programs do not count."""
    return time.process_time() if model.load_device.type == "cpu" else time.perf_counter()


def _time_to_find(model: Any, inverted: torch.Tensor, trajectory: Any, prompts: list[Any]) -> float:
    times = []
    for _ in range(3):
        run = pipeline.controlled(model, PRESETS["object"], trajectory, inverted, prompts[1])
        start = _now(model)
        pipeline.guider(model, prompts[1], prompts[0], 7.5, run)
        synchronize(model.load_device)
        times.append(_now(model) - start)
    return min(times)
