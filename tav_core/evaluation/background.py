"""Measures of what an edit should have kept: everything outside a mask of the edited region.

Videos are [frames, h, w, 3] in 0..1. Masks are [frames or 1, h, w]; a pixel from 0.5 on belongs to the edit.
"""

from __future__ import annotations

import math

import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from ..cancel import raise_if_cancelled
from ..errors import Refusal

# Constants of SSIM for values in 0..1 (Wang et al. 2004): window of 11x11 pixels, sigma 1.5.
_SIGMA, _TRUNCATE = 1.5, 3.5
_C1, _C2 = 0.01**2, 0.03**2


def background_psnr(source: Tensor, edited: Tensor, mask: Tensor) -> float:
    """Return the peak signal-to-noise ratio outside the mask in dB, 0 and more; inf for equal pixels.

    FiVE (2025) and PIE-Bench call it PSNR of the unedited part. Raises Refusal for a mask that does not fit.
    """
    outside = outside_mask(source, mask)
    error = float((source.double() - edited.double()).square().mean(-1)[outside].mean())
    return 10 * math.log10(1 / error) if error else math.inf


def background_ssim(source: Tensor, edited: Tensor, mask: Tensor) -> float:
    """Return the structural similarity outside the mask, -1..1; 1 for equal pixels.

    As in FiVE (2025) the edited region is blackened in both videos. FiVE then averages over the whole frame, which
    a large mask flatters; this is the mean over the pixels outside. Raises Refusal for a mask that does not fit.
    """
    outside = outside_mask(source, mask)
    kept = outside[..., None]
    return float(structural_similarity(source * kept, edited * kept)[outside].mean())


def semantic_score(source: Tensor, edited: Tensor, mask: Tensor) -> float:
    """Return EditBoard's semantic score, 0..255 grey levels; 0 for equal pixels outside the mask.

    It is the mean over frames of the largest channel difference, averaged over the frame's pixels outside the mask
    (EditBoard, AAAI 2025). A frame without such pixels is left out. Raises Refusal for a mask that does not fit.
    """
    outside = outside_mask(source, mask)
    largest = (source.double() - edited.double()).abs().amax(-1)
    counts = outside.sum((1, 2))
    per_frame = (largest * outside).sum((1, 2))[counts > 0] / counts[counts > 0]
    return 255 * float(per_frame.mean())


def structural_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Return the SSIM of each pixel, mean of the channels, [n, h, w] in -1..1 (Wang et al. 2004).

    Both are [n, h, w, c] in 0..1.
    """
    return torch.cat([_similarity_of_frames(*pair) for pair in zip(first.split(1), second.split(1), strict=True)])


def _similarity_of_frames(first: Tensor, second: Tensor) -> Tensor:
    raise_if_cancelled()

    def blurred(values: Tensor) -> Tensor:
        sigmas = (0, _SIGMA, _SIGMA, 0)
        return torch.from_numpy(gaussian_filter(values.numpy(), sigmas, truncate=_TRUNCATE))

    a, b = first.double().cpu(), second.double().cpu()
    mean_a, mean_b = blurred(a), blurred(b)
    variances = blurred(a * a) - mean_a**2 + blurred(b * b) - mean_b**2
    covariance = blurred(a * b) - mean_a * mean_b
    similarity = (2 * mean_a * mean_b + _C1) * (2 * covariance + _C2)
    return (similarity / ((mean_a**2 + mean_b**2 + _C1) * (variances + _C2))).mean(-1)


def outside_mask(source: Tensor, mask: Tensor) -> Tensor:
    """Return which pixels of a video lie outside a mask, bool [frames, h, w].

    Raises Refusal for a mask of another size or length, and for one that leaves no background.
    """
    frames, height, width = source.shape[:3]
    masks = mask.reshape(-1, *mask.shape[-2:])
    if masks.shape[1:] != (height, width):
        raise Refusal(
            "mask",
            f"it is {masks.shape[2]}x{masks.shape[1]}, and the video's frames are {width}x{height}",
            "Scale it to the size of the frames.",
        )
    if len(masks) not in (1, frames):
        raise Refusal(
            "mask",
            f"it has {len(masks)} frames, and the video has {frames}",
            "Connect one mask for all frames, or one for each frame.",
        )
    outside = (masks < 0.5).expand(frames, -1, -1)
    if not outside.any():
        raise Refusal(
            "mask", "it covers every pixel, so there is no background to compare", "Disconnect it, or mask a part."
        )
    return outside
