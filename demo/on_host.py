"""The demo's job as graphs in a real ComfyUI, posted to it as its own front end would."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from clips import FPS
from engine import PACK_ROOT
from host_server import HostServer, Progress, host_version
from job import CLIP, ENLARGED, LOSS_CURVE, MOTION, SEED, SETTINGS, SOURCE_FILE, Take, takes
from progress import Bar
from world import SIZE

EXERCISED = "Everything that the quick start uses ran on the real host, on the CPU."
# The name of a node's progress bar, by its id in the graph.
_WORK = {"tuning": "tuning", "inversion": "inversion", "sampling": "sampling"}


def graph(take: Take) -> dict[str, dict[str, Any]]:
    """The template of an edit in API format: load, tune, invert, sample, save."""

    def node(class_type: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": class_type, "inputs": inputs}

    model, clip, vae = (["demo model", output] for output in range(3))
    nodes = {
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
        "edit prompt": node(
            "TAV_EditPrompt",
            clip=clip,
            source=CLIP.prompt,
            edit=take.edit.prompt,
            negative_prompt="empty prompt",
        ),
        "sampling": node(
            "TAV_Sample",
            model=["tuning", 0],
            positive=["edit prompt", 1],
            negative=["edit prompt", 2],
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
            filename_prefix=Path(take.file).stem,
            format="mp4",
            quality=100,
        ),
    }
    if take.controlled:
        nodes["control"] = node("TAV_EditControl", preset=take.preset, strength=0.5)
        nodes["sampling"]["inputs"]["control"] = ["control", 0]
        nodes["kept"] = node(
            "ImageCompositeMasked",
            destination=["clip", 0],
            source=["frames", 0],
            mask=["sampling", 1],
            x=0,
            y=0,
            resize_source=False,
        )
        nodes["enlarged"]["inputs"]["image"] = ["kept", 0]
    return nodes


def run(comfyui: Path, folder: Path) -> dict[str, float]:
    """Does the job on `folder`'s clip, leaves edits, loss curve and motion beside it; seconds of each part.

    Edits that are there are not made again. A cancelled tuning keeps its state below `folder` and resumes from it.
    """
    print(f"Starting the ComfyUI {host_version(comfyui)} in {comfyui} ...", flush=True)
    seconds: dict[str, float] = {}
    base = folder / "host"
    (base / "input").mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / SOURCE_FILE, base / "input")
    with HostServer(comfyui, base, {"tune-a-video": PACK_ROOT}) as server:
        for take in takes():
            if (folder / take.file).exists():
                continue
            print(f"Edit: {take.edit.prompt}{', under edit control' if take.controlled else ''}", flush=True)
            try:
                result = server.run(graph(take), _Shown()).raise_for_error()
            except KeyboardInterrupt:
                server.cancel()
                raise
            reused = " (the tuning is reused)" if "tuning" in result.cached else ""
            print(f"  {result.seconds:.0f} s{reused}", flush=True)
            seconds[f"graph, {take.name}"] = result.seconds
            for made, name in (
                (next(server.output_folder.glob("loss-curve*.png")), LOSS_CURVE),
                (next(server.models_folder("tav").glob("motion*")), MOTION),
            ):
                shutil.copy(made, folder / name)
            os.replace(next(server.output_folder.glob(f"{Path(take.file).stem}_*.mp4")), folder / take.file)
    return seconds


class _Shown:
    """Progress messages of a server on the terminal."""

    def __init__(self) -> None:
        self.bars: dict[str, Bar] = {}

    def __call__(self, progress: Progress) -> None:
        if progress.node in _WORK:
            bar = self.bars.setdefault(progress.node, Bar(_WORK[progress.node], int(progress.maximum)))
            bar.show(int(progress.value))
