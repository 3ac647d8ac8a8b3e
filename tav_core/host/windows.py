"""Long clips: the host evaluates them window by window.

Every window still attends to the clip's first frame, and what is given for each frame follows its frames: hints of
ControlNets and T2I-Adapters, masks, prompts, channels that are concatenated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..inflate import FirstFrame, Layout

_RUN = "tune-a-video run"
# Where packs look up a window's frames: AnimateDiff-Evolved writes it, Advanced-ControlNet and IPAdapter read it.
_PUBLISHED = "ad_params"
# The attributes in which a ControlNet or a T2I-Adapter keeps what it has computed from its hints.
_COMPUTED = ("cond_hint", "control_input", "extra_concat")


def window_frames(transformer_options: Mapping[str, Any], count: int) -> list[int] | None:
    """Return the numbers of the ``count`` frames that an evaluation looks at, in their order; None for all of a video.

    AnimateDiff-Evolved cuts clips around ``calc_cond_batch`` and tells of it in the same place, where a window can be
    left over from an earlier step. With the frame that newer hosts put ahead of it, a looped window can hold all frames
    in another order.
    """
    told = transformer_options.get(_PUBLISHED) or {}
    found, whole = told.get("sub_idxs"), list(range(told.get("full_length", count + 1)))
    if found is None or len(found) != count or count > len(whole) or list(found) == whole:
        return None
    return list(found) if count < len(whole) or sorted(found) == whole else None


def conds_in_window(conds: Any, indices: Sequence[int], frames: int) -> Any:
    """Return a guider's conditionings for some of ``frames`` frames: of what has a row for each, their rows."""

    def cut(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: cut(each) for key, each in value.items()}
        if isinstance(value, Tensor) and value.ndim > 0 and len(value) == frames:
            return value[list(indices)]
        inner = getattr(value, "cond", None)
        return value._copy_with(cut(inner)) if isinstance(inner, Tensor) else value

    return [cut(cond) for cond in conds]


class _Run:
    """Stands for one run of a sampler."""


class FirstFrameCache:
    """Keys and values of a long video's first frame, for context windows that do not hold it.

    Whenever a window holds frame 0, the tokens that the spatial attentions project from it are kept, one frame's
    worth, and the windows after it attend to those in the place of their own first frame. So ST-Attn has its anchor at
    no cost. A window that comes before any that holds frame 0 (looped schedules) sees the tokens of the step before,
    or its own first frame.
    """

    def __init__(self) -> None:
        # Keyed by an object that lives as long as the run.
        self._runs: Any = WeakIdKeyDictionary()

    def begin(self, transformer_options: dict[str, Any]) -> None:
        """Mark a run's options, so that its calls are known on every GPU."""
        run = _Run()
        self._runs[run] = {}
        transformer_options[_RUN] = run

    def lookup(self, layout: Layout, transformer_options: Mapping[str, Any]) -> FirstFrame | None:
        """Return the ``first_frame`` of ``inflated_forwards`` for one call; None for a video in one piece."""
        # Without a mark the sigmas stand for the run. With several GPUs the host makes new ones for each call.
        run = transformer_options.get(_RUN, transformer_options.get("sample_sigmas"))
        frames = window_frames(transformer_options, layout.frames)
        if frames is None or run is None:
            return None
        kept: dict[Any, Tensor] = self._runs.setdefault(run, {})
        # A prompt's own identity: several may share one number in cond_or_uncond.
        conds = transformer_options.get("uuids") or transformer_options.get("cond_or_uncond") or [0]
        at = frames.index(0) if 0 in frames else None

        def first_frame(path: str, name: str, tokens: Tensor) -> Tensor | None:
            if at is not None:
                first = tokens[:, at : at + 1]
                for cond, one in zip(conds, first, strict=True):
                    kept[path, name, cond] = one.clone()
                return first
            found = [kept.get((path, name, cond)) for cond in conds]
            if any(one is None or one.shape[1:] != tokens.shape[2:] for one in found):
                return None
            return torch.stack([one.to(tokens.device) for one in found if one is not None])

        return first_frame


