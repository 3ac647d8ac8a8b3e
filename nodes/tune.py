"""One-Shot Tune: a model and one clip in, a tuned model and its motion out."""

from __future__ import annotations

import json
import logging
import time
from contextlib import closing
from typing import Any

import torch
from comfy_api.latest import io

from ..tav_core import host
from ..tav_core.cancel import cancellable
from ..tav_core.inflate import Inflation
from ..tav_core.media import pictures
from ..tav_core.motion.file import Motion
from ..tav_core.motion.low_rank import SEED_KEY, expand, for_rank
from ..tav_core.out_of_memory import is_out_of_memory
from ..tav_core.tuning.checkpoint import Checkpoint
from ..tav_core.tuning.frame_window import window_length
from ..tav_core.tuning.trainable import TRAIN_SCOPES
from ..tav_core.tuning.trainer import RECIPES, Trainer, TuneSettings, by_recipe
from ..tav_core.tuning.training_unet import training_unet
from .inflate import GROUP_NORM_MODES
from .support.graph import find_prompt_text
from .support.limits import within_limits
from .support.memory import memory_explained
from .support.paths import state_folder
from .support.preview import LatentFrames, MovingPreview, Picture
from .support.said import say
from .support.stop import stoppable
from .support.types import CATEGORY, MotionType, search_aliases

PRECISIONS = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PIXELS_PER_LATENT = 8
REMEDY = "Use fewer frames or a smaller size, or set frames_per_step. If the tuning had ended, it is not run again."
_PREVIEW_SECONDS, _PREVIEW_SIZE, _FRAMES_PER_SECOND = 2.0, 768, 4.0
# Fewer steps than these say little of the time left.
_TIMED_STEPS = 2


class _Curve:
    """The picture in the node: the loss curve so far, the time left, and the clip as the weights now make it."""

    def __init__(self, trainer: Trainer, preview: MovingPreview) -> None:
        self._trainer, self._preview = trainer, preview
        self._began, self._first = time.monotonic(), trainer.done
        self._shown = 0.0
        self._clip: list[Picture] = []
        self._made: list[Picture] = []
        self._made_after = 0
        self.reported = 0
        self.warned = False

    def begin(self, note: str | None) -> None:
        """Show the number of steps left and their planned memory, if any are left, below a note on the clip."""
        trainer = self._trainer
        left = trainer.settings.steps - trainer.done
        lines = [note] if note else []
        if left > 0:
            planned = trainer.planned_bytes / 2**30
            lines.append(f"{left} steps, {planned:.1f} GiB planned beside the model's weights")
        if lines:
            say("\n".join(lines))

    def warn(self, text: str) -> None:
        """Note under the curve that the run's state cannot be kept; the log has the reason."""
        self.warned = True

    def reconstruct(self) -> None:
        """Make the clip with the weights as they are, for the next time that the curve is drawn."""
        made = self._trainer.reconstruct()
        if made is None:
            return
        frames = LatentFrames(self._trainer.unet.model, anyway=True)
        try:
            with torch.no_grad():  # TAESD's parameters require gradients
                self._clip = self._clip or frames.all(self._trainer.unet.latents[: len(made)])
                self._made, self._made_after = frames.all(made), self._trainer.done
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            host.release_cached_memory()
            logging.warning("Tune-A-Video: no memory to show a preview; tuning continues")
        self._shown = 0.0

    def update(self) -> None:
        """Move the progress bar, and draw the curve now and then. Raises when the user cancels."""
        done, now = self._trainer.done, time.monotonic()
        self._preview.update(done)
        self.reported = done
        if done == self._first + 1:
            self._began = now  # the first step also sets up
        losses = self._trainer.losses_so_far()
        if losses is None or now - self._shown < _PREVIEW_SECONDS:
            return
        self._shown = now
        try:
            shown = self._pictures(losses, now)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            logging.warning("Tune-A-Video: no memory for a picture of the loss; tuning continues")
            return
        self._preview.show(len(losses), shown)

    def _pictures(self, losses: list[float], now: float) -> list[Picture]:
        notes = []
        timed = len(losses) - 1 - self._first
        if timed >= _TIMED_STEPS:
            rate = timed / max(now - self._began, 1e-3)
            left = round((self._trainer.settings.steps - len(losses)) / rate)
            notes.append(f"{rate:.2f} steps/s, {left // 60}:{left % 60:02} left")
        if self.warned:
            notes.append("state cannot be kept, see the log")
        note = "; ".join(notes)
        captions = ("clip", f"after step {self._made_after}")
        curve = pictures.loss_curve(losses, note)
        frames = [
            pictures.curve_with_frames(
                curve, [(caption, frame) for caption, (_, frame, _) in zip(captions, pair, strict=True)]
            )
            for pair in zip(self._clip, self._made, strict=True)
        ]
        return [("JPEG", picture, _PREVIEW_SIZE) for picture in frames or [pictures.curve_with_frames(curve, [])]]


