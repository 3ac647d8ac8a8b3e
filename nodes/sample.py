"""TAV Sample: a new video from an inverted clip."""

from __future__ import annotations

from functools import partial
from typing import Any

from comfy_api.latest import io

from ..tav_core import host
from ..tav_core.control.blend import frame_masks
from ..tav_core.control.settings import Control
from ..tav_core.pipeline import controlled, sample
from .invert import REMEDY
from .support.limits import within_limits
from .support.memory import memory_explained
from .support.preview import MovingPreview, sampling_callback
from .support.types import CATEGORY, CLIP_KEY, MADE_WITH_KEY, TRAJECTORY_KEY, ControlType, search_aliases
from .support.wiring import check_inverted

LAST_STEPS = ("clip noise level", "zero")


class TAVSample(io.ComfyNode):
    """Inverted LATENT and new prompts -> LATENT of the edited clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="TAV_Sample",
            display_name="TAV Sample (Tune-A-Video)",
            category=CATEGORY,
            **search_aliases("video edit", "edit video by prompt", "video to video", "ddim"),
            description="Samples a new video from an inverted clip by DDIM: same motion, new words. With a noise "
            "mask on the latent only the masked part changes.",
            inputs=[
                io.Model.Input("model", tooltip="The tuned model, from One-Shot Tune or Inflate UNet."),
                io.Conditioning.Input("positive", tooltip="The prompt of the new video."),
                io.Conditioning.Input("negative", tooltip="Things to avoid; the method uses an empty prompt."),
                io.Latent.Input("latent", tooltip="The inverted clip, from DDIM Invert."),
                io.Int.Input("steps", default=50, min=1, max=1000, tooltip="Sampling steps, as many as were inverted."),
                io.Float.Input(
                    "guidance",
                    default=12.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Classifier-free guidance scale: 7.5 to 12.5 for edits, 1 for none.",
                ),
                io.Float.Input(
                    "eta",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Fresh noise per step: 0 = none (DDIM), 1 = as much as DDPM.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Seed of the fresh noise, from eta and from Edit Control; no effect without either.",
                ),
                io.Combo.Input(
                    "last_step",
                    options=list(LAST_STEPS),
                    default=LAST_STEPS[0],
                    tooltip="Where sampling ends. clip noise level: where the inversion began, as the released code. "
                    "zero: as KSampler with the ddim_uniform scheduler.",
                ),
                ControlType.Input(
                    "control",
                    optional=True,
                    tooltip="From Edit Control: what the edit keeps of the clip. Without it, the sentence decides.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The edited clip, for VAE Decode."),
                io.Mask.Output(
                    display_name="mask",
                    tooltip="Where the clip may have changed, a frame each, of the latent's size: given or found. "
                    "Without any it is 1 everywhere.",
                ),
            ],
        )

    @classmethod
    @memory_explained("latent", REMEDY)
    @within_limits
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        latent: dict[str, Any],
        steps: int,
        guidance: float,
        eta: float,
        seed: int,
        last_step: str = LAST_STEPS[0],
        control: Control | None = None,
    ) -> io.NodeOutput:
        """Refuses inputs that don't fit together before any work (ValueError)."""
        host.check_model(model)
        samples = host.check_latent(model, latent)
        for name, conditioning in (("positive", positive), ("negative", negative)):
            host.check_conditioning(model, name, conditioning, len(samples))
        check_inverted(model, latent, steps)
        noise_mask, run = latent.get("noise_mask"), None
        if control is not None and control.acts:
            run = controlled(model, control, latent.get(TRAJECTORY_KEY), samples, positive, noise_mask)
        with MovingPreview(steps) as preview:
            edited = sample(
                model,
                samples,
                positive,
                negative,
                steps,
                guidance,
                clip=latent.get(CLIP_KEY),
                noise_mask=noise_mask,
                callback=sampling_callback(model, preview, None if run is None else partial(run.cost, steps)),
                control=run,
                eta=eta,
                seed=seed,
                last_step=last_step,
            )
        inputs = (CLIP_KEY, MADE_WITH_KEY, TRAJECTORY_KEY, "noise_mask")
        out = {key: value for key, value in latent.items() if key not in inputs}
        mask = noise_mask if run is None else run.mask
        return io.NodeOutput({**out, "samples": edited}, frame_masks(mask, samples))


NODES = [TAVSample]