def for_frames(handler: Any) -> Any:
    """Copy the host's handler of context windows for models whose batch is one video.

    The host compares a timestep for each frame with all sigmas of the run, element by element. ComfyUI 0.3.64 fails
    then, unless there are as many frames as sigmas. It cuts conditionings into windows where it knows how, which
    differs between versions; hints of ControlNets it never cuts.
    """
    fitted, kind = copy.copy(handler), type(handler)
    fitted.set_step = lambda timestep, *args, **kwargs: kind.set_step(fitted, timestep[:1], *args, **kwargs)
    if getattr(handler, "dim", 0) != 0:  # windows of the picture, not of the video
        return fitted

    def get_resized_cond(cond_in: Any, x_in: Tensor, window: Any, *args: Any, **kwargs: Any) -> Any:
        resized = kind.get_resized_cond(fitted, cond_in, x_in, window, *args, **kwargs)
        if resized is None:
            return None
        # The host may leave some of several prompts out of a window.
        whole = {cond.get("uuid"): cond for cond in cond_in}
        return [_follow(whole[cond.get("uuid")], cond, _frames_of(fitted, window)) for cond in resized]

    def execute(calc_cond_batch: Callable[..., Any], model: Any, conds: Any, x_in: Tensor, *args: Any) -> Any:
        def in_window(model: Any, conds: Any, x: Tensor, timestep: Tensor, model_options: dict[str, Any]) -> Any:
            transformer_options = model_options["transformer_options"]
            frames = _frames_of(fitted, transformer_options["context_window"])
            published = {"sub_idxs": frames, "full_length": len(x_in), "context_length": len(frames)}
            options = {**model_options, "transformer_options": {**transformer_options, _PUBLISHED: published}}
            with hints_in_window(conds, frames):
                return calc_cond_batch(model, conds, x, timestep, options)

        return kind.execute(fitted, in_window, model, conds, x_in, *args)

    fitted.get_resized_cond, fitted.execute = get_resized_cond, execute
    return fitted


def keep_noise(model_options: dict[str, Any]) -> None:
    """Switch FreeNoise off in a run's ``model_options``, whose handler is replaced by a copy.

    FreeNoise (arXiv 2310.15169) is an option of newer hosts' context windows. It overwrites the noise of later frames
    with that of the first ones, and a frame's inverted noise describes that frame.
    """
    handler = model_options.get("context_handler")
    if handler is not None and getattr(handler, "freenoise", False):
        kept = copy.copy(handler)
        kept.freenoise = False
        model_options["context_handler"] = kept


def _frames_of(handler: Any, window: Any) -> list[int]:
    """Return the frames of the host's window, with those that newer hosts put ahead of it or keep in a place of it."""
    ahead = getattr(window, "causal_anchor_index", None)
    frames = [*([] if ahead is None or ahead < 0 else [ahead]), *window.index_list]
    for place in getattr(handler, "latent_retain_index_list", ()):
        frames[place] = place
    return frames


def _follow(whole: Mapping[str, Any], part: dict[str, Any], frames: Sequence[int]) -> dict[str, Any]:
    """Cut what the host has left whole in ``part``, its conditioning of a window.

    Frame i gets item i, as without windows; where there are fewer items than frames, they repeat in turn.
    """
    conds = dict(part["model_conds"])
    for name, value in conds.items():
        tensor = getattr(value, "cond", None)
        if isinstance(tensor, Tensor) and tensor.ndim > 0 and value is whole["model_conds"][name]:
            conds[name] = value._copy_with(_of_frames(tensor, frames))
    followed = {**part, "model_conds": conds}
    mask = part.get("mask")
    if mask is not None and mask is whole["mask"]:
        followed["mask"] = _of_frames(mask, frames)
    return followed


def _of_frames(values: Tensor, frames: Sequence[int]) -> Tensor:
    """Return the values of some frames; a single one is for all frames."""
    return values if len(values) == 1 else values[[frame % len(values) for frame in frames]]


@contextmanager
def hints_in_window(conds: Iterable[Any], frames: Sequence[int], besides: Iterable[Any] = ()) -> Iterator[None]:
    """Give ControlNets and T2I-Adapters of ``conds`` the hints of these frames alone while the context lasts.

    ``besides``: conditionings whose hints are in the window already. One hint for all frames stays, with all that was
    computed from it. Controls of Advanced-ControlNet cut hints, masks and strengths by themselves.
    """
    done = {id(control) for control in _controls(besides)}
    before: list[tuple[Any, dict[str, Any]]] = []
    try:
        for control in _controls(conds):
            hints = getattr(control, "cond_hint_original", None)
            if id(control) in done or hasattr(control, "sub_idxs") or hints is None or len(hints) == 1:
                continue
            kept = ("cond_hint_original", "extra_concat_orig", *_COMPUTED)
            before.append((control, {name: getattr(control, name) for name in kept if hasattr(control, name)}))
            at = [frame % len(hints) for frame in frames]
            control.cond_hint_original = hints[at]
            control.extra_concat_orig = [_of_frames(each, at) for each in control.extra_concat_orig]
            for name in _COMPUTED:
                if hasattr(control, name):
                    setattr(control, name, None)
        yield
    finally:
        for control, values in before:
            for name, value in values.items():
                setattr(control, name, value)


def _controls(conds: Iterable[Any]) -> list[Any]:
    """Return the controls of some conditionings and those chained before them, each once, and their copies on GPUs."""
    found: dict[int, Any] = {}
    waiting = [cond.get("control") for each in conds for cond in each or ()]
    while waiting:
        control = waiting.pop()
        if control is not None and id(control) not in found:
            found[id(control)] = control
            copies = getattr(control, "multigpu_clones", {}).values()
            waiting += [getattr(control, "previous_controlnet", None), *copies]
    return list(found.values())
