"""Time one kind of step: tuning, inverting, sampling, sampling under edit control."""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tune_a_video.tav_core import host, pipeline
from tune_a_video.tav_core.control.settings import Control
from tune_a_video.tav_core.inflate import Inflation
from tune_a_video.tav_core.motion.file import Motion
from tune_a_video.tav_core.temporal import initial_temporal
from tune_a_video.tav_core.tuning.memory_plan import Plan
from tune_a_video.tav_core.tuning.trainer import Trainer, TuneSettings
from tune_a_video.tav_core.tuning.training_unet import training_unet
from unets import UNETS, build_model

UNET_NAMES = ("sd15", "sd21", "sdxl", "tiny", "tiny-sdxl")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCOPES = {"all": "all", "middle-up": "middle and up"}
OnStep = Callable[..., None]


@dataclass(frozen=True)
class Step:
    """One measurement: the kind of step, the model and the clip.

    kind: "tune-step", "invert-step", "sample-step" or "controlled-step" (sampling with the clip's queries and keys in
    every step). height, width: pixels. steps: timed steps, after `warmup` others.
    budget: GiB, the node's memory_budget. train_scope, plan, budget and rank concern tuning steps only.
    """

    kind: str
    unet: str = "sd15"
    precision: str = "fp32"
    frames: int = 8
    height: int = 64
    width: int = 64
    steps: int = 7
    warmup: int = 2
    train_scope: str = "all"
    plan: str = "auto"
    budget: float | None = None
    rank: int = 0


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that all benchmarks of steps share."""
    parser.add_argument("--unet", default=Step.unet, choices=UNET_NAMES)
    parser.add_argument("--precision", default=Step.precision, choices=list(DTYPES))
    parser.add_argument("--steps", type=int, default=Step.steps, help="timed steps")
    parser.add_argument("--warmup", type=int, default=Step.warmup, help="steps before those")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the fields of a `Step`."""
    add_model_arguments(parser)
    parser.add_argument("--frames", type=int, default=Step.frames)
    parser.add_argument("--height", type=int, default=Step.height, help="pixels")
    parser.add_argument("--width", type=int, default=Step.width, help="pixels")
    if parser.get_default("kind") == "tune-step":
        parser.add_argument("--train-scope", default=Step.train_scope, choices=list(SCOPES))
        parser.add_argument("--plan", default=Step.plan, choices=["auto", "keep", "selective", "recompute"])
        parser.add_argument("--budget", type=float, help="GiB, the node's memory_budget")
        parser.add_argument("--rank", type=int, default=Step.rank, help="0: whole matrices learn")


def run(**fields: Any) -> dict[str, Any]:
    """Measure one `Step` and print its figures."""
    figures = measure(Step(**fields))
    for key, value in figures.items():
        print(f"{key:>24}  {value:.4g}" if isinstance(value, float) and math.isfinite(value) else f"{key:>24}  {value}")
    return figures


def measure(step: Step) -> dict[str, Any]:
    """Return seconds per step (median, spread), FLOPs, their rate against a matrix product, and peak memory."""
    dtype = DTYPES[step.precision]
    with torch.inference_mode():
        # Tuning computes in the asked precision whatever the weights are in; sampling computes in the weights'.
        model = build_model(UNETS[step.unet], dtype=torch.float32 if step.kind == "tune-step" else dtype)
        rate = matmul_rate(model.load_device, dtype)
        seconds, flops = time_steps(step, model)
    median = statistics.median(seconds)
    return {
        **asdict(step),
        "threads": torch.get_num_threads(),
        "device": device_name(model.load_device),
        "median_s": median,
        "min_s": min(seconds),
        "max_s": max(seconds),
        "s_per_frame": median / step.frames,
        "flops": float(flops),
        "flops_per_s": flops / median,
        "matmul_flops_per_s": rate,
        "share_of_matmul": flops / median / rate,
        "peak_gib": peak_gib(model.load_device),
    }


def time_steps(step: Step, model: Any) -> tuple[list[float], float]:
    """Return the seconds of each timed step and the FLOPs of one."""
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    stamps: list[float] = []
    flops = 0.0

    def on_step(index: int, *_: Any) -> None:
        nonlocal flops
        synchronize(model.load_device)
        if index == 0:
            counter.__enter__()
        elif index == 1:
            counter.__exit__(None, None, None)
            flops = counter.get_total_flops()
        stamps.append(time.perf_counter())

    # Two more steps than asked: the first sets up, and counting FLOPs slows the second down.
    (tune if step.kind == "tune-step" else walk)(step, model, step.warmup + step.steps + 2, on_step)
    timed = stamps[-step.steps - 1 :]
    return [after - before for before, after in zip(timed, timed[1:], strict=False)], flops


def tune(step: Step, model: Any, steps: int, on_step: OnStep) -> None:
    """Run tuning steps through the code that the node runs."""
    scope: Any = SCOPES[step.train_scope]
    settings = TuneSettings(steps=steps, train_scope=scope, rank=step.rank)
    budget = None if step.budget is None else step.budget * 2**30
    latent = random_latent(step.frames, step.height, step.width)
    with training_unet(model, latent, conditioning(model, 1), DTYPES[step.precision]) as unet:
        trainer = Trainer(unet, settings, memory_budget=budget)
        if step.plan != "auto":
            trainer.plan = Plan.all_at(trainer.costs, step.plan)  # type: ignore[arg-type]
        for taken in trainer:
            on_step(taken.number - 1)


def walk(step: Step, model: Any, steps: int, on_step: OnStep) -> None:
    """Run inversion or guided sampling steps through the host's guider."""
    latent = random_latent(step.frames, step.height, step.width)
    positive, negative = (conditioning(model, seed) for seed in (1, 2))
    if step.kind == "invert-step":
        pipeline.invert(inflated(model), latent, positive, steps, callback=on_step)
    elif step.kind == "sample-step":
        pipeline.sample(inflated(model), latent, positive, negative, steps, callback=on_step)
    else:
        ready = inflated(model)
        inverted, trajectory = pipeline.invert_and_keep(ready, latent, positive, steps)
        control = pipeline.controlled(ready, Control(self_share=1.0), trajectory, inverted, positive)
        pipeline.sample(ready, inverted, positive, negative, steps, callback=on_step, control=control)


def inflated(model: Any) -> Any:
    """Inflate a model with untrained temporal layers."""
    return host.inflate_model(model, Inflation(), Motion(initial_temporal(host.unet_of(model), lambda path: True, 0)))


def random_latent(frames: int, height: int, width: int) -> torch.Tensor:
    """Return a random latent [frames, 4, height / 8, width / 8]."""
    return torch.randn(frames, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(0))


def conditioning(model: Any, seed: int) -> list[Any]:
    """Return a random prompt of the width that the model takes."""
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(1, 77, host.context_width(model), generator=generator)
    return [[embedding, {"pooled_output": torch.randn(1, 1280, generator=generator)}]]


def matmul_rate(device: torch.device, dtype: torch.dtype, side: int = 2048) -> float:
    """Measure the FLOP/s of a square matrix product, the machine's speed at this moment."""
    a = torch.randn(side, side, device=device).to(dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """Name the device that was measured."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak_gib(device: torch.device) -> float:
    """Return the peak memory of the process: on the GPU if there is one, else in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    # Five matrix products, where the forward pass has two: two for the scores and three for the gradients.
    return int(sdpa_flop_count(q, k, v) * 5 // 2)


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
