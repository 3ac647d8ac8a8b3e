"""Say in words what went wrong with an edit, and in which frames.

Videos are [frames, h, w, 3] in 0..1. No trained model is asked: what a video shows is not known here, only what changed
and how it moves. Each limit is relative to the source where the source says what is usual.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .background import outside_mask
from .optical_flow import channels_first, optical_flow, visible_in_both, warp

# Root mean square, of 1. An autoencoder's round trip alone changes pictures by 0.02 to 0.04.
_NO_CHANGE = 0.05
# 21 dB: a change that is seen at once.
_SEEN = 0.09
# A source whose own frames follow its motion no better than this share of a fault says nothing about the edit.
_USUAL = 2.5
# Pixels a frame from which on something moves, and the least share of such pixels.
_MOVES, _LEAST_MOVING = 0.4, 0.004
# The share of the source's motion that the edit has: 0 is a still picture's, below 0 it moves the other way.
_MOTION_LOST = 0.2


class Fault(NamedTuple):
    """A fault, and the numbers of the frames that have it, from 0."""

    text: str
    frames: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.text} in {_ranges(self.frames)}."


def faults(
    source: Tensor,
    edited: Tensor,
    flows: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
    edited_flow: Tensor | None = None,
) -> list[Fault]:
    """Return what went wrong with an edit: not made, background changed, motion lost, flicker; none where all is well.

    ``flows``: the source's to the next frame and back (``metrics.source_flows``), None for single frames. ``mask``:
    [frames or 1, h, w], the edited region; the background is looked at only with one. ``edited_flow``: the edit's to
    the next frame, computed if missing. Raises Refusal for a mask that does not fit.
    """
    change = (edited[..., :3].float() - source[..., :3].float()).square().mean(-1)
    outside = None if mask is None else outside_mask(source, mask)
    found = [("The edit was hardly made", _unchanged(change, outside))]
    usual = torch.zeros(len(source)) if flows is None else _departure(source, *flows)
    seen = torch.clamp(_USUAL * usual, min=_SEEN)
    if outside is not None:
        found.append(("The background changed", _rms(change, outside) > seen))
    if flows is not None:
        if edited_flow is None:
            edited_flow = optical_flow(edited[:-1], edited[1:])
        found.append(("The motion was lost", _lost(flows[0], edited_flow)))
        found.append(("The picture flickers", _departure(edited, *flows) > seen))
    return [Fault(text, tuple(at.nonzero().flatten().tolist())) for text, at in found if at.any()]


def in_words(found: Sequence[Fault]) -> str:
    """Return all faults as sentences, one a line."""
    return "\n".join(map(str, found)) or "Nothing wrong was found."


def _rms(squares: Tensor, where: Tensor) -> Tensor:
    """Return the root of each frame's mean over some pixels, [frames]; 0 for a frame without any."""
    return ((squares * where).sum((1, 2)) / where.sum((1, 2)).clamp(min=1)).sqrt()


def _unchanged(change: Tensor, outside: Tensor | None) -> Tensor:
    """Return in which frames the edited region is the source's, as far as can be seen."""
    inside = torch.ones_like(change, dtype=torch.bool) if outside is None else ~outside
    # A frame that the region is not in cannot be changed there.
    return (_rms(change, inside) < _NO_CHANGE) & inside.any((1, 2))


def _departure(video: Tensor, flow: Tensor, backward: Tensor) -> Tensor:
    """Return how far each frame departs from the next one along a flow, the last one from the one before, [frames]."""
    planes = channels_first(video)
    squares = (warp(planes[1:], flow) - planes[:-1]).square().mean(1)
    pairs = _rms(squares, visible_in_both(flow, backward))
    return torch.cat([pairs, pairs[-1:]])


def _lost(flow: Tensor, edited_flow: Tensor) -> Tensor:
    """Return in which frames the edit does not move where and as the source does, [frames]."""
    squares = flow.square().sum(1)
    moves = squares > _MOVES**2
    share = ((flow * edited_flow).sum(1) * moves).sum((1, 2)) / (squares * moves).sum((1, 2)).clamp(min=1e-6)
    lost = (share < _MOTION_LOST) & (moves.float().mean((1, 2)) > _LEAST_MOVING)
    return torch.cat([lost, lost[-1:]])


def _ranges(frames: Sequence[int]) -> str:
    """Say "frame 3" or "frames 1 to 4 and 7", counted from 1."""
    runs: list[list[int]] = []
    for frame in frames:
        if runs and frame == runs[-1][-1] + 1:
            runs[-1].append(frame)
        else:
            runs.append([frame])
    names = [f"{run[0] + 1}" if len(run) == 1 else f"{run[0] + 1} to {run[-1] + 1}" for run in runs]
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return f"frame{'s' if len(frames) > 1 else ''} {listed}"
