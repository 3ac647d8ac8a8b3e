"""InflateUNet and OneShotTune."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from PIL import Image

from ..tav_core import host, pictures
from ..tav_core.attention import SPATIAL_MODES
from ..tav_core.inflate import Inflation
from ..tav_core.low_rank import SEED_KEY
from ..tav_core.trainable import TRAIN_SCOPES
from ..tav_core.tune import TuneSettings, one_shot_tune
from ..tav_core.weights import Motion
from .limits import check_limits
from .prompt import source_text
from .types import CATEGORY, MotionType, search_aliases

GROUP_NORM_MODES = ("over frames", "per frame")
PRECISIONS = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PIXELS_PER_LATENT = 8
_PREVIEW_SECONDS, _PREVIEW_SIZE = 2.0, 768
# Below the output folder: the host empties its temp folder when it starts.
UNFINISHED = ".tune-a-video"


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
    """The node's progress bar, and below it the loss curve so far with the time that is left."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.bar = comfy.utils.ProgressBar(steps)
        self.begun: tuple[float, int] | None = None
        self.shown = 0.0

    def step(self, step: int) -> None:
        """Raises when the user cancels."""
        if self.begun is None:
            # The first step of a run also sets up, and a resumed run does not begin with the first.
            self.begun = (time.monotonic(), step)
        self.bar.update_absolute(step + 1, self.steps)

    def losses(self, losses: list[float]) -> None:
        """Draw the curve, now and then."""
        now = time.monotonic()
        if self.begun is None or now - self.shown < _PREVIEW_SECONDS:
            return
        self.shown = now
        began, first = self.begun
        rate = max(len(losses) - 1 - first, 1) / max(now - began, 1e-3)
        left = round((self.steps - len(losses)) / rate)
        curve = pictures.loss_curve(losses, f"{rate:.2f} steps/s, {left // 60}:{left % 60:02} left")
        picture = Image.fromarray((curve[0] * 255).round().byte().numpy())
        self.bar.update_absolute(len(losses), self.steps, ("JPEG", picture, _PREVIEW_SIZE))


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
        progress = _Progress(steps)
        started = motion or host.carried_motion(model)
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
            checkpoints=Path(folder_paths.get_output_directory(), UNFINISHED),
        )
        if progress.begun is None:  # the run was on disk already
            progress.bar.update_absolute(steps, steps)
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
        out = host.inflate_model(model, Inflation(inflation.attention, inflation.pool_group_norm), tuned)
        return io.NodeOutput(out, tuned, pictures.loss_curve(losses))
