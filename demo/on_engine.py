"""The demo's job in this process, on ComfyUI's engine alone: no server and no nodes."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from clips import FPS
from job import CLIP, LOSS_CURVE, MOTION, SEED, SETTINGS, SOURCE_FILE, enlarged, takes
from PIL import Image
from progress import Bar
from tune_a_video.tav_core import host, pipeline
from tune_a_video.tav_core.control.blend import composited
from tune_a_video.tav_core.control.settings import PRESETS
from tune_a_video.tav_core.inflate import Inflation
from tune_a_video.tav_core.media import pictures
from tune_a_video.tav_core.media.clip import load_clip
from tune_a_video.tav_core.media.encode import save_clip
from tune_a_video.tav_core.motion import file as weights
from tune_a_video.tav_core.tiny_sd import model as tiny_sd
from tune_a_video.tav_core.tuning.checkpoint import Checkpoint
from tune_a_video.tav_core.tuning.trainer import Trainer, TuneSettings
from tune_a_video.tav_core.tuning.training_unet import training_unet
from world import SIZE

EXERCISED = "NOT exercised: ComfyUI's server and the nodes. The engine from PyPI has neither."


def run(folder: Path) -> dict[str, float]:
    """Do the job on `folder`'s clip, leave edits, loss curve and motion beside it; return the seconds of each part.

    Existing edits are not made again. A cancelled tuning keeps its state below `folder` and resumes from it.
    """
    seconds: dict[str, float] = {}
    # As on a server, where nodes run in inference mode and a checkpoint's weights are inference tensors.
    with torch.inference_mode():
        model, clip, vae = tiny_sd.load()
        frames = load_clip(folder / SOURCE_FILE, frame_count=0, width=SIZE, height=SIZE, resize="crop to fill").images
        latent = vae.encode(frames)
        source = tiny_sd.encode(clip, CLIP.prompt)

        started = time.monotonic()
        tuning = TuneSettings(steps=SETTINGS.tune_steps, learning_rate=SETTINGS.learning_rate, seed=SEED)
        bar = Bar("tuning", tuning.steps)
        with training_unet(model, latent, source) as unet:
            trainer = Trainer(unet, tuning)
            with Checkpoint(folder / "tuning", trainer) as run:
                for step in trainer:
                    run.save_if_due()
                    bar.show(step.number)
            motion, losses = trainer.motion(), trainer.losses
        seconds["tuning"] = time.monotonic() - started
        curve = (pictures.loss_curve(losses)[0] * 255).round().byte().numpy()
        Image.fromarray(curve).save(folder / LOSS_CURVE)
        weights.save_motion(motion.to(torch.float16), folder / MOTION)

        tuned = host.inflate_model(model, Inflation(), motion)
        started = time.monotonic()
        bar = Bar("inversion", SETTINGS.ddim_steps)
        inverted, trajectory = pipeline.invert_and_keep(
            tuned, latent, source, SETTINGS.ddim_steps, lambda step, *_: bar.show(step + 1)
        )
        seconds["inversion"] = time.monotonic() - started
        for take in takes():
            if (folder / take.file).exists():
                continue
            started = time.monotonic()
            bar = Bar(f"sampling: {take.name}: {take.edit.prompt}", SETTINGS.ddim_steps)
            _, positive, negative = host.encode_edit(clip, CLIP.prompt, take.edit.prompt)
            control = None
            if take.controlled:
                control = pipeline.controlled(tuned, PRESETS[take.preset], trajectory, inverted, positive)
            edited = pipeline.sample(
                tuned,
                inverted,
                positive,
                negative,
                SETTINGS.ddim_steps,
                SETTINGS.guidance,
                callback=lambda step, *_, bar=bar: bar.show(step + 1),
                control=control,
            )
            images = composited(frames, vae.decode(edited), control.mask if control else None)
            save_clip(enlarged(images), FPS, folder / take.file, quality=100)
            seconds[f"sampling, {take.name}"] = time.monotonic() - started
    return seconds
