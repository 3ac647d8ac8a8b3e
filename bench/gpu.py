"""Measure all that a GPU decides, in about ten minutes: python bench gpu --json FILE.

Needs PyTorch and a ComfyUI tree. Each part is a process with a time limit of its own, and every figure is written as it
comes, so that a part that fails or hangs costs its own figures only. ``--on cpu`` runs the same at a small size.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from steps import DTYPES, Step, conditioning, device_name, inflated, measure, random_latent
from tune_a_video.tav_core import pipeline
from unets import UNETS, build_model

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]


class Clip(NamedTuple):
    """A UNet's name, and the frames and pixels (square) of a clip."""

    unet: str
    frames: int
    size: int


@dataclass(frozen=True)
class Scale:
    """The sizes of a run. ``caps``: memory that the allocator is held to, GiB; none where it cannot be held."""

    main: Clip
    lengths: tuple[Clip, ...]
    large: Clip
    peaks: tuple[Clip, ...]
    precision: str
    caps: tuple[float, ...]
    steps: int


SCALES = {
    "cuda": Scale(
        Clip("sd15", 24, 512),
        (Clip("sd15", 8, 512), Clip("sd15", 64, 512)),
        Clip("sdxl", 8, 1024),
        (Clip("sd15", 8, 512), Clip("sd15", 24, 512)),
        "bf16",
        (6, 8, 12, 16, 24),
        5,
    ),
    "cpu": Scale(
        Clip("tiny", 4, 64), (Clip("tiny", 2, 64),), Clip("tiny-sdxl", 2, 64), (Clip("tiny", 2, 64),), "fp32", (), 2
    ),
}


def reference(scale: Scale) -> Iterator[Row]:
    """Run the released implementation's numbers on this device, in float32 without TF32."""
    del scale
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_reference.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.strip()] or done.stderr.splitlines()[-1:]
    yield {"passed": done.returncode == 0, "says": lines[-3:]}


def half_precision(scale: Scale) -> Iterator[Row]:
    """Compare one guided step in half precision with float32: relative L2 distance."""
    clip = scale.main._replace(frames=4)
    latent, results = random_latent(clip.frames, clip.size, clip.size), {}
    for name, dtype in DTYPES.items():
        model = inflated(build_model(UNETS[clip.unet], dtype=dtype))
        prompts = (conditioning(model, seed) for seed in (1, 2))
        results[name] = pipeline.sample(model, latent, *prompts, 1).float()
    for name in ("bf16", "fp16"):
        error = (results[name] - results["fp32"]).norm() / results["fp32"].norm()
        yield {"precision": name, "relative_error": float(error)}


def steps_of(scale: Scale) -> Iterator[Row]:
    """Time every kind of step at the main size; tuning at each plan and with both train scopes."""
    base = _step(scale, scale.main)
    for scope in ("all", "middle-up"):
        for plan in ("auto", "keep", "selective", "recompute"):
            yield from _measured(replace(base, kind="tune-step", train_scope=scope, plan=plan))
    for kind in ("invert-step", "sample-step", "controlled-step"):
        yield from _measured(replace(base, kind=kind))


def lengths(scale: Scale) -> Iterator[Row]:
    """Time steps of shorter and longer clips."""
    for clip in scale.lengths:
        for kind in ("tune-step", "invert-step", "sample-step"):
            yield from _measured(replace(_step(scale, clip), kind=kind))


def large(scale: Scale) -> Iterator[Row]:
    """Time steps of SDXL."""
    for kind in ("tune-step", "invert-step", "sample-step"):
        yield from _measured(replace(_step(scale, scale.large), kind=kind, steps=2, warmup=1))


def peaks(scale: Scale) -> Iterator[Row]:
    """Compare predicted and measured memory of a tuning step at every level of the plan."""
    import peak

    for clip in scale.peaks:
        yield from peak.run([clip.unet], [scale.precision], [clip.frames], [clip.size])["rows"]


