"""Long clips: the host evaluates them window by window, and every window still attends to the clip's first frame."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..inflate import FirstFrame, Layout

_RUN = "tune-a-video run"


def window_indices(transformer_options: Mapping[str, Any], frames: int) -> Sequence[int] | None:
    """Return which frames of the clip a call on ``frames`` frames looks at; None for a video in one piece.

    AnimateDiff-Evolved cuts clips around ``calc_cond_batch`` and tells of it in ``ad_params``, where a window can be
    left over from an earlier step.
    """
    window = transformer_options.get("context_window")
    if window is not None:
        indices: Sequence[int] | None = getattr(window, "index_list", None)
        return indices
    told = transformer_options.get("ad_params") or {}
    indices = told.get("sub_idxs")
    return indices if indices is not None and len(indices) == frames < told.get("full_length", 0) else None


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
        indices = window_indices(transformer_options, layout.frames)
        if indices is None or run is None:
            return None
        kept: dict[Any, Tensor] = self._runs.setdefault(run, {})
        # A prompt's own identity: several may share one number in cond_or_uncond.
        conds = transformer_options.get("uuids") or transformer_options.get("cond_or_uncond") or [0]
        # Newer hosts put the frame before a window in front of it, so that the first has its previous one.
        ahead = layout.frames - len(indices)
        at = indices.index(0) + ahead if 0 in indices else None

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
    """Copy the host's handler of context windows so that it takes a timestep for each frame.

    The host compares them with all sigmas of the run, element by element. ComfyUI 0.3.64 fails then, unless there
    are as many frames as sigmas, because it expects models whose batch is one video.
    """
    fitted, kind = copy.copy(handler), type(handler)
    fitted.set_step = lambda timestep, *args, **kwargs: kind.set_step(fitted, timestep[:1], *args, **kwargs)
    return fitted
