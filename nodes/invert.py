"""DDIM Invert: from a clip to the noise that the model maps back to it."""

from __future__ import annotations

import logging
from typing import Any

import torch
from comfy_api.latest import io

from ..tav_core import host
from ..tav_core.pipeline import invert, invert_and_keep
from .support.limits import within_limits
from .support.memory import memory_explained
from .support.preview import MovingPreview, sampling_callback
from .support.types import CATEGORY, CLIP_KEY, MADE_WITH_KEY, TRAJECTORY_KEY, search_aliases
from .support.wiring import made_with

REMEDY = "Use fewer frames or a smaller size, or look at the frames in parts, with Context Windows (Manual)."
TRAJECTORIES = {"fp32": torch.float32, "fp16": torch.float16, "none": None}


class DDIMInvert(io.ComfyNode):
    """The clip's LATENT -> the noise that the model maps back to it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="TAV_DDIMInvert",
            display_name="DDIM Invert (Tune-A-Video)",
            category=CATEGORY,
            **search_aliases("ddim inversion", "invert video", "unsampler"),
            description="Walks a clip back to noise with the tuned model. Sampling from that noise keeps the clip's "
            "motion. Works with TAV Sample, KSampler (Advanced) with add_noise disabled, and SamplerCustomAdvanced "
            "with DisableNoise.",
            inputs=[
                io.Model.Input("model", tooltip="The tuned model, from One-Shot Tune or Inflate UNet."),
                io.Latent.Input("latent", tooltip="The clip, frame by frame, from VAE Encode."),
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="The prompt to invert with: the clip's own sentence, or an empty prompt as the released "
                    "script does.",
                ),
                io.Int.Input(
                    "steps", default=50, min=1, max=1000, tooltip="Inversion steps; use the same number to sample."
                ),
                io.Combo.Input(
                    "trajectory",
                    options=list(TRAJECTORIES),
                    default="fp32",
                    optional=True,
                    tooltip="Keeps the latent of every step in RAM, which Edit Control needs. fp32: 79 MB for 24 "
                    "frames of 512x512 and 50 steps. fp16: half of that. none: Edit Control cannot be used.",
                ),
                io.Boolean.Input(
                    "refine",
                    default=False,
                    optional=True,
                    tooltip="Evaluates every step twice, so that sampling follows the clip more exactly. Takes twice "
                    "the time.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latent", tooltip="The inverted clip: fully noised, scaled as samplers expect it."
                )
            ],
        )

    @classmethod
    @memory_explained("latent", REMEDY)
    @within_limits
    def execute(
        cls,
        model: Any,
        latent: dict[str, Any],
        conditioning: Any,
        steps: int,
        trajectory: str = "fp32",
        refine: bool = False,
    ) -> io.NodeOutput:
        """Refuses inputs that don't fit together before any work (ValueError)."""
        host.check_model(model)
        samples = host.check_latent(model, latent)
        host.check_conditioning(model, "conditioning", conditioning, len(samples))
        made: dict[str, Any] = {CLIP_KEY: samples, MADE_WITH_KEY: made_with(model, steps)}
        dtype = TRAJECTORIES[trajectory]
        with MovingPreview(steps) as preview:
            arguments = model, samples, conditioning, steps, sampling_callback(model, preview)
            if dtype is None:
                inverted = invert(*arguments, refine=refine)
            else:
                inverted, path = invert_and_keep(*arguments, refine=refine, dtype=dtype)
                made[TRAJECTORY_KEY] = path
                logging.info("Tune-A-Video: the trajectory takes %.1f MB of RAM", path.megabytes)
        kept = {key: value for key, value in latent.items() if key != TRAJECTORY_KEY}
        return io.NodeOutput({**kept, "samples": inverted, **made})


NODES = [DDIMInvert]
