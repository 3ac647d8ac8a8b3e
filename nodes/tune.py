"""InflateUNet and OneShotTune."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..tav_core import host
from ..tav_core.attention import SPATIAL_MODES
from ..tav_core.inflate import Inflation
from ..tav_core.media import pictures
from ..tav_core.motion.file import Motion
from ..tav_core.motion.low_rank import SEED_KEY
from ..tav_core.out_of_memory import is_out_of_memory
from ..tav_core.tuning.trainable import TRAIN_SCOPES
from ..tav_core.tuning.trainer import TuneSettings, one_shot_tune
from .support.graph import find_prompt_text as source_text
from .support.limits import check_limits
from .support.memory import memory_explained
from .support.paths import state_folder
from .support.preview import LatentFrames, MovingPreview, Picture
from .support.stop import stoppable
from .support.types import CATEGORY, MotionType, search_aliases

GROUP_NORM_MODES = ("over frames", "per frame")
PRECISIONS = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PIXELS_PER_LATENT = 8
REMEDY = "Use fewer frames or a smaller size. If the tuning had ended, it is not run again."
_PREVIEW_SECONDS, _PREVIEW_SIZE, _FRAMES_PER_SECOND = 2.0, 768, 4.0


class InflateUNet(io.ComfyNode):
    """MODEL of an image -> MODEL that sees its batch as the frames of a video."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="TAV_InflateUNet",
            display_name="Inflate UNet (Tune-A-Video)",
            category=CATEGORY,
            **search_aliases("apply motion", "sparse-causal attention", "temporal attention"),
            description="Makes a Stable Diffusion model see a batch of latents as the frames of one video. With a "
            "motion it samples like the tuned model. LoRAs may come before or after it.",
            inputs=[
                io.Model.Input("model", tooltip="A Stable Diffusion 1.x, 2.x or SDXL model."),
                io.Combo.Input(
                    "attention",
                    options=list(SPATIAL_MODES),
                    default="sparse-causal",
                    tooltip="Which frames a frame looks at. The method uses sparse-causal: the first and the "
                    "previous one. The others are for comparison.",
                ),
                io.Combo.Input(
                    "group_norm",
                    options=list(GROUP_NORM_MODES),
                    default="over frames",
                    tooltip="Statistics of the residual blocks' norms: pooled over all frames, as the released "
                    "code does, or per frame.",
                ),
                io.Float.Input(
                    "query_strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How strongly the motion's changes to the query projections apply. 1 = as tuned.",
                ),
                io.Float.Input(
                    "temporal_strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How much the motion's temporal layers add. 1 = as tuned, 0 = off.",
                ),
                MotionType.Input("motion", optional=True, tooltip="Tuned weights, from One-Shot Tune or Load Motion."),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The inflated model, for any sampler.")],
        )

    @classmethod
    @memory_explained("model", "Close what else takes memory and queue again.")
    def execute(
        cls,
        model: Any,
        attention: Any,
        group_norm: str,
        query_strength: float,
        temporal_strength: float,
        motion: Motion | None = None,
    ) -> io.NodeOutput:
        """Refuses models without a Stable Diffusion UNet and motions of another model (ValueError)."""
        check_limits(
            cls,
            attention=attention,
            group_norm=group_norm,
            query_strength=query_strength,
            temporal_strength=temporal_strength,
        )
        host.check_model(model)
        inflation = Inflation(attention, group_norm == "over frames", temporal_strength)
        return io.NodeOutput(host.inflate_model(model, inflation, motion, query_strength))


