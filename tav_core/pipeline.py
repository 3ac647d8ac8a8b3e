"""The whole job in three calls: tune, invert, sample.

    motion, losses = tune(model, latents, source)
    tuned = host.inflate_model(model, Inflation(), motion)
    noise = invert(tuned, latents, source)
    edited = sample(tuned, noise, positive, negative)

``model`` is a ComfyUI MODEL; latents are [frames, c, h, w] in the host's LATENT scale; conditionings are ComfyUI's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import host, schedule
from .control.noise import added_noise
from .control.run import ControlledRun, check_trajectory, check_words
from .control.settings import Control
from .control.trajectory import Recorder, Trajectory
from .control.words import words_in
from .errors import Refusal
from .inflate import Inflation
from .invert import ddim_invert
from .motion.file import Motion
from .motion.low_rank import for_rank
from .sample import ddim_sample
from .tuning.trainer import PAPER, Trainer, TuneSettings
from .tuning.training_unet import training_unet


def tune(
    model: host.ModelPatcher,
    latents: Tensor,
    conditioning: host.Conditioning,
    settings: TuneSettings | None = None,
    inflation: Inflation = PAPER,
    start: Motion | None = None,
    precision: torch.dtype | None = None,
) -> tuple[Motion, list[float]]:
    """Tune a MODEL on one clip (paper, section 4.2); return the motion, float32, and the loss of every step.

    An inflation that the model carries is replaced by ``inflation``. ``start``: a motion to go on from, of the
    settings' rank. At a rank above 0 the result is one of low rank, which everything that takes a motion expands.
    ``precision``: compute dtype, None for the model's own. For progress, checkpoints or an early end iterate
    ``tuning.trainer.Trainer``. Raises ValueError for inputs that don't fit together, RuntimeError when no step went
    well, OutOfMemoryError when no plan fits into memory.
    """
    settings = settings or TuneSettings()
    host.check_motion(model, start)
    start = start and for_rank(start, settings.rank)
    plain, frames_per_step = host.without_inflation(model), settings.frames_per_step
    with training_unet(plain, latents, conditioning, precision, frames_per_step) as unet:
        trainer = Trainer(unet, settings, inflation, start)
        for _ in trainer:
            pass
        return trainer.motion(), trainer.losses


def invert(
    model: host.ModelPatcher,
    latent: Tensor,
    conditioning: host.Conditioning,
    steps: int = 50,
    callback: host.StepCallback | None = None,
    *,
    refine: bool = False,
    recorder: Recorder | None = None,
) -> Tensor:
    """Return the noise that the inflated MODEL maps back to the clip, by ``steps`` steps of DDIM inversion.

    The result is scaled as samplers expect a fully noised latent. ``refine``: one fixed-point pass a step.
    ``recorder``: keeps the latent of every step. Raises RuntimeError where the result is not finite.
    """
    inverted = host.run_sampler(
        model,
        ddim_invert,
        schedule.inversion_sigmas(host.sigma_table(model), steps),
        (conditioning, conditioning),
        1.0,
        latent,
        callback=callback,
        refine=refine,
        keep=recorder,
    )
    return host.check_prediction(model, inverted)


def invert_and_keep(
    model: host.ModelPatcher,
    latent: Tensor,
    conditioning: host.Conditioning,
    steps: int = 50,
    callback: host.StepCallback | None = None,
    *,
    refine: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Trajectory]:
    """Return the inverted latent as ``invert`` does, and the trajectory that a controlled ``sample`` needs.

    ``dtype``: what the trajectory is stored in, in CPU memory; 24 frames of 512 x 512 and 50 steps take 79 MB in
    float32.
    """
    recorder = Recorder(steps, latent, host.model_scale(model), dtype)
    inverted = invert(model, latent, conditioning, steps, callback, refine=refine, recorder=recorder)
    sigmas = schedule.inversion_sigmas(host.sigma_table(model), steps)
    return inverted, Trajectory(latent, recorder.latents, sigmas, conditioning)


def sample(
    model: host.ModelPatcher,
    latent: Tensor,
    positive: host.Conditioning,
    negative: host.Conditioning,
    steps: int = 50,
    guidance: float = 12.5,
    *,
    clip: Tensor | None = None,
    noise_mask: Tensor | None = None,
    callback: host.StepCallback | None = None,
    control: ControlledRun | None = None,
    **options: Any,
) -> Tensor:
    """Sample the edited clip from the inverted ``latent`` by DDIM with classifier-free guidance.

    ``noise_mask``: a LATENT's mask; only where it is 1 the clip changes. It needs ``clip``, the latent that was
    inverted. ``control``: of ``controlled``; one whose levers are all off is plain sampling. ``options``: ``eta``
    0 (DDIM) to 1, ``seed`` of its noise, ``last_step`` of ``schedule.sampling_sigmas``. Raises ValueError for a mask
    without its clip, RuntimeError where the result is not finite.
    """
    seed = options.pop("seed", 0)
    sigmas = schedule.sampling_sigmas(host.sigma_table(model), steps, options.pop("last_step", "clip noise level"))
    if control is not None:
        if control.control.acts:
            model = _inflated(model)
        else:
            control = None
    start, noise = latent, None
    if noise_mask is not None:
        noise_mask = noise_mask.float()  # the host scales it, which booleans and halves cannot be everywhere
        start, noise = _clip_and_noise(model, latent, clip, float(sigmas[0]))
    edited = host.run_sampler(
        model,
        ddim_sample,
        sigmas,
        (positive, negative),
        guidance,
        start,
        noise=noise,
        noise_mask=noise_mask,
        seed=seed,
        callback=callback,
        control=control,
        noise_seed=seed,
        **options,
    )
    edited = host.check_prediction(model, edited)
    if noise_mask is not None:
        # The last level, alpha_bar[0], is not quite clean: outside the mask the clip must be exact.
        edited = host.paste_masked(edited, start, noise_mask)
    return edited if control is None else control.pasted(edited)


def controlled(
    model: host.ModelPatcher,
    control: Control,
    trajectory: Trajectory | None,
    latent: Tensor,
    positive: host.Conditioning,
    noise_mask: Tensor | None = None,
) -> ControlledRun:
    """Return the ``control`` of ``sample``: what an edit keeps of the clip; its ``mask`` is known afterwards.

    ``trajectory``: of ``invert_and_keep``, for the inverted ``latent``. ``positive``: the edit's sentence; from Edit
    Prompt it knows its words. ``noise_mask``: a LATENT's, the mask of a control without one. Raises Refusal for inputs
    that do not belong together.
    """
    if control.mask is None:
        control = replace(control, mask=noise_mask)
    trajectory = check_trajectory(trajectory, latent)
    return ControlledRun(control, trajectory, check_words(words_in(positive), positive), host.model_scale(model))


def guider(
    model: host.ModelPatcher,
    positive: host.Conditioning,
    negative: host.Conditioning,
    guidance: float,
    control: ControlledRun,
) -> Any:
    """Return ComfyUI's GUIDER for ``control``, so that any sampler can run it; the ``mask`` of it is known then."""
    made = host.controlled_guider(_inflated(model), (positive, negative), guidance, control)
    host.find_mask(made, control)
    return made


def _inflated(model: host.ModelPatcher) -> host.ModelPatcher:
    """Return a MODEL that controls can reach into: a plain one gets an inflation that changes nothing."""
    plain = Inflation("per frame", pool_group_norm=False)
    return model if host.inflation_of(model) is not None else host.inflate_model(model, plain)


def _clip_and_noise(
    model: host.ModelPatcher, latent: Tensor, clip: Tensor | None, sigma: float
) -> tuple[Tensor, Tensor]:
    """Split an inverted latent into the clip and the noise that was added to it at ``sigma``."""
    if clip is None or clip.shape != latent.shape:
        raise Refusal(
            "latent",
            "it has a noise mask, but not the clip that was inverted",
            "Set the mask (Set Latent Noise Mask) on the output of DDIM Invert, or before it on the clip.",
        )
    clip = clip.to(latent)
    return clip, added_noise(latent, clip, sigma, host.model_scale(model))
