"""Run a sampling under edit control: the clip is evaluated first in every step, in every context window."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from ..control.guidance import proximal
from ..control.injection import BoundCall, Call, Step
from ..control.run import ControlledRun
from ..control.words import WORDS_KEY
from ..errors import Refusal
from ..inflate import Layout
from .model import Conditioning, ModelPatcher
from .windows import conds_in_window, for_frames, hints_in_window, keep_noise, window_frames

_KEY = "tune-a-video control"
# The name of the clip's sentence among a guider's conditionings.
_CLIP = "tune-a-video clip"


def control_of(layout: Layout, x: Tensor, transformer_options: Mapping[str, Any]) -> BoundCall | None:
    """Return the control of one evaluation of the UNet on a batch x; None outside of controlled runs.

    Raises Refusal for tiles.
    """
    call = transformer_options.get(_KEY)
    if not isinstance(call, Call):
        return None
    conds = transformer_options.get("cond_or_uncond") or [0]
    if layout.chunks != len(conds):
        raise Refusal(
            "control", "it cannot follow tiles that another pack stacks on the batch", "Take the tiles off the model."
        )
    # Kohya's Deep Shrink is such a patch.
    resized = any(name.startswith("input_block_patch") for name in transformer_options.get("patches") or {})
    return call.bound(layout, x, conds, transformer_options.get("uuids") or (), resized)


def controlled_guider(
    model: ModelPatcher,
    conditioning: tuple[Conditioning, Conditioning],
    guidance: float,
    run: ControlledRun,
) -> Any:
    """Return a GUIDER whose samplings are controlled edits, one at a time. ``model``: inflated."""
    if not hasattr(model, "add_wrapper_with_key"):
        raise Refusal("control", "this engine of ComfyUI has no wrappers", "Update ComfyUI.")
    controlled: Any = model.clone()
    controlled.add_wrapper_with_key("predict_noise", _KEY, _predict_noise(run))
    controlled.add_wrapper_with_key("calc_cond_batch", _KEY, _calc_cond_batch)
    controlled.add_wrapper_with_key("outer_sample", _KEY, _outer_sample(run))
    if run.control.proximal > 0:
        controlled.set_model_sampler_pre_cfg_function(_proximal(run.control.proximal))
    guider = comfy.samplers.CFGGuider(controlled)
    guider.inner_set_conds({"positive": conditioning[0], "negative": conditioning[1], _CLIP: run.source})
    guider.set_cfg(guidance)
    return guider


def _outer_sample(run: ControlledRun) -> Any:
    def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        given = inspect.signature(executor.original).bind(*args, **kwargs)
        values = given.arguments
        noise, latent, seed = values["noise"], values["latent_image"], values.get("seed")
        is_inverted = not noise.any() and latent.shape == run.trajectory.clip.shape
        noise, latent = run.start(noise, latent, seed or 0)
        if is_inverted and values.get("denoise_mask") is not None:
            noise, latent = run.split(latent, float(values["sigmas"][0]))
            keep_noise(executor.class_obj.model_options)  # the guider has options of its own in a run
        values["noise"], values["latent_image"] = noise, latent
        try:
            edited = executor(*given.args, **given.kwargs)
        finally:
            run.end()
        # A latent that still holds noise equals the clip nowhere.
        return run.exact_outside(edited) if float(values["sigmas"][-1]) == 0 else edited

    return outer_sample


def _predict_noise(run: ControlledRun) -> Any:
    def predict_noise(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        given = inspect.signature(executor.original).bind(*args, **kwargs)
        x, options = given.arguments["x"], given.arguments.get("model_options", {})
        if x.shape != run.trajectory.clip.shape:
            return executor(*given.args, **given.kwargs)
        sigma, transformer_options = float(given.arguments["timestep"].flatten()[0]), options["transformer_options"]
        if run.finds_mask:
            run.find_mask(_differences(run, executor.class_obj, x, given.arguments["timestep"], options))
        levels = transformer_options["sample_sigmas"][:-1]
        number = int((levels - sigma).abs().argmin())
        step = run.step(sigma, number, len(levels), x)
        outside = run.outside(number, len(levels))
        if outside is not None:
            given.arguments["x"] = torch.lerp(step.latent, x, outside.to(x))
        clip = executor.class_obj.conds[_CLIP]
        marked = {**transformer_options, _KEY: (step, clip)}
        given.arguments["model_options"] = {**options, "transformer_options": marked}
        denoised = executor(*given.args, **given.kwargs)
        return denoised if outside is None else torch.lerp(run.clip(denoised), denoised, outside.to(denoised))

    return predict_noise


def find_mask(guider: Any, run: ControlledRun) -> None:
    """Find the mask of a controlled guider before it samples, where one is to be found."""

    def look(model: Any, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any], **_: Any) -> Tensor:
        options = extra_args["model_options"]
        # Around the prediction of a sampler's step the inflation does this.
        if hasattr(handler := options.get("context_handler"), "set_step"):
            options = {**options, "context_handler": for_frames(handler)}
        run.find_mask(_differences(run, model.inner_model, x, sigmas[:1].expand(len(x)), options))
        return x

    if run.finds_mask:
        clip, sigmas = run.trajectory.clip, run.trajectory.sigmas[[-1, 0]]
        guider.sample(torch.zeros_like(clip), clip, comfy.samplers.KSAMPLER(look), sigmas, disable_pbar=True, seed=0)


def _differences(run: ControlledRun, guider: Any, x: Tensor, timestep: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """Return how the predictions for the clip's sentence and for the edit's differ, at each level of the mask."""
    conds = [guider.conds[_CLIP], guider.conds["positive"]]
    found = []
    for sigma, latent in run.clip_at_levels(x):
        comfy.model_management.throw_exception_if_processing_interrupted()
        at = torch.full_like(timestep, sigma)
        # The host's context windows look their step up among these.
        steps = {**options["transformer_options"], "sample_sigmas": x.new_tensor([sigma, 0.0])}
        level = {**options, "transformer_options": steps}
        clip, edit = comfy.samplers.calc_cond_batch(guider.inner_model, conds, latent, at, level)
        found.append(edit - clip)
    return found


def _calc_cond_batch(
    executor: Any, model: Any, conds: list[Any], x: Tensor, timestep: Tensor, model_options: dict[str, Any], *rest: Any
) -> Any:
    """Evaluate the clip, then the edit. Within context windows the host calls this for each of them."""
    transformer_options = model_options.get("transformer_options", {})
    step, clip = transformer_options.get(_KEY) or (None, None)
    if step is None or not step.needs_clip:
        return executor(model, conds, x, timestep, model_options, *rest)
    window = window_frames(transformer_options, len(x))
    frames = tuple(range(len(step.latent)) if window is None else window)
    latent = step.latent if window is None else step.latent[window]
    if latent.shape != x.shape:
        return executor(model, conds, x, timestep, model_options, *rest)

    positive = conds[0] or ()
    worded = frozenset(cond.get("uuid") for cond in positive if cond.get(WORDS_KEY) is step.words)

    def options(source: bool) -> dict[str, Any]:
        call = Call(step, source, frames, worded)
        return {**model_options, "transformer_options": {**transformer_options, _KEY: call}}

    if step.kept_frames != frames:
        step.kept.clear()
        step.kept_frames = frames
        source = _in_window(_first_acting(clip, timestep), step, frames, transformer_options, model_options)
        with hints_in_window([source], frames, besides=conds) if window is not None else nullcontext():
            executor(model, [source], latent, timestep, options(True), *rest)
    return executor(model, conds, x, timestep, options(False), *rest)


def _first_acting(conds: Any, timestep: Tensor) -> list[Any]:
    """Return the first of a guider's conditionings that acts at a timestep, in a list.

    Attention is kept of one prompt. With several, free memory would decide which: the host evaluates them together or
    apart, in its own order.
    """

    def acts(cond: Mapping[str, Any]) -> bool:
        start, end, now = cond.get("timestep_start"), cond.get("timestep_end"), float(timestep.flatten()[0])
        return (start is None or now <= start) and (end is None or now >= end)

    return [cond for cond in conds if acts(cond)][:1]


def _in_window(
    clip: Any,
    step: Step,
    frames: tuple[int, ...],
    transformer_options: Mapping[str, Any],
    model_options: Mapping[str, Any],
) -> Any:
    """Return the clip's conditioning for the window at hand."""
    window, handler = transformer_options.get("context_window"), model_options.get("context_handler")
    if window is not None and handler is not None:
        return handler.get_resized_cond(clip, step.latent, window, step.latent.device)
    whole = len(step.latent)
    return clip if len(frames) == whole else conds_in_window(clip, frames, whole)


def _proximal(quantile: float) -> Any:
    def pre_cfg(args: Mapping[str, Any]) -> list[Tensor]:
        out = list(args["conds_out"])
        if len(args["conds"]) > 1 and args["conds"][1] is not None:
            out[0] = proximal(out[0], out[1], quantile)
        return out

    return pre_cfg
