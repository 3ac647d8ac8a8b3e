"""Losses of a tuning step: the released one, and others that weigh the frames' own errors more.

Each takes what the model predicted and what it should have predicted, [..., frames, c, h, w], and returns a scalar.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]

# The dimension of the frames.
_FRAMES = -4


def mean_squared(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the released loss, the mean squared error."""
    return F.mse_loss(predicted, target)


def appearance_debiased(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the appearance-debiased error, the mean over all reference frames (MotionDirector, arXiv 2310.08465).

    With a reference frame r it is the mean square of sqrt(2) d_i - d_r, where d_i is the error of frame i. The paper
    draws r at random; here its expectation is computed: 3 mean |d_i|^2 - 2 sqrt(2) |mean d_i|^2. An error that all
    frames share counts (sqrt(2) - 1)^2 = 0.17 times, what is left of a frame's error 3 times.
    """
    error = predicted - target
    shared = error.mean(_FRAMES)
    return 3 * error.square().mean() - 2 * 2**0.5 * shared.square().mean()


def frame_differences(predicted: Tensor, target: Tensor) -> Tensor:
    """Return 1 minus the cosine between the differences of neighbouring frames, mean over them (VMC, 2312.00845).

    In 0..2; 0 where the differences have the target's direction, and for a single frame. Each difference is one vector
    of all its channels and pixels.
    """
    ours, theirs = (_differences(frames) for frames in (predicted, target))
    if ours.shape[-2] == 0:
        return 0 * predicted.sum()
    return (1 - F.cosine_similarity(ours, theirs, dim=-1)).mean()


def _differences(frames: Tensor) -> Tensor:
    """[..., frames, c, h, w] -> [..., frames - 1, c * h * w]."""
    return frames.diff(dim=_FRAMES).flatten(-3)
