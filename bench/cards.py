"""Print the planner's choices and predictions for graphics cards, on paper."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from steps import UNET_NAMES, conditioning, random_latent
from tune_a_video.tav_core import host
from tune_a_video.tav_core.tuning.memory_plan import LEVELS, Plan, make_plan
from tune_a_video.tav_core.tuning.trainable import frozen_bytes
from tune_a_video.tav_core.tuning.trainer import SHARE_OF_FREE_MEMORY, Trainer, TuneSettings
from tune_a_video.tav_core.tuning.training_unet import training_unet
from unets import UNETS, build_model

# CUDA's own memory on a card, bytes.
OVERHEAD = 0.6 * 2**30
# fp16 stands for bf16, whose size it has: on the CPU the method attends in float32 where it trains in bf16, which
# would save twice as many bytes as a card does.
PRECISION = torch.float16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, the clip and the cards."""
    parser.add_argument("--unet", default="sd15", choices=UNET_NAMES)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--frames-per-step", type=int, default=0, help="One-Shot Tune's frames_per_step, 0 = all")
    parser.add_argument("--size", type=int, default=512, help="pixels, square")
    parser.add_argument("--rank", type=int, default=0, help="0: whole matrices learn")
    parser.add_argument("--gib", type=float, nargs="+", default=[8, 12, 16, 24, 80], help="memory of the cards")


def run(unet: str, frames: int, frames_per_step: int, size: int, rank: int, gib: list[float]) -> dict[str, Any]:
    """Return the plan for each card in half precision, from probes on this machine.

    A prediction, not a measurement: a card's kernels save other tensors than the CPU's (an attention's log-sum
    differs in size).
    """
    with torch.inference_mode():
        model = build_model(UNETS[unet], dtype=PRECISION)
        latent, prompt = random_latent(frames, size, size), conditioning(model, 1)
        with training_unet(model, latent, prompt, PRECISION, frames_per_step) as loaded:
            trainer = Trainer(loaded, TuneSettings(frames_per_step=frames_per_step, rank=rank))
            costs, trained = trainer.costs, sum(p.numel() for p in trainer.trained.values())
            frozen = frozen_bytes(loaded.module, "all", rank, PRECISION)
    weights = sum(p.numel() * 2 for p in host.unet_of(model).parameters())
    # The float32 weights that learn with the frozen ones that a rank adds to, and AdamW's two moments of each.
    learning, moments = 4 * trained + frozen, 2 * 4 * trained
    rows = []
    clip = f"{frames} frames of {size}x{size}" + (f", {frames_per_step} a step" if frames_per_step else "")
    parts = {"weights": weights, "learning": learning, "moments": moments}
    print(f"{unet}, {clip}, half precision, GiB:", *(f"{name} {part / 2**30:.2f}" for name, part in parts.items()))
    for level in LEVELS:
        print(f"  all {level}: {Plan.all_at(costs, level).bytes / 2**30:.2f} GiB beside those")
    for card in gib:
        free = card * 2**30 - OVERHEAD - weights - learning
        plan = make_plan(costs, SHARE_OF_FREE_MEMORY * (free - moments) + moments, moments)
        resident = 0 if plan.offload else moments
        plan = make_plan(costs, SHARE_OF_FREE_MEMORY * (free - resident) + resident, resident)
        total = (plan.bytes + weights + learning + resident + OVERHEAD) / 2**30
        fits = "" if plan.fits else "; more than there is: part of the weights goes to RAM"
        where = "" if resident else "; the moments in RAM"
        print(f"{card:>5.0f} GiB card: {plan}{where}; {total:.1f} GiB in all{fits}")
        row = {"card_gib": card, "plan": str(plan), "offload": not resident, "total_gib": total, "fits": not fits}
        rows.append(row)
    return {"unet": unet, "clip": clip, "rank": rank, "cards": rows}
