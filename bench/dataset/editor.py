"""Makes edits in this process: tune a clip once, invert it once a method, sample each edit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from tune_a_video.tav_core import host, pipeline, schedule
from tune_a_video.tav_core.control.blend import composited
from tune_a_video.tav_core.control.settings import PRESETS
from tune_a_video.tav_core.control.trajectory import Trajectory
from tune_a_video.tav_core.inflate import Inflation
from tune_a_video.tav_core.motion import file as motions
from tune_a_video.tav_core.motion.low_rank import expand
from tune_a_video.tav_core.tiny_sd import model as tiny_sd
from tune_a_video.tav_core.tuning.checkpoint import Checkpoint
from tune_a_video.tav_core.tuning.trainer import Trainer, TuneSettings
from tune_a_video.tav_core.tuning.training_unet import training_unet

from . import results
from .jobs import CONTROLLED, FRAME_BY_FRAME, MOTION, NOISE, WITH_MOTION, Job, Settings


class Editor:
    """A loaded model. ``edit`` keeps the tuning and the inversion of a clip in the job's work folder."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        with torch.inference_mode():
            self.model, self.clip, self.vae = load_model(settings.checkpoint)
        self._clip, self._frames, self._latent = "", torch.empty(0), torch.empty(0)

    def edit(self, job: Job) -> None:
        """Make an edit and write its pictures to ``job.result``."""
        results.write_frames(job.result, self.edited(job))

    def edited(self, job: Job) -> results.Pixels:
        """Make an edit; return its frames [n, h, w, 3]."""
        settings = self.settings
        # As on a server, where nodes run in inference mode.
        with torch.inference_mode():
            source, empty = tiny_sd.encode(self.clip, job.source), tiny_sd.encode(self.clip, "")
            if job.clip != self._clip:
                self._frames = torch.from_numpy(results.read_frames(job.frames)).float() / 255
                self._clip, self._latent = job.clip, self.vae.encode(self._frames)
            model = self._ready(job, source)
            kept = self._inverted(job, model, source)
            prompt, run = tiny_sd.encode(self.clip, job.edit), None
            if job.method == CONTROLLED:
                _, prompt, _ = host.encode_edit(self.clip, job.source, job.edit)
                sigmas = schedule.inversion_sigmas(host.sigma_table(model), settings.ddim_steps)
                trajectory = Trajectory(self._latent, kept["trajectory"], sigmas, source)
                run = pipeline.controlled(model, PRESETS[job.preset], trajectory, kept["noise"], prompt)
            steps, guidance = settings.ddim_steps, settings.guidance
            latent = pipeline.sample(model, kept["noise"], prompt, empty, steps, guidance, control=run)
            frames = self.vae.decode(latent)
            return as_saved(frames if run is None else composited(self._frames, frames, run.mask))

    def _inverted(self, job: Job, model: Any, source: Any) -> dict[str, Tensor]:
        """Return the clip's noise, and for edit control its trajectory, from the work folder where they are there."""
        file, steps = job.work / NOISE.format(job.method), self.settings.ddim_steps
        if not file.exists():
            if job.method == CONTROLLED:
                noise, path = pipeline.invert_and_keep(model, self._latent, source, steps)
                kept = {"noise": noise.contiguous(), "trajectory": path.latents.contiguous()}
            else:
                kept = {"noise": pipeline.invert(model, self._latent, source, steps).contiguous()}
            results.write_whole(file, safetensors.torch.save(kept))
        found: dict[str, Tensor] = safetensors.torch.load(file.read_bytes())
        return found

    def _ready(self, job: Job, source: Any) -> Any:
        if job.method == FRAME_BY_FRAME:
            return self.model
        motion = None
        if job.method in WITH_MOTION:
            if not (job.work / MOTION).exists():
                self._tune(job.work, source)
            motion = expand(motions.load_motion(job.work / MOTION))
        return host.inflate_model(self.model, Inflation(), motion)

    def _tune(self, work: Path, source: Any) -> None:
        """Tune the clip, from the state of a run that was cut off if there is one, and keep the motion."""
        settings = self.settings
        tuning = TuneSettings(steps=settings.tune_steps, learning_rate=settings.learning_rate, seed=settings.seed)
        work.mkdir(parents=True, exist_ok=True)
        with training_unet(self.model, self._latent, source) as unet:
            trainer = Trainer(unet, tuning)
            with Checkpoint(work / "tuning", trainer) as run:
                for _ in trainer:
                    run.save_if_due()
            motion = trainer.motion()
        metadata = {
            "base_family": host.family(self.model),
            "prediction_type": host.prediction_type(self.model),
            "steps": str(tuning.steps),
            "seed": str(tuning.seed),
        }
        # Half precision, as One-Shot Tune hands it out; the file appears whole.
        motions.save_motion(motions.Motion(motion.tensors, metadata).to(torch.float16), work / MOTION)


def load_model(checkpoint: str) -> tuple[Any, Any, Any]:
    """Load MODEL, CLIP and VAE of a checkpoint file; "" is the demo's model."""
    if not checkpoint:
        return tiny_sd.load()
    import comfy.sd

    model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(checkpoint, output_vae=True, output_clip=True)
    return model, clip, vae


def as_saved(images: Tensor) -> results.Pixels:
    """Turn IMAGEs [n, h, w, 3] in 0..1 into pixels as the host's Save Image does: cut off, not rounded."""
    return np.clip(255.0 * images.cpu().numpy(), 0, 255).astype(np.uint8)


def free_memory() -> int:
    """Return the bytes that are free where edits are made."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available)
