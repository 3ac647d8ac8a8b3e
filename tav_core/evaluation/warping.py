"""Measures of an edit along the source's motion: each frame is compared with the next one, warped back to it.

Videos are [frames, h, w, 3] in 0..1; ``flow`` is the *source's* from each frame to the next, [frames - 1, 2, h, w].
"""

from __future__ import annotations

import math

from torch import Tensor

from .background import structural_similarity
from .optical_flow import channels_first, visible_in_both, warp

# EditBoard: the source warps well where it differs by this many grey levels at most, of 255.
_WARPS_WELL = 5
# EditBoard: FF-alpha says nothing about clips whose source warps well in a smaller share of pixels.
_LEAST_SHARE = 0.7


def warp_error(edited: Tensor, flow: Tensor, backward: Tensor) -> tuple[float, list[float]]:
    """Return how far the edited video departs from the source's motion: root mean square in 0..1, and per frame pair.

    Only pixels count that the source shows in both frames. ``backward`` is the source's flow from each frame to the
    one before.
    """
    visible = visible_in_both(flow, backward)
    planes = channels_first(edited)
    squares = (warp(planes[1:], flow) - planes[:-1]).square().mean(1) * visible
    per_pair = (squares.sum((1, 2)) / visible.sum((1, 2)).clamp(min=1)).sqrt()
    return math.sqrt(float(squares.sum() / visible.sum().clamp(min=1))), per_pair.tolist()


def warp_ssim(edited: Tensor, flow: Tensor) -> float:
    """Return RAVE's WarpSSIM: the mean structural similarity of each frame with the next one warped back, -1..1.

    1 is best. RAVE (CVPR 2024) takes its flow from RAFT.
    """
    warped = warp(channels_first(edited[1:]), flow).movedim(1, -1)
    return float(structural_similarity(warped, edited[:-1]).mean())


def ff_alpha(source: Tensor, edited: Tensor, flow: Tensor) -> float | None:
    """Return EditBoard's FF-alpha, 0..255 grey levels; 0 is best. None where the source itself warps badly.

    It is the largest channel difference of the warped and the real frame of the edit, mean over the pixels where the
    source's brightness warps within 5 grey levels. EditBoard (AAAI 2025) needs 70 % of such pixels and answers 0
    otherwise, which would be its best value.
    """
    brightness = source.new_tensor([0.299, 0.587, 0.114]).float().view(1, 3, 1, 1)

    def difference(video: Tensor) -> Tensor:
        planes = 255 * channels_first(video)
        return (warp(planes[1:], flow) - planes[:-1]).abs()

    valid = (difference(source[..., :3]) * brightness).sum(1) <= _WARPS_WELL
    if float(valid.float().mean()) < _LEAST_SHARE:
        return None
    counts = valid.sum((1, 2))
    per_pair = (difference(edited).amax(1) * valid).sum((1, 2))[counts > 0] / counts[counts > 0]
    return float(per_pair.mean())