def caps(scale: Scale) -> Iterator[Row]:
    """Time a tuning step within the memory of smaller cards, down to where weights go over the bus."""
    total = torch.cuda.get_device_properties(0).total_memory if scale.caps else 0
    for gib in scale.caps:
        if gib * 2**30 <= total:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(gib * 2**30 / total)
            step = replace(_step(scale, scale.main), kind="tune-step", steps=3, warmup=1)
            yield from ({"cap_gib": gib, **row} for row in _measured(step))


def compiled(scale: Scale) -> Iterator[Row]:
    """Time guided sampling as it is, compiled, and as a CUDA graph, by the host's own wrapper."""
    from comfy_api.torch_helpers.torch_compile import set_torch_compile_wrapper

    clip = scale.lengths[0]
    latent = random_latent(clip.frames, clip.size, clip.size)
    for backend in (None, "inductor", "cudagraphs"):
        if backend == "cudagraphs" and not torch.cuda.is_available():
            continue
        model = inflated(build_model(UNETS[clip.unet], dtype=DTYPES[scale.precision]))
        if backend:
            set_torch_compile_wrapper(model, backend)
        prompts = [conditioning(model, seed) for seed in (1, 2)]
        stamps: list[float] = []

        def on_step(*_: Any, stamps: list[float] = stamps) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            stamps.append(time.perf_counter())

        try:
            pipeline.sample(model, latent, *prompts, scale.steps + 3, callback=on_step)
        except Exception as error:
            yield {"backend": backend or "none", "error": f"{type(error).__name__}: {error}"[:300]}
            continue
        yield {
            "backend": backend or "none",
            "s_per_step": (stamps[-1] - stamps[2]) / (len(stamps) - 3),
            **clip._asdict(),
        }


def dynamic_vram(scale: Scale) -> Iterator[Row]:
    """Run a tuning and an edit on a server with dynamic VRAM on and off: seconds, and free memory before and after."""
    del scale
    import engine
    import on_host
    from host_server import HostServer
    from job import save_source, takes

    comfyui = engine.find_comfyui()
    if comfyui is None or "--disable-dynamic-vram" not in (comfyui / "comfy" / "cli_args.py").read_text():
        yield {"skipped": "this ComfyUI has no dynamic VRAM, or there is only its engine"}
        return
    for flag in ("--enable-dynamic-vram", "--disable-dynamic-vram") if torch.cuda.is_available() else ():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "input").mkdir()
            save_source(Path(folder) / "input")
            packs = {"tune-a-video": ROOT}
            with HostServer(comfyui, Path(folder), packs, arguments=[flag], cpu=False) as server:
                before = server.get("/system_stats")["devices"][0]["vram_free"]
                result = server.run(on_host.graph(takes()[0])).raise_for_error()
                after = server.get("/system_stats")["devices"][0]["vram_free"]
            yield {
                "flag": flag,
                "seconds": result.seconds,
                "free_gib_before": before / 2**30,
                "free_gib_after": after / 2**30,
            }


class Part(NamedTuple):
    """A part of the run: what it does, and how many seconds it may take on a GPU."""

    work: Callable[[Scale], Iterator[Row]]
    seconds: int