class OneShotTune(io.ComfyNode):
    """MODEL, the clip's LATENT and its prompt -> tuned MODEL and MOTION."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="TAV_OneShotTune",
            display_name="One-Shot Tune (Tune-A-Video)",
            category=CATEGORY,
            **search_aliases("video edit", "train on video", "fine-tune", "one-shot video tuning"),
            description="Tunes a Stable Diffusion model on one clip: only query projections and temporal layers "
            "learn. The model that comes out inverts and samples videos; the checkpoint stays as it was.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model to tune, plain or from Inflate UNet. LoRAs on it are part of what is tuned on.",
                ),
                io.Latent.Input("latent", tooltip="The clip, frame by frame, from VAE Encode."),
                io.Conditioning.Input(
                    "conditioning", tooltip="One sentence that describes the clip, from CLIP Text Encode."
                ),
                io.Int.Input(
                    "steps", default=500, min=1, max=100_000, tooltip="Optimiser steps. 300 to 500 suit most clips."
                ),
                io.Float.Input(
                    "learning_rate",
                    default=3e-5,
                    min=1e-8,
                    max=1.0,
                    step=1e-6,
                    round=False,
                    tooltip="AdamW's learning rate. The paper uses 3e-5.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Seed of the drawn timesteps and noise, and of the new layers' weights.",
                ),
                io.Combo.Input(
                    "train_scope",
                    options=list(TRAIN_SCOPES),
                    default="all",
                    tooltip="Which blocks learn. all: as in the paper. middle and up: as the released code trains in "
                    "effect; faster, needs less memory.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="auto",
                    tooltip="Compute precision; the weights that learn are always float32. auto: as ComfyUI runs "
                    "the model.",
                ),
                io.Int.Input(
                    "warmup_steps",
                    default=0,
                    min=0,
                    max=100_000,
                    tooltip="Steps over which the learning rate rises to its value.",
                ),
                io.Float.Input(
                    "gradient_clip",
                    default=1.0,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    tooltip="Largest norm of the gradient; 0 = no limit.",
                ),
                MotionType.Input(
                    "motion",
                    optional=True,
                    tooltip="Weights to start from. Without it: the motion that the model carries, else fresh ones.",
                ),
                io.Int.Input(
                    "preview_every",
                    default=50,
                    min=0,
                    max=100_000,
                    optional=True,
                    tooltip="Steps between two reconstructions of the clip, shown below the loss curve. Each takes as "
                    "long as one or two steps; 0 = never.",
                ),
                io.Int.Input(
                    "patience",
                    default=0,
                    min=0,
                    max=100_000,
                    optional=True,
                    tooltip="Stop after this many steps without improvement of the loss, smoothed over as many. 100 to "
                    "200 is a good value. 0 = run all steps.",
                ),
                io.Float.Input(
                    "memory_budget",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.1,
                    optional=True,
                    tooltip="GiB that tuning may take beside the model's own weights. With less memory it takes more "
                    "time, because blocks are computed twice. 0 = all that the device has free.",
                ),
                io.Int.Input(
                    "frames_per_step",
                    default=0,
                    min=0,
                    max=100_000,
                    optional=True,
                    tooltip="Frames that a step sees: the clip's first one, and consecutive ones that each step "
                    "draws again. Memory and a step's time then do not grow with the clip. For long clips, 16 to 24. "
                    "0 = all frames.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=128,
                    optional=True,
                    tooltip="0 learns whole matrices, as in the paper. 4 to 128 learns their changes as products of "
                    "that rank: less memory and a small motion, for SDXL 32 in place of 0.",
                ),
                io.Combo.Input(
                    "recipe",
                    options=list(RECIPES),
                    default="released",
                    optional=True,
                    tooltip="released: steps, learning_rate and warmup_steps as they are set. fast: a fifth of the "
                    "steps at three times the rate, after at least 10 steps of warm-up; 500 become 100.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The tuned model, ready to invert and sample."),
                MotionType.Output(
                    display_name="motion", tooltip="The learnt weights, for Save Motion or Inflate UNet."
                ),
                io.Image.Output(
                    display_name="loss_curve", tooltip="Loss over steps; thin: each step, thick: its mean."
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    @cancellable(host.raise_if_cancelled)
    @memory_explained("latent", REMEDY)
    @within_limits
    def execute(
        cls,
        model: Any,
        latent: dict[str, Any],
        conditioning: Any,
        steps: int,
        learning_rate: float,
        seed: int,
        train_scope: Any,
        precision: str,
        warmup_steps: int,
        gradient_clip: float,
        motion: Motion | None = None,
        preview_every: int = 50,
        patience: int = 0,
        memory_budget: float = 0.0,
        frames_per_step: int = 0,
        rank: int = 0,
        recipe: str = "released",
    ) -> io.NodeOutput:
        """Refuses inputs that don't fit together before any work (ValueError)."""
        host.check_model(model)
        samples = host.check_latent(model, latent)
        host.check_conditioning(model, "conditioning", conditioning, len(samples))
        host.check_single_prompt(conditioning)
        start = motion or host.carried_motion(model, whole=not rank)
        host.check_motion(model, start)
        start = start and for_rank(start, rank)
        carried = host.inflation_of(model)
        inflation = (
            Inflation(carried.inflation.attention, carried.inflation.pool_group_norm) if carried else Inflation()
        )
        settings = by_recipe(
            TuneSettings(
                steps,
                learning_rate,
                seed,
                train_scope,
                warmup_steps,
                gradient_clip,
                frames_per_step=frames_per_step,
                rank=rank,
            ),
            recipe,
        )
        window = window_length(len(samples), frames_per_step)
        with (
            MovingPreview(settings.steps, _FRAMES_PER_SECOND) as preview,
            stoppable(str(cls.hidden.unique_id)) as stop,
            training_unet(
                host.without_inflation(model), samples, conditioning, PRECISIONS[precision], frames_per_step
            ) as unet,
            closing(Trainer(unet, settings, inflation, start, memory_budget * 2**30 or None, patience)) as trainer,
        ):
            curve = _Curve(trainer, preview)
            with Checkpoint(state_folder(curve.warn), trainer, curve.warn) as run:
                curve.begin(host.small_clip(model, samples))
                for _ in trainer:
                    if preview_every and trainer.done % preview_every == 0:
                        curve.reconstruct()
                    run.save_if_due()
                    curve.update()
                    if stop.is_set():
                        break
            if curve.reported < settings.steps:  # it was on disk already, or ended early
                preview.update(settings.steps)
            learnt, losses = trainer.motion(), trainer.losses
        metadata = _metadata(cls, model, samples, settings, precision, inflation, len(losses), window)
        metadata |= learnt.metadata
        if trainer.temporal_seed is not None:
            metadata[SEED_KEY] = str(trainer.temporal_seed)
        tuned = Motion(learnt.tensors, metadata)
        # Half precision from here on, in memory as on disk: a saved file gives the very same model.
        tuned = tuned.to(torch.float16)
        if not all(value.isfinite().all() for value in expand(tuned).tensors.values()):
            raise RuntimeError(
                "learning_rate: the tuned weights are too large for half precision. Lower it and tune again."
            )
        return io.NodeOutput(host.inflate_model(model, inflation, tuned), tuned, pictures.loss_curve(losses))


