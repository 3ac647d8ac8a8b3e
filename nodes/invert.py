"""DDIM Invert: from a clip to the noise that the model maps back to it."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..tav_core import host
from ..tav_core.pipeline import invert
from .support.limits import within_limits
from .support.memory import memory_explained
from .support.preview import MovingPreview, sampling_callback
from .support.types import CATEGORY, CLIP_KEY, MADE_WITH_KEY, search_aliases
from .support.wiring import made_with

REMEDY = "Use fewer frames or a smaller size, or look at the frames in parts, with Context Windows (Manual)."


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
    def execute(cls, model: Any, latent: dict[str, Any], conditioning: Any, steps: int) -> io.NodeOutput:
        """Refuses inputs that don't fit together before any work (ValueError)."""
        host.check_model(model)
        samples = host.check_latent(model, latent)
        host.check_conditioning(model, "conditioning", conditioning, len(samples))
        with MovingPreview(steps) as preview:
            inverted = invert(model, samples, conditioning, steps, sampling_callback(model, preview))
        made = {CLIP_KEY: samples, MADE_WITH_KEY: made_with(model, steps)}
        return io.NodeOutput({**latent, "samples": inverted, **made})


NODES = [DDIMInvert]