PARTS = {
    "reference": Part(reference, 120),
    "half precision": Part(half_precision, 60),
    "steps": Part(steps_of, 150),
    "lengths": Part(lengths, 90),
    "large": Part(large, 90),
    "peaks": Part(peaks, 60),
    "caps": Part(caps, 90),
    "dynamic VRAM": Part(dynamic_vram, 90),
    "compiled": Part(compiled, 90),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where to run, for how long, and which parts."""
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--on", choices=list(SCALES), default="cuda" if has_gpu else "cpu")
    parser.add_argument("--minutes", type=float, default=9.0, help="of all parts together")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART",
                        help="; ".join(PARTS))  # fmt: skip
    parser.add_argument("--results", type=Path, help="file that grows by a line of JSON a figure; default: a new one")
    parser.add_argument("--inside", choices=list(PARTS), help=argparse.SUPPRESS)


def run(on: str, minutes: float, parts: list[str], results: Path | None, inside: str | None) -> dict[str, Any]:
    """Run the parts one after the other; return all rows, and what each part took or why it ended."""
    if inside is not None:
        assert results is not None
        return _run_inside(inside, SCALES[on], results)
    if on == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no CUDA device. Use --on cpu, which runs the same at a small size.")
    lines = results or Path(f"bench-gpu-{int(time.time())}.jsonl")
    lines.unlink(missing_ok=True)
    ends = time.monotonic() + 60 * minutes
    states: dict[str, Any] = {}
    for name in parts:
        left = ends - time.monotonic()
        if left < 5:
            states[name] = {"ended": "no time was left"}
            continue
        began = time.monotonic()
        limit = min(left, 1.5 * PARTS[name].seconds) if on == "cuda" else left
        ended = _in_process(name, on, lines, limit)
        states[name] = {"ended": ended, "seconds": round(time.monotonic() - began, 1)}
        print(f"{name}: {ended}, {states[name]['seconds']:.0f} s", flush=True)
    rows = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    device = device_name(torch.device("cuda" if on == "cuda" else "cpu"))
    print(_table(device, rows))
    print(f"All figures: {lines}")
    return {"device": device, "torch": torch.__version__, "parts": states, "rows": rows}


def _in_process(name: str, on: str, lines: Path, limit: float) -> str:
    """Run a part as a process of its own; return how it ended."""
    command = [sys.executable, "-u", str(ROOT / "bench"), *_common(), "gpu", "--on", on, "--inside", name,
               "--results", str(lines)]  # fmt: skip
    # Products in float32 are compared with the released implementation's, which TF32 would round.
    environment = {**os.environ, "NVIDIA_TF32_OVERRIDE": "0"}
    if on == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"stopped after its {limit:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "done" if code == 0 else f"failed with code {code}; its error is above"


def _common() -> list[str]:
    """Return the options of `python bench` itself that this run was given."""
    given, names = [], ("--comfyui", "--engine", "--threads")
    for index, argument in enumerate(sys.argv):
        name, equals, value = argument.partition("=")
        if name in names:
            given += [name, value if equals else sys.argv[index + 1]]
    return given


def _run_inside(name: str, scale: Scale, lines: Path) -> dict[str, Any]:
    count = 0
    with torch.inference_mode():
        for row in PARTS[name].work(scale):
            with lines.open("a") as file:
                file.write(json.dumps({"part": name, **row}) + "\n")
            count += 1
    return {"part": name, "rows": count}


def _step(scale: Scale, clip: Clip) -> Step:
    return Step("", clip.unet, scale.precision, clip.frames, clip.size, clip.size, steps=scale.steps, warmup=1)


def _measured(step: Step) -> Iterator[Row]:
    """Yield the figures of a step, or the reason why there are none."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        yield measure(step)
    except (RuntimeError, ValueError) as error:
        names = ("kind", "plan", "train_scope", "unet", "frames", "height")
        yield {**{name: getattr(step, name) for name in names}, "error": f"{type(error).__name__}: {error}"[:300]}


def _table(device: str, rows: list[Row]) -> str:
    """Return the steps as Markdown."""
    lines = [
        f"\n{device}",
        "| part | step | clip | plan, scope | seconds | peak, GiB | of the matrix rate |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "median_s" in row:
            tunes = row["kind"] == "tune-step"
            cells = (
                row["part"] + (f", {row['cap_gib']} GiB" if "cap_gib" in row else ""),
                row["kind"],
                f"{row['unet']}, {row['frames']} x {row['height']} px",
                f"{row['plan']}, {row['train_scope']}" if tunes else "",
                f"{row['median_s']:.3g}",
                f"{row['peak_gib']:.1f}",
                f"{row['share_of_matmul']:.2f}",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
