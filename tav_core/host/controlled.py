"""Run a sampling under edit control: the clip is evaluated first in every step, in every context window."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ..control.guidance import proximal
from ..control.injection import BoundCall, Call, Step
from ..control.run import ControlledRun
from ..errors import Refusal
from ..inflate import Layout
from .model import Conditioning, ModelPatcher
from .windows import conds_in_window, window_indices

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
    return call.bound(layout, x, conds)


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
        run.begin()
        given = inspect.signature(executor.original).bind(*args, **kwargs)
        values = given.arguments
        noise, latent, seed = values["noise"], values["latent_image"], values.get("seed")
        values["noise"], values["latent_image"] = run.start(noise, latent, seed or 0)
        try:
            return executor(*given.args, **given.kwargs)
        finally:
            run.end()

    return outer_sample


def _predict_noise(run: ControlledRun) -> Any:
    def predict_noise(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        given = inspect.signature(executor.original).bind(*args, **kwargs)
        x, options = given.arguments["x"], given.arguments.get("model_options", {})
        if x.shape != run.trajectory.clip.shape:
            return executor(*given.args, **given.kwargs)
        sigma, transformer_options = float(given.arguments["timestep"].flatten()[0]), options["transformer_options"]
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


def _calc_cond_batch(
    executor: Any, model: Any, conds: list[Any], x: Tensor, timestep: Tensor, model_options: dict[str, Any], *rest: Any
) -> Any:
    """Evaluate the clip, then the edit. Within context windows the host calls this for each of them."""
    transformer_options = model_options.get("transformer_options", {})
    step, clip = transformer_options.get(_KEY) or (None, None)
    if step is None:
        return executor(model, conds, x, timestep, model_options, *rest)
    frames, latent = _window(step, x, transformer_options)
    if latent.shape != x.shape:
        return executor(model, conds, x, timestep, model_options, *rest)

    def options(source: bool) -> dict[str, Any]:
        call = Call(step, source, frames)
        return {**model_options, "transformer_options": {**transformer_options, _KEY: call}}

    if step.needs_clip and step.kept_frames != frames:
        step.kept.clear()
        step.kept_frames = frames
        source = _in_window(clip, step, frames, transformer_options, model_options)
        executor(model, [source], latent, timestep, options(True), *rest)
    return executor(model, conds, x, timestep, options(False), *rest)


def _window(step: Step, x: Tensor, transformer_options: Mapping[str, Any]) -> tuple[tuple[int, ...], Tensor]:
    """Return the clip's frames that a call looks at, and its latent of them."""
    whole = torch.arange(len(step.latent))
    window, indices = transformer_options.get("context_window"), window_indices(transformer_options, len(x))
    if len(x) == len(whole) or (window is None and indices is None):
        return tuple(whole.tolist()), step.latent
    if window is None:
        assert indices is not None
        return tuple(indices), step.latent[list(indices)].to(x.device)
    return tuple(window.get_tensor(whole, dim=0).tolist()), window.get_tensor(step.latent, x.device)


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