def _metadata(
    node: Any,
    model: Any,
    samples: torch.Tensor,
    settings: TuneSettings,
    precision: str,
    inflation: Inflation,
    steps: int,
    window: int | None,
) -> dict[str, str]:
    """Describe how a motion came about, for its file. ``window``: the frames that a step saw, None for all."""
    height, width = samples.shape[-2:]
    options: dict[str, Any] = {
        "learning_rate": settings.learning_rate,
        "train_scope": settings.train_scope,
        "precision": precision,
        "warmup_steps": settings.warmup_steps,
        "gradient_clip": settings.gradient_clip,
        "attention": inflation.attention,
        "group_norm": GROUP_NORM_MODES[0 if inflation.pool_group_norm else 1],
    }
    if window is not None:
        options["frames_per_step"] = window
    return {
        "base_family": host.family(model),
        "prediction_type": host.prediction_type(model),
        "prompt": find_prompt_text(node.hidden.prompt, node.hidden.unique_id, "conditioning"),
        "frame_count": str(len(samples)),
        "width": str(width * PIXELS_PER_LATENT),
        "height": str(height * PIXELS_PER_LATENT),
        "steps": str(steps),
        "seed": str(settings.seed),
        "options": json.dumps(options),
    }


NODES = [OneShotTune]
