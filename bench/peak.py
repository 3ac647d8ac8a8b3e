"""What the planner predicts of a tuning step's memory: against what is measured, and for cards that are not there."""

from __future__ import annotations

import argparse
import itertools
from typing import Any
from unittest import mock

import torch
from allocations import Allocations
from steps import DTYPES, conditioning
from tune_a_video.tav_core import attention, host
from tune_a_video.tav_core.inflate import Inflation
from tune_a_video.tav_core.tuning import memory_plan as memory
from tune_a_video.tav_core.tuning import trainer as tune
from tune_a_video.tav_core.tuning.trainer import TuneSettings, one_shot_tune
from unets import UNETS, build_model


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """A row for every shape, precision and level: predicted and measured bytes beside weights and optimiser."""
    torch.set_num_threads(arguments.threads)
    rows = []
    print(f"{'unet':<6}{'clip':>14}{'prec.':>7}{'level':>11}{'predicted':>12}{'measured':>12}{'ratio':>7}")
    for name, precision in itertools.product(arguments.unet, arguments.precision):
        with torch.inference_mode():
            model = build_model(UNETS[name])
            for frames, size, level in itertools.product(arguments.frames, arguments.sizes, memory.LEVELS):
                predicted, measured = _one(model, frames, size, precision, level)
                row = {
                    "unet": name,
                    "frames": frames,
                    "size": size,
                    "precision": precision,
                    "level": level,
                    "predicted_gib": predicted / 2**30,
                    "measured_gib": measured / 2**30,
                    "ratio": predicted / measured,
                }
                rows.append(row)
                clip = f"{frames}x{size}x{size}"
                print(
                    f"{name:<6}{clip:>14}{precision:>7}{level:>11}{row['predicted_gib']:>8.3f} GiB"
                    f"{row['measured_gib']:>8.3f} GiB{row['ratio']:>7.2f}",
                    flush=True,
                )
    worst = max(abs(row["ratio"] - 1) for row in rows)
    print(f"{len(rows)} shapes; the worst prediction is {worst:.1%} off")
    return {"rows": rows, "worst": worst}


def _one(model: Any, frames: int, size: int, precision: str, level: memory.Level) -> tuple[float, float]:
    """Predicted and measured bytes of a step, the second one: the first also makes the optimiser's state."""
    latents = torch.randn(frames, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(0))
    allocations = Allocations()
    plans: list[memory.Plan] = []
    before = 0

    def on_step(step: int) -> None:
        nonlocal before
        if model.load_device.type == "cuda":
            torch.cuda.synchronize()
            if step == 0:
                # The gradients of the step before are still there; the next one lets go of them first.
                before = torch.cuda.memory_allocated() - gradients
                torch.cuda.reset_peak_memory_stats()
            else:
                allocations.peak = torch.cuda.max_memory_allocated() - before
        elif step == 0:
            allocations.__enter__()
        else:
            allocations.__exit__(None, None, None)

    gradients = 0

    def on_plan(plan: memory.Plan) -> None:
        nonlocal gradients
        gradients = int(plan.gradients)
        plans.append(plan)

    one_shot_tune(
        model,
        latents,
        conditioning(model, 1),
        TuneSettings(steps=2),
        precision=DTYPES[precision],
        level=level,
        on_plan=on_plan,
        on_step=on_step,
    )
    return plans[0].bytes, allocations.peak


def cards(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is planned in half precision for cards of so many GiB, from probes on this machine.

    A prediction, not a measurement: the kernels of a card save other things than the CPU's (an attention's log-sum
    differs in size), and 0.6 GiB is taken off for CUDA itself.
    """
    torch.set_num_threads(arguments.threads)
    side, overhead = arguments.size // 8, 0.6 * 2**30
    with torch.inference_mode():
        model = build_model(UNETS[arguments.unet], dtype=torch.bfloat16)
        latents = torch.randn(arguments.frames, 4, side, side)
        # A card attends in bfloat16; here that would be done in float32, which saves twice as much.
        with mock.patch.object(attention, "_fused", torch.nn.functional.scaled_dot_product_attention):
            costs, trained = tune.costs_of(
                model, latents, conditioning(model, 1), TuneSettings(), Inflation(), torch.bfloat16
            )
    weights = sum(p.numel() * 2 for p in host.unet_of(model).parameters())
    # The float32 weights that learn, and AdamW's two moments of each.
    learning, moments = 4 * trained, 2 * 4 * trained
    rows = []
    clip = f"{arguments.frames} frames of {arguments.size}x{arguments.size}"
    sizes = {"weights": weights, "learning": learning, "moments": moments}
    print(f"{arguments.unet}, {clip}, bf16, GiB:", *(f"{name} {size / 2**30:.2f}" for name, size in sizes.items()))
    for level in memory.LEVELS:
        print(f"  all {level}: {memory.uniform_plan(costs, level).bytes / 2**30:.2f} GiB beside those")
    for gib in arguments.gib:
        free = gib * 2**30 - overhead - weights - learning
        plan = memory.make_plan(costs, tune.SHARE_OF_FREE_MEMORY * (free - moments) + moments, moments)
        resident = 0 if plan.offload else moments
        plan = memory.make_plan(costs, tune.SHARE_OF_FREE_MEMORY * (free - resident) + resident, resident)
        total = (plan.bytes + weights + learning + resident + overhead) / 2**30
        fits = "" if plan.fits else "; more than there is: part of the weights goes to RAM"
        where = "" if resident else "; the moments in RAM"
        print(f"{gib:>5.0f} GiB card: {plan}{where}; {total:.1f} GiB in all{fits}")
        rows.append({"card_gib": gib, "plan": str(plan), "offload": not resident, "total_gib": total, "fits": not fits})
    return {"unet": arguments.unet, "clip": clip, "cards": rows}
