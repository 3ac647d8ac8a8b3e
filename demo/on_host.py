"""The demo's job as a graph in a real ComfyUI, posted to it as its own front end would."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import tiny_checkpoint
from engine import PACK_ROOT
from host_server import HostServer, Progress, host_version
from job import (
    DDIM_STEPS,
    EDIT_PROMPTS,
    FILES,
    FPS,
    GUIDANCE,
    LEARNING_RATE,
    SEED,
    SIZE,
    SOURCE_PROMPT,
    TUNE_STEPS,
)

CAPTION = "edit: {prompt}"
EXERCISED = "Everything that the quick start uses ran on the real host, on the CPU."


def graph(edit_prompt: str, edit_name: str) -> dict[str, dict[str, Any]]:
    """The quick start in API format: load, tune, invert, sample, save."""

    def node(class_type: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": class_type, "inputs": inputs}

    model, clip, vae = (["checkpoint", output] for output in range(3))
    return {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name=FILES.checkpoint),
        "clip": node(
            "TAV_LoadVideo",
            file=FILES.clip,
            start=0.0,
            start_unit="seconds",
            frame_count=0,
            frame_step=1,
            width=SIZE,
            height=SIZE,
            resize="crop to fill",
        ),
        "latent": node("VAEEncode", pixels=["clip", 0], vae=vae),
        "source": node("CLIPTextEncode", clip=clip, text=SOURCE_PROMPT),
        "empty": node("CLIPTextEncode", clip=clip, text=""),
        "tuning": node(
            "TAV_OneShotTune",
            model=model,
            latent=["latent", 0],
            conditioning=["source", 0],
            steps=TUNE_STEPS,
            learning_rate=LEARNING_RATE,
            seed=SEED,
            train_scope="all",
            precision="fp32",
            warmup_steps=0,
            gradient_clip=1.0,
        ),
        "loss curve": node("SaveImage", images=["tuning", 2], filename_prefix="loss-curve"),
        "motion": node("TAV_SaveMotion", motion=["tuning", 1], filename_prefix="motion"),
        "inversion": node(
            "TAV_DDIMInvert",
            model=["tuning", 0],
            latent=["latent", 0],
            conditioning=["source", 0],
            steps=DDIM_STEPS,
        ),
        "edit prompt": node("CLIPTextEncode", clip=clip, text=edit_prompt),
        "sampling": node(
            "TAV_Sample",
            model=["tuning", 0],
            positive=["edit prompt", 0],
            negative=["empty", 0],
            latent=["inversion", 0],
            steps=DDIM_STEPS,
            guidance=GUIDANCE,
            eta=0.0,
            seed=SEED,
            last_step="clip noise level",
        ),
        "frames": node("VAEDecode", samples=["sampling", 0], vae=vae),
        "video": node(
            "TAV_SaveVideo",
            images=["frames", 0],
            fps=FPS,
            filename_prefix=edit_name,
            format="mp4",
            quality=90,
        ),
    }


def run(comfyui: Path, folder: Path) -> None:
    """Does the job on `folder`'s clip and leaves the edits, the loss curve and the motion beside it."""
    print(f"Starting the ComfyUI {host_version(comfyui)} in {comfyui} ...", flush=True)
    with tempfile.TemporaryDirectory(prefix="tune-a-video-") as scratch:
        base = Path(scratch)
        weights = tiny_checkpoint.checkpoint_weights(tiny_checkpoint.SD1_SHALLOW, SEED)
        tiny_checkpoint.save(weights, base / "models" / "checkpoints" / FILES.checkpoint)
        (base / "input").mkdir()
        shutil.copy(folder / FILES.clip, base / "input")
        with HostServer(comfyui, base, {"tune-a-video": PACK_ROOT}) as server:
            for name, prompt in zip(FILES.edits, EDIT_PROMPTS, strict=True):
                print(f"Edit: {prompt}", flush=True)
                result = server.run(graph(prompt, Path(name).stem), show_progress).raise_for_error()
                reused = " (the tuning is reused)" if "tuning" in result.cached else ""
                print(f"  {result.seconds:.0f} s{reused}", flush=True)
                shutil.copy(next(server.output_folder.glob(f"{Path(name).stem}*.mp4")), folder / name)
            shutil.copy(next(server.output_folder.glob("loss-curve*.png")), folder / FILES.loss_curve)
            shutil.copy(next(server.models_folder("tav").glob("motion*")), folder / FILES.motion)


def show_progress(progress: Progress) -> None:
    if progress.value == progress.maximum:
        print(f"  {progress.node}: {progress.maximum:.0f} steps", flush=True)
    elif sys.stdout.isatty():
        print(f"  {progress.node}: {progress.value:.0f} of {progress.maximum:.0f}", end="\r", flush=True)
