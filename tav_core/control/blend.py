"""Masks that limit an edit: given by the user, or found where the two sentences predict different noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import Refusal

# Resizing and sharpening may leave a mask this far outside 0..1.
BEYOND = 0.1
# Noise levels at which the two sentences are compared, as shares of the inversion's steps from the clip up.
MASK_LEVELS = (0.25, 0.45, 0.65)
# Smoothing reaches over a latent's side divided by this.
_SIDES = 32
# A frame's maximum counts as at least this share of the clip's.
_LEAST_TOP = 0.3


def grid(tokens: int, height: int, width: int) -> tuple[int, int, int] | None:
    """Return height, width and halvings of a layer with ``tokens`` tokens in a UNet for latents [height, width]."""
    for halvings in range(8):
        if height * width == tokens:
            return height, width, halvings
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    return None


def resized_mask(mask: Tensor, frames: int, height: int, width: int) -> Tensor:
    """Return a MASK [1 or frames, h, w] or [1 or frames, 1, h, w] as [frames, 1, height, width] for the latent.

    A cell that the mask touches belongs to it. Raises Refusal for another number of frames, or NaN.
    """
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    if not torch.isfinite(mask).all():
        raise Refusal("mask", "it holds values that are not finite (NaN or infinity)", "Draw it again.")
    if len(mask) not in (1, frames):
        raise Refusal("mask", f"it has {len(mask)} frames, the clip has {frames}", "Give one for all or one each.")
    larger = mask.shape[-2] >= height and mask.shape[-1] >= width
    mask = F.adaptive_max_pool2d(mask, (height, width)) if larger else F.interpolate(mask, (height, width))
    return mask.clamp(0, 1).expand(frames, -1, -1, -1)


def frame_masks(mask: Tensor | None, latent: Tensor) -> Tensor:
    """Return a MASK [frames, h, w] on the CPU for a latent [frames, c, h, w]; all 1 where there is none."""
    frames, _, height, width = latent.shape
    mask = latent.new_ones(1, height, width) if mask is None else mask
    return resized_mask(mask, frames, height, width)[:, 0].cpu().contiguous()


def composited(clip: Tensor, edited: Tensor, mask: Tensor | None) -> Tensor:
    """Return the frames of an edit inside a mask and the clip's own outside, as ImageCompositeMasked does.

    ``clip``, ``edited``: [frames, h, w, 3] in 0..1. ``mask``: [frames, 1, h, w] or [frames, h, w] of any size, 0 to 1;
    None leaves the edit as it is. The autoencoder blurs what it decodes, and a pixel of it depends on cells around its
    own: a latent that is the clip's outside the mask is not enough for the clip's pixels there.
    """
    if mask is None:
        return edited
    weight = mask.reshape(-1, 1, *mask.shape[-2:]).to(edited)
    weight = F.interpolate(weight, edited.shape[1:3], mode="bilinear").movedim(1, -1)
    return weight * edited + (1 - weight) * clip


def _lower_mean(values: Tensor) -> Tensor:
    """Return the mean of the lower of the two classes that differ most between them (Otsu's method)."""
    ordered = values.flatten().sort().values
    if len(ordered) < 2:
        return ordered.mean()
    sums, count = ordered.cumsum(0), torch.arange(1, len(ordered), device=ordered.device)
    lower, upper = sums[:-1] / count, (sums[-1] - sums[:-1]) / (len(ordered) - count)
    return lower[(count * (len(ordered) - count) * (lower - upper).square()).argmax()]


def difference_mask(differences: Sequence[Tensor], threshold: float) -> Tensor:
    """Return where a clip's sentence and an edit's predict different noise, [frames, 1, h, w], 0 or 1.

    ``differences``: of the two predictions for the same noisy clip, [frames, c, h, w], one for each noise level.
    Averaged over channels and levels, over neighbours and over three frames; 1 above ``threshold``, a share of the way
    from what does not change to the frame's maximum. A frame that hardly differs is held against the clip's maximum
    (DiffEdit, arXiv 2210.11427). What changes may be the smaller part of the picture or the larger one.
    """
    maps = torch.zeros(())
    for difference in differences:
        level = difference.float().abs().mean(1, keepdim=True)
        maps = maps + level / level.mean().clamp_min(1e-12)
    side = 2 * max(1, min(maps.shape[-2:]) // _SIDES) + 1
    maps = F.avg_pool2d(maps, side, stride=1, padding=side // 2, count_include_pad=False)
    before, after = torch.cat([maps[:1], maps[:-1]]), torch.cat([maps[1:], maps[-1:]])
    maps = (before + 4 * maps + after) / 6
    # A small difference everywhere marks no place.
    maps = maps - _lower_mean(maps)
    top = maps.amax((1, 2, 3), keepdim=True).clamp_min(_LEAST_TOP * float(maps.amax()))
    return (maps > threshold * top).float()
