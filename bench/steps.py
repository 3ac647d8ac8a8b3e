"""One kind of step, timed: tuning, inverting, sampling."""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tune_a_video.tav_core import host, schedule
from tune_a_video.tav_core.inflate import Inflation, initial_temporal
from tune_a_video.tav_core.invert import ddim_invert
from tune_a_video.tav_core.motion.file import Motion
from tune_a_video.tav_core.sample import ddim_sample
from tune_a_video.tav_core.tuning.trainer import TuneSettings, one_shot_tune
from unets import UNETS, build_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCOPES = {"all": "all", "middle-up": "middle and up"}
GUIDANCE = 12.5


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds per step (median, spread), FLOPs, rate against a matrix product, peak memory."""
    torch.set_num_threads(arguments.threads)
    dtype = DTYPES[arguments.precision]
    with torch.inference_mode():
        rate = matmul_rate(dtype)
        # Tuning computes in the asked precision whatever the weights are in; sampling, in the weights'.
        model = build_model(UNETS[arguments.unet], dtype=torch.float32 if arguments.command == "tune-step" else dtype)
        seconds, flops = time_steps(arguments, model)
    median = statistics.median(seconds)
    return {
        "command": arguments.command,
        "unet": arguments.unet,
        "frames": arguments.frames,
        "size": f"{arguments.width}x{arguments.height}",
        "precision": arguments.precision,
        "train_scope": getattr(arguments, "train_scope", None),
        "plan": getattr(arguments, "plan", None),
        "threads": arguments.threads,
        "device": device_name(model.load_device),
        "median_s": median,
        "min_s": min(seconds),
        "max_s": max(seconds),
        "s_per_frame": median / arguments.frames,
        "flops": float(flops),
        "flops_per_s": flops / median,
        "matmul_flops_per_s": rate,
        "share_of_matmul": flops / median / rate,
        "peak_gib": peak_gib(model.load_device),
    }


def time_steps(arguments: argparse.Namespace, model: Any) -> tuple[list[float], float]:
    """Seconds of each timed step, and the FLOPs of one."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(arguments.frames, 4, arguments.height // 8, arguments.width // 8, generator=generator)
    prompts = [conditioning(model, seed) for seed in (1, 2)]
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    stamps: list[float] = []
    flops = 0.0

    def on_step(step: int, *_: Any) -> None:
        nonlocal flops
        synchronize(model.load_device)
        if step == 0:
            counter.__enter__()
        elif step == 1:
            counter.__exit__(None, None, None)
            flops = counter.get_total_flops()
        stamps.append(time.perf_counter())

    # Two steps more than are timed: the first sets up, and the second counts its FLOPs, which slows it down.
    total = arguments.warmup + arguments.steps + 2
    runner = tune if arguments.command == "tune-step" else walk
    runner(arguments, model, latents, prompts, total, on_step)
    timed = stamps[-arguments.steps - 1 :]
    return [after - before for before, after in zip(timed, timed[1:], strict=False)], flops


def tune(
    arguments: argparse.Namespace,
    model: Any,
    latents: Tensor,
    prompts: list[Any],
    steps: int,
    on_step: Callable[..., None],
) -> None:
    """Tuning steps through the code that the node runs."""
    one_shot_tune(
        model,
        latents,
        prompts[0],
        TuneSettings(steps=steps, train_scope=SCOPES[arguments.train_scope]),  # type: ignore[arg-type]
        precision=DTYPES[arguments.precision],
        budget=None if arguments.budget is None else arguments.budget * 2**30,
        level=None if arguments.plan == "auto" else arguments.plan,
        on_step=on_step,
    )


def walk(
    arguments: argparse.Namespace,
    model: Any,
    latents: Tensor,
    prompts: list[Any],
    steps: int,
    on_step: Callable[..., None],
) -> None:
    """Inversion or guided sampling steps through the host's guider."""
    motion = Motion(initial_temporal(host.unet_of(model), lambda path: True, 0))
    inflated = host.inflate_model(model, Inflation(), motion)
    table = host.sigma_table(model)
    if arguments.command == "invert-step":
        sampler, sigmas, guidance = ddim_invert, schedule.inversion_sigmas(table, steps), 1.0
    else:
        sampler, sigmas, guidance = ddim_sample, schedule.sampling_sigmas(table, steps), GUIDANCE
    host.run_sampler(inflated, sampler, sigmas, prompts[0], prompts[1], guidance, latents, callback=on_step)


def conditioning(model: Any, seed: int) -> list[Any]:
    """A random prompt as wide as the model takes it."""
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(1, 77, host.context_width(model), generator=generator)
    return [[embedding, {"pooled_output": torch.randn(1, 1280, generator=generator)}]]


def matmul_rate(dtype: torch.dtype, side: int = 2048) -> float:
    """FLOP/s of a square matrix product: what this machine can do at this moment."""
    device = host.comfy.model_management.get_torch_device()
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
    """What the figures were measured on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak_gib(device: torch.device) -> float:
    """The most memory the process held: on the device, or in RAM where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    # Two products again for the scores and three for the gradients, of two forward.
    return int(sdpa_flop_count(q, k, v) * 5 // 2)


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