class _Progress:
    """The node's progress bar; below it the loss curve so far with the time that is left, and the clip as it is now."""

    def __init__(self, steps: int, preview: MovingPreview, model: Any) -> None:
        self.steps, self.preview, self.model = steps, preview, model
        self.begun: tuple[float, int] | None = None
        self.shown = 0.0
        self.clip: list[Picture] = []
        self.made: list[Picture] = []
        self.made_after = 0
        self.warned = False

    def warning(self, text: str) -> None:
        """What went wrong with keeping the run's state: the log has it, the picture says that there is something."""
        self.warned = True

    def step(self, step: int) -> None:
        """Raises when the user cancels."""
        if self.begun is None:
            # The first step of a run also sets up, and a resumed run does not begin with the first.
            self.begun = (time.monotonic(), step)
        self.preview.update(step + 1)

    def reconstruction(self, done: int, clip: Tensor, made: Tensor) -> None:
        """Keep the clip and what the weights make of it, for the next time that the curve is drawn."""
        frames = LatentFrames(self.model, anyway=True)
        self.clip = self.clip or frames.all(clip)
        self.made, self.made_after = frames.all(made), done
        self.shown = 0.0

    def losses(self, losses: list[float]) -> None:
        """Draw the curve, now and then."""
        now = time.monotonic()
        if self.begun is None or now - self.shown < _PREVIEW_SECONDS:
            return
        self.shown = now
        began, first = self.begun
        rate = max(len(losses) - 1 - first, 1) / max(now - began, 1e-3)
        left = round((self.steps - len(losses)) / rate)
        note = f"{rate:.2f} steps/s, {left // 60}:{left % 60:02} left"
        if self.warned:
            note += "; state cannot be kept, see the log"
        captions = ("clip", f"after step {self.made_after}")
        try:
            curve = pictures.loss_curve(losses, note)
            frames = [
                pictures.below(curve, [(caption, frame) for caption, (_, frame, _) in zip(captions, pair, strict=True)])
                for pair in zip(self.clip, self.made, strict=True)
            ]
            shown = frames or [pictures.below(curve, [])]
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            logging.warning("Tune-A-Video: no memory for a picture of the loss; tuning goes on")
            return
        self.preview.show(len(losses), [("JPEG", picture, _PREVIEW_SIZE) for picture in shown])


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
                    tooltip="Of AdamW. The method uses 3e-5.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Of the timesteps and the noise that are drawn, and of the new layers' weights.",
                ),
                io.Combo.Input(
                    "train_scope",
                    options=list(TRAIN_SCOPES),
                    default="all",
                    tooltip="Which blocks learn. all: as in the paper. middle and up: as the released code really "
                    "trains; faster, needs less memory.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="auto",
                    tooltip="What is computed in; the weights that learn are always float32. auto: as the model is "
                    "run by ComfyUI.",
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
                    tooltip="Weights to go on from. Without it: the motion that the model carries, else fresh ones.",
                ),
                io.Int.Input(
                    "preview_every",
                    default=50,
                    min=0,
                    max=100_000,
                    optional=True,
                    tooltip="Steps between two looks at the clip as it is reconstructed by then, shown below the loss "
                    "curve. Each takes as long as one or two steps; 0 = never.",
                ),
                io.Int.Input(
                    "patience",
                    default=0,
                    min=0,
                    max=100_000,
                    optional=True,
                    tooltip="End when the loss, smoothed over so many steps, has not fallen for so many steps; 100 to "
                    "200 if any. 0 = run all steps.",
                ),
                io.Float.Input(
                    "memory_budget",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.1,
                    optional=True,
                    tooltip="GiB that tuning may take beside the model's own weights. Less memory, more time: what "
                    "does not fit is computed twice. 0 = what the device has free.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The tuned model, ready to invert and sample."),
                MotionType.Output(display_name="motion", tooltip="What was learnt, for Save Motion or Inflate UNet."),
                io.Image.Output(
                    display_name="loss_curve", tooltip="Loss over steps; thin: each step, thick: its mean."
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    @memory_explained("latent", REMEDY)
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
    ) -> io.NodeOutput:
        """Refuses inputs that don't fit together before any work (ValueError)."""
        check_limits(
            cls,
            steps=steps,
            learning_rate=learning_rate,
            seed=seed,
            train_scope=train_scope,
            precision=precision,
            warmup_steps=warmup_steps,
            gradient_clip=gradient_clip,
            preview_every=preview_every,
            patience=patience,
            memory_budget=memory_budget,
        )
        host.check_model(model)
        samples = host.check_latent(model, latent)
        if len(conditioning) != 1:
            raise ValueError(
                f"conditioning: it holds {len(conditioning)} prompts, and a clip is tuned on exactly one. "
                "Connect one CLIP Text Encode node directly, without Conditioning (Combine)."
            )
        host.check_conditioning(model, "conditioning", conditioning, len(samples))
        inflated = host.inflation_of(model)
        inflation = inflated.inflation if inflated else Inflation()
        settings = TuneSettings(
            steps=steps,
            learning_rate=learning_rate,
            seed=seed,
            train_scope=train_scope,
            warmup_steps=warmup_steps,
            gradient_clip=gradient_clip,
        )
        folder = state_folder()
        started = motion or host.carried_motion(model)
        with MovingPreview(steps, _FRAMES_PER_SECOND) as preview, stoppable(str(cls.hidden.unique_id)) as stop:
            progress = _Progress(steps, preview, model)
            if folder is None:
                logging.warning(
                    "Tune-A-Video: .tune-a-video leads out of the output folder; no state of this run is kept"
                )
                progress.warned = True
            learnt, losses = one_shot_tune(
                host.deflated(model),
                samples,
                conditioning,
                settings,
                Inflation(inflation.attention, inflation.pool_group_norm),
                started,
                PRECISIONS[precision],
                budget=memory_budget * 2**30 or None,
                on_step=progress.step,
                on_losses=progress.losses,
                checkpoints=folder,
                on_warning=progress.warning,
                on_preview=progress.reconstruction,
                preview_every=preview_every,
                patience=patience,
                stop=stop.is_set,
            )
            if progress.begun is None or len(losses) < steps:  # the run was on disk already, or ended early
                preview.update(steps)
        height, width = samples.shape[-2:]
        metadata = {
            "base_family": host.family(model),
            "prediction_type": host.prediction_type(model),
            "prompt": source_text(cls.hidden.prompt, cls.hidden.unique_id, "conditioning"),
            "frame_count": str(len(samples)),
            "width": str(width * PIXELS_PER_LATENT),
            "height": str(height * PIXELS_PER_LATENT),
            "steps": str(len(losses)),
            "seed": str(seed),
            SEED_KEY: (started.metadata.get(SEED_KEY, "") if started else "") or str(seed),
            "options": json.dumps(
                {
                    "learning_rate": learning_rate,
                    "train_scope": train_scope,
                    "precision": precision,
                    "warmup_steps": warmup_steps,
                    "gradient_clip": gradient_clip,
                    "attention": inflation.attention,
                    "group_norm": GROUP_NORM_MODES[0 if inflation.pool_group_norm else 1],
                }
            ),
        }
        # Half precision from here on, in memory as on disk: what is seen now is what a saved file will give.
        tuned = Motion(learnt.tensors, metadata).to(torch.float16)
        if not all(value.isfinite().all() for value in tuned.tensors.values()):
            raise RuntimeError(
                "learning_rate: the tuned weights are too large for half precision. Lower it and tune anew."
            )
        out = host.inflate_model(model, Inflation(inflation.attention, inflation.pool_group_norm), tuned)
        return io.NodeOutput(out, tuned, pictures.loss_curve(losses))
