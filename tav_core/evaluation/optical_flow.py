"""Optical flow for metrics, after Lucas and Kanade (1981): from coarse to fine, with a Gaussian window.

It is written here because no library that every ComfyUI installs has a flow that needs no downloaded weights:
OpenCV comes in several wheels that conflict, torchvision's RAFT downloads its weights, scikit-image is not there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from scipy.ndimage import gaussian_filter
from torch import Tensor

from ..cancel import raise_if_cancelled

_WINDOW_SIGMA = 2.0
_ITERATIONS = 4
_SMALLEST_SIDE = 16
# A pixel counts as visible in both frames if the flow there and back ends this close to it, in pixels.
_ROUND_TRIP = 1.0


def optical_flow(first: Tensor, second: Tensor) -> Tensor:
    """Estimate where the pixels of ``first`` are in ``second``: displacements [n, 2, h, w] (x, y) in pixels.

    Both are [n, h, w, 3] in 0..1. The flow follows texture and edges, and stays small in flat regions.
    """
    # A pair of frames at a time: less memory, and a cancel is heard.
    return torch.cat([_flow_of_pairs(*pair) for pair in zip(first.split(1), second.split(1), strict=True)])


def _flow_of_pairs(first: Tensor, second: Tensor) -> Tensor:
    pyramid = [(channels_first(first), channels_first(second))]
    while min(pyramid[-1][0].shape[-2:]) >= 2 * _SMALLEST_SIDE:
        source, target = pyramid[-1]
        pyramid.append((_halved(source), _halved(target)))
    coarsest = pyramid[-1][0]
    flow = coarsest.new_zeros(len(coarsest), 2, *coarsest.shape[-2:])
    for source, target in reversed(pyramid):
        raise_if_cancelled()
        if flow.shape[-2:] != source.shape[-2:]:
            flow = 2 * F.interpolate(flow, source.shape[-2:], mode="bilinear", align_corners=False)
        for _ in range(_ITERATIONS):
            flow = _refined(source, target, flow)
    return flow


def channels_first(video: Tensor) -> Tensor:
    """Turn IMAGE frames [n, h, w, c] into float32 planes [n, c, h, w]."""
    return rearrange(video.float(), "n h w c -> n c h w")


def _halved(image: Tensor) -> Tensor:
    return F.avg_pool2d(_blurred(image, 0.8), 2)


def _blurred(image: Tensor, sigma: float) -> Tensor:
    blurred = gaussian_filter(image.cpu().numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=2.5)
    return torch.from_numpy(blurred).to(image)


def _refined(source: Tensor, target: Tensor, flow: Tensor) -> Tensor:
    warped = warp(target, flow)
    padded = F.pad(0.5 * (source + warped), (1, 1, 1, 1), mode="replicate")
    dx = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    dy = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    dt = warped - source
    products = torch.stack([(a * b).sum(1) for a, b in ((dx, dx), (dx, dy), (dy, dy), (dx, dt), (dy, dt))], dim=1)
    xx, xy, yy, xt, yt = _blurred(products, _WINDOW_SIGMA).unbind(1)
    # A small multiple of the identity keeps the system solvable in flat regions, and their flow at zero.
    xx, yy = xx + 1e-4, yy + 1e-4
    determinant = xx * yy - xy * xy
    step = torch.stack([xy * yt - yy * xt, xy * xt - xx * yt], dim=1) / determinant[:, None]
    return _blurred(flow + step.clamp(-1.5, 1.5), 1.0)


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """Sample [n, c, h, w] at each pixel's position plus the flow [n, 2, h, w] in pixels."""
    height, width = image.shape[-2:]
    x, y = torch.arange(width).to(flow) + flow[:, 0], torch.arange(height).to(flow)[:, None] + flow[:, 1]
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    return F.grid_sample(image, grid, padding_mode="border", align_corners=False)


def visible_in_both(there: Tensor, back: Tensor) -> Tensor:
    """Return where the flow ``there`` and the flow ``back`` [n, 2, h, w] undo each other: bool [n, h, w]."""
    return (there + warp(back, there)).norm(dim=1) < _ROUND_TRIP
