"""DDIMInvert and TAVSample."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..tav_core import host, schedule
from ..tav_core.invert import ddim_invert
from ..tav_core.sample import ddim_sample
from .support.limits import check_limits
from .support.memory import memory_explained
from .support.preview import MovingPreview, sampling_callback
from .support.types import CATEGORY, search_aliases

LAST_STEPS = ("clip noise level", "zero")
# Kept in the LATENT beside the inverted samples, so that a masked edit can keep the clip outside its mask.
CLIP_KEY = "tav_clip"
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
    def execute(cls, model: Any, latent: dict[str, Any], conditioning: Any, steps: int) -> io.NodeOutput:
        """Refuses inputs that don't fit together before any work (ValueError)."""
        check_limits(cls, steps=steps)
        host.check_model(model)
        samples = host.check_latent(model, latent)
        host.check_conditioning(model, "conditioning", conditioning, len(samples))
        sigmas = schedule.inversion_sigmas(host.sigma_table(model), steps)
        with MovingPreview(steps) as preview:
            inverted = host.run_sampler(
                model,
                ddim_invert,
                sigmas,
                conditioning,
                conditioning,
                1.0,
                samples,
                callback=sampling_callback(model, preview),
            )
        return io.NodeOutput({**latent, "samples": host.check_prediction(inverted), CLIP_KEY: samples})


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
                io.Conditioning.Input("positive", tooltip="What the new video should show."),
                io.Conditioning.Input("negative", tooltip="What it should not show; the method uses an empty prompt."),
                io.Latent.Input("latent", tooltip="The inverted clip, from DDIM Invert."),
                io.Int.Input("steps", default=50, min=1, max=1000, tooltip="Sampling steps, as many as were inverted."),
                io.Float.Input(
                    "guidance",
                    default=12.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Classifier-free guidance scale. 1 gives the clip back; 7.5 to 12.5 edit.",
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
                    tooltip="Of the fresh noise; without effect at eta 0.",
                ),
                io.Combo.Input(
                    "last_step",
                    options=list(LAST_STEPS),
                    default=LAST_STEPS[0],
                    tooltip="Where sampling ends. clip noise level: where the inversion began, as the released code. "
                    "zero: as KSampler with the ddim_uniform scheduler.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The edited clip, for VAE Decode.")],
        )

    @classmethod
    @memory_explained("latent", REMEDY)
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
    ) -> io.NodeOutput:
        """Refuses inputs that don't fit together before any work (ValueError)."""
        check_limits(cls, steps=steps, guidance=guidance, eta=eta, seed=seed, last_step=last_step)
        host.check_model(model)
        samples = host.check_latent(model, latent)
        for name, conditioning in (("positive", positive), ("negative", negative)):
            host.check_conditioning(model, name, conditioning, len(samples))
        sigmas = schedule.sampling_sigmas(host.sigma_table(model), steps, last_step)
        start, noise, mask = samples, None, latent.get("noise_mask")
        if mask is not None:
            start, noise = _clip_and_noise(model, latent, float(sigmas[0]))
        with MovingPreview(steps) as preview:
            edited = host.run_sampler(
                model,
                ddim_sample,
                sigmas,
                positive,
                negative,
                guidance,
                start,
                noise=noise,
                noise_mask=mask,
                seed=seed,
                callback=sampling_callback(model, preview),
                eta=eta,
                noise_seed=seed,
            )
        edited = host.check_prediction(edited)
        if mask is not None:
            # The last level, alpha_bar[0], is not quite clean: outside the mask the clip shall be exact.
            edited = host.paste_masked(edited, start, mask)
        out = {key: value for key, value in latent.items() if key not in (CLIP_KEY, "noise_mask")}
        return io.NodeOutput({**out, "samples": edited})


def _clip_and_noise(model: Any, latent: dict[str, Any], sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Split an inverted latent into the clip and the noise that was added to it at ``sigma``.

    The host keeps the unmasked part of a clean latent plus noise; so a masked edit starts from these two.
    """
    clip = latent.get(CLIP_KEY)
    if clip is None or clip.shape != latent["samples"].shape:
        raise ValueError(
            "latent: it has a noise mask, but not the clip that was inverted. Set the mask "
            "(Set Latent Noise Mask) on the output of DDIM Invert, or before it on the clip."
        )
    return clip, host.model_scale(model) * (latent["samples"] - clip) / sigma
