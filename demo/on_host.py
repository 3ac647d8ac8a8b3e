"""The demo's job as graphs in a real ComfyUI, posted to it as its own front end would."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from clips import FPS, Edit
from engine import PACK_ROOT
from host_server import HostServer, Progress, host_version
from job import CLIP, EDITS, ENLARGED, LOSS_CURVE, MOTION, SEED, SETTINGS, SOURCE_FILE, edit_file
from progress import Bar
from world import SIZE

EXERCISED = "Everything that the quick start uses ran on the real host, on the CPU."
# The name of a node's progress bar, by its id in the graph.
_WORK = {"tuning": "tuning", "inversion": "inversion", "sampling": "sampling"}


def graph(edit: Edit) -> dict[str, dict[str, Any]]:
    """The quick start in API format: load, tune, invert, sample, save."""

    def node(class_type: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": class_type, "inputs": inputs}

    model, clip, vae = (["demo model", output] for output in range(3))
    return {
        "demo model": node("TAV_LoadDemoModel"),
        "clip": node(
            "TAV_LoadVideo",
            file=SOURCE_FILE,
            start=0.0,
            start_unit="seconds",
            frame_count=0,
            frame_step=1,
            width=SIZE,
            height=SIZE,
            resize="crop to fill",
        ),
        "latent": node("VAEEncode", pixels=["clip", 0], vae=vae),
        "source": node("CLIPTextEncode", clip=clip, text=CLIP.prompt),
        "empty": node("CLIPTextEncode", clip=clip, text=""),
        "tuning": node(
            "TAV_OneShotTune",
            model=model,
            latent=["latent", 0],
            conditioning=["source", 0],
            steps=SETTINGS.tune_steps,
            learning_rate=SETTINGS.learning_rate,
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
            steps=SETTINGS.ddim_steps,
        ),
        "edit prompt": node("CLIPTextEncode", clip=clip, text=edit.prompt),
        "sampling": node(
            "TAV_Sample",
            model=["tuning", 0],
            positive=["edit prompt", 0],
            negative=["empty", 0],
            latent=["inversion", 0],
            steps=SETTINGS.ddim_steps,
            guidance=SETTINGS.guidance,
            eta=0.0,
            seed=SEED,
            last_step="clip noise level",
        ),
        "frames": node("VAEDecode", samples=["sampling", 0], vae=vae),
        "enlarged": node("ImageScaleBy", image=["frames", 0], upscale_method="nearest-exact", scale_by=float(ENLARGED)),
        "video": node(
            "TAV_SaveVideo",
            images=["enlarged", 0],
            fps=FPS,
            filename_prefix=Path(edit_file(edit)).stem,
            format="mp4",
            quality=100,
        ),
    }


def run(comfyui: Path, folder: Path) -> dict[str, float]:
    """Does the job on `folder`'s clip, leaves edits, loss curve and motion beside it; seconds of each part.

    Edits that are there are not made again. Cancelled, a tuning keeps its state below `folder` and goes on from it.
    """
    print(f"Starting the ComfyUI {host_version(comfyui)} in {comfyui} ...", flush=True)
    seconds: dict[str, float] = {}
    base = folder / "host"
    (base / "input").mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / SOURCE_FILE, base / "input")
    with HostServer(comfyui, base, {"tune-a-video": PACK_ROOT}) as server:
        for edit in EDITS:
            if (folder / edit_file(edit)).exists():
                continue
            print(f"Edit: {edit.prompt}", flush=True)
            try:
                result = server.run(graph(edit), _Shown()).raise_for_error()
            except KeyboardInterrupt:
                server.cancel()
                raise
            reused = " (the tuning is reused)" if "tuning" in result.cached else ""
            print(f"  {result.seconds:.0f} s{reused}", flush=True)
            seconds[f"graph, {edit.kind}"] = result.seconds
            for made, name in (
                (next(server.output_folder.glob("loss-curve*.png")), LOSS_CURVE),
                (next(server.models_folder("tav").glob("motion*")), MOTION),
            ):
                shutil.copy(made, folder / name)
            os.replace(next(server.output_folder.glob(f"{Path(edit_file(edit)).stem}*.mp4")), folder / edit_file(edit))
    return seconds


class _Shown:
    """Progress messages of a server on the terminal."""

    def __init__(self) -> None:
        self.bars: dict[str, Bar] = {}

    def __call__(self, progress: Progress) -> None:
        if progress.node in _WORK:
            bar = self.bars.setdefault(progress.node, Bar(_WORK[progress.node], int(progress.maximum)))
            bar.show(int(progress.value))
