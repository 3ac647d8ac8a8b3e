"""Tune on windows of a long clip: its first frame, and consecutive frames that each step draws again.

Memory then depends on the window's length and not on the clip's. Spatial attention keeps the clip's first frame, as
everywhere in the method; temporal attention and pooled norms see the window alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import Refusal


def window_length(frames: int, per_step: int) -> int | None:
    """Return how many of ``frames`` a step sees; None for all of them. ``per_step``: 0 = all.

    Raises Refusal for 1, with which no step would see more than the first frame.
    """
    if per_step == 1 and frames > 1:
        raise Refusal(
            "frames_per_step",
            "with 1 a step would see the first frame alone, and no motion",
            "Set it to 8 or more, or to 0 for all frames.",
        )
    return per_step if 0 < per_step < frames else None


def draw_window(frames: int, length: int, generator: torch.Generator) -> Tensor:
    """Draw the frames of one step: 0, then ``length`` - 1 in a row, as numbers [length].

    Starts beyond an end of the clip count as the one at that end: so that its frames are drawn as often as others, at
    least every (frames + length - 3) / (length - 1) steps on average.
    """
    row = length - 1
    start = int(torch.randint(2 - row, frames, (1,), generator=generator))
    start = min(max(start, 1), frames - row)
    return torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(start, start + row)])
