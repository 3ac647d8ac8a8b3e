"""The demo's job in this process, on ComfyUI's engine alone: no server and no nodes."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from clips import FPS
from job import CLIP, EDITS, LOSS_CURVE, MOTION, SEED, SETTINGS, SOURCE_FILE, edit_file, enlarged
from PIL import Image
from progress import Bar
from sprites import SIZE
from tune_a_video.tav_core import host, schedule
from tune_a_video.tav_core.inflate import Inflation
from tune_a_video.tav_core.invert import ddim_invert
from tune_a_video.tav_core.media import pictures
from tune_a_video.tav_core.media.clip import load_clip
from tune_a_video.tav_core.media.encode import save_clip
from tune_a_video.tav_core.motion import file as weights
from tune_a_video.tav_core.sample import ddim_sample
from tune_a_video.tav_core.tiny_sd import model as tiny_sd
from tune_a_video.tav_core.tuning.trainer import TuneSettings, one_shot_tune

EXERCISED = "NOT exercised: ComfyUI's server and the nodes. The engine from PyPI has neither."


def run(folder: Path) -> dict[str, float]:
    """Does the job on `folder`'s clip, leaves edits, loss curve and motion beside it; seconds of each part.

    Edits that are there are not made again. Cancelled, a tuning keeps its state below `folder` and goes on from it.
    """
    seconds: dict[str, float] = {}
    # As on a server, where nodes run in inference mode and a checkpoint's weights are inference tensors.
    with torch.inference_mode():
        model, clip, vae = tiny_sd.load()
        frames = load_clip(folder / SOURCE_FILE, frame_count=0, width=SIZE, height=SIZE, resize="crop to fill").images
        latent = vae.encode(frames)
        source, empty = tiny_sd.encode(clip, CLIP.prompt), tiny_sd.encode(clip, "")

        started = time.monotonic()
        tuning = TuneSettings(steps=SETTINGS.tune_steps, learning_rate=SETTINGS.learning_rate, seed=SEED)
        bar = Bar("tuning", tuning.steps)
        motion, losses = one_shot_tune(
            model, latent, source, tuning, on_step=lambda step: bar.show(step + 1), checkpoints=folder / "tuning"
        )
        seconds["tuning"] = time.monotonic() - started
        curve = (pictures.loss_curve(losses)[0] * 255).round().byte().numpy()
        Image.fromarray(curve).save(folder / LOSS_CURVE)
        weights.save_motion(motion.to(torch.float16), folder / MOTION)

        tuned = host.inflate_model(model, Inflation(), motion)
        levels = host.sigma_table(tuned)
        started = time.monotonic()
        rising = schedule.inversion_sigmas(levels, SETTINGS.ddim_steps)
        bar = Bar("inversion", SETTINGS.ddim_steps)
        inverted = host.run_sampler(
            tuned, ddim_invert, rising, source, source, 1.0, latent, callback=lambda step, *_: bar.show(step + 1)
        )
        seconds["inversion"] = time.monotonic() - started
        falling = schedule.sampling_sigmas(levels, SETTINGS.ddim_steps)
        for edit in EDITS:
            if (folder / edit_file(edit)).exists():
                continue
            started = time.monotonic()
            bar = Bar(f"sampling: {edit.prompt}", SETTINGS.ddim_steps)
            prompt = tiny_sd.encode(clip, edit.prompt)
            edited = host.run_sampler(
                tuned,
                ddim_sample,
                falling,
                prompt,
                empty,
                SETTINGS.guidance,
                inverted,
                callback=lambda step, *_, bar=bar: bar.show(step + 1),
            )
            save_clip(enlarged(vae.decode(edited)), FPS, folder / edit_file(edit), quality=100)
            seconds[f"sampling, {edit.kind}"] = time.monotonic() - started
    return seconds
