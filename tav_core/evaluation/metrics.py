"""How good an edited video is: consistency, faithfulness to the prompt, motion and background of the source.

Videos are [frames, height, width, 3] in 0..1. The first two metrics are the paper's (section 5, from CLIP
embeddings); the others need nothing but pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

_WINDOW_SIGMA = 2.0
_ITERATIONS = 4
_SMALLEST_SIDE = 16
# A pixel counts as seen in both frames if there and back again ends this near to it, in pixels.
_ROUND_TRIP = 1.0
# A video whose flow is smaller than this on average, in pixels, stands still; the rest is rounding.
_STILL = 0.01


def frame_consistency(embeddings: Tensor) -> float:
    """Mean cosine similarity of image embeddings [frames, width] over all pairs of frames, -1..1; 1 for one frame."""
    frames = len(embeddings)
    if frames < 2:
        return 1.0
    unit = F.normalize(embeddings.double(), dim=-1)
    # Both halves of the matrix without its diagonal.
    return float(((unit @ unit.T).sum() - frames) / (frames * (frames - 1)))


def textual_faithfulness(embeddings: Tensor, text: Tensor) -> float:
    """CLIP score: mean cosine similarity of image embeddings [frames, width] with a text's [width], times 100."""
    unit = F.normalize(embeddings.double(), dim=-1)
    return float(100 * (unit @ F.normalize(text.double().flatten(), dim=0)).mean())


def optical_flow(first: Tensor, second: Tensor) -> Tensor:
    """Where the pixels of ``first`` are in ``second``: displacements [n, 2, h, w] (x, y) in pixels.

    Both [n, h, w, 3] in 0..1. Lucas and Kanade's method, from coarse to fine, with a Gaussian window. Made for
    judging: it follows what has texture or edges, and stays small where there is nothing to follow.
    """
    pyramid = [(_planes(first), _planes(second))]
    while min(pyramid[-1][0].shape[-2:]) >= 2 * _SMALLEST_SIDE:
        pyramid.append(tuple(F.avg_pool2d(_blur(image, 0.8), 2) for image in pyramid[-1]))  # type: ignore[arg-type]
    coarsest = pyramid[-1][0]
    flow = coarsest.new_zeros(len(coarsest), 2, *coarsest.shape[-2:])
    for source, target in reversed(pyramid):
        if flow.shape[-2:] != source.shape[-2:]:
            flow = 2 * F.interpolate(flow, source.shape[-2:], mode="bilinear", align_corners=False)
        for _ in range(_ITERATIONS):
            flow = _refined(source, target, flow)
    return flow


def _planes(video: Tensor) -> Tensor:
    return video.float().movedim(-1, 1)


def _blur(image: Tensor, sigma: float) -> Tensor:
    radius = max(1, math.ceil(2.5 * sigma))
    offsets = torch.arange(-radius, radius + 1, device=image.device, dtype=image.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(image.shape[1], 1, -1)
    across = F.pad(image, (radius, radius, 0, 0), mode="replicate")
    across = F.conv2d(across, kernel[:, :, None, :], groups=image.shape[1])
    down = F.pad(across, (0, 0, radius, radius), mode="replicate")
    return F.conv2d(down, kernel[:, :, :, None], groups=image.shape[1])


def _refined(source: Tensor, target: Tensor, flow: Tensor) -> Tensor:
    warped = warp(target, flow)
    padded = F.pad(0.5 * (source + warped), (1, 1, 1, 1), mode="replicate")
    dx = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    dy = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    dt = warped - source
    products = torch.stack([(a * b).sum(1) for a, b in ((dx, dx), (dx, dy), (dy, dy), (dx, dt), (dy, dt))], dim=1)
    xx, xy, yy, xt, yt = _blur(products, _WINDOW_SIGMA).unbind(1)
    # A little of the identity keeps flat regions where they are.
    xx, yy = xx + 1e-4, yy + 1e-4
    determinant = xx * yy - xy * xy
    step = torch.stack([xy * yt - yy * xt, xy * xt - xx * yt], dim=1) / determinant[:, None]
    return _blur(flow + step.clamp(-1.5, 1.5), 1.0)


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """Fetch each pixel of [n, c, h, w] from where flow [n, 2, h, w] says it is."""
    height, width = image.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=image.device, dtype=image.dtype),
        torch.arange(width, device=image.device, dtype=image.dtype),
        indexing="ij",
    )
    grid = torch.stack(
        [(2 * (x + flow[:, 0]) + 1) / width - 1, (2 * (y + flow[:, 1]) + 1) / height - 1],
        dim=-1,
    )
    return F.grid_sample(image, grid, padding_mode="border", align_corners=False)


def _flows(video: Tensor) -> Tensor:
    return optical_flow(video[:-1], video[1:])


def motion_alignment(source: Tensor, edited: Tensor) -> float:
    """Whether the same things move the same way: cosine similarity of both videos' optical flow, -1..1.

    Over all pixels and pairs of neighbouring frames at once, so that what moves counts more than what stands.
    0 if either video stands still. Raises ValueError for videos of different size or length.
    """
    check_same(source, edited)
    if len(source) < 2:
        return 0.0
    ours, theirs = _flows(source), _flows(edited)
    if min(float(flow.square().mean()) for flow in (ours, theirs)) < _STILL**2:
        return 0.0
    return float((ours * theirs).sum() / (ours.norm() * theirs.norm()))


def warp_error(source: Tensor, edited: Tensor) -> float:
    """How far the edited video is from moving as the source does: root mean square in 0..1, 0 = exactly.

    Each edited frame is compared with the next one brought back along the *source's* flow, where the source
    shows the same point in both frames. Raises ValueError for videos of different size or length.
    """
    check_same(source, edited)
    if len(source) < 2:
        return 0.0
    squares, seen = _warp_squares(source, edited)
    return math.sqrt(float(squares.sum() / seen.sum().clamp(min=1)))


def _warp_squares(source: Tensor, edited: Tensor) -> tuple[Tensor, Tensor]:
    """Squared differences where the source's flow can be trusted, and where that is; [frames - 1, h, w] each."""
    there, back = _flows(source), optical_flow(source[1:], source[:-1])
    seen = (there + warp(back, there)).norm(dim=1) < _ROUND_TRIP
    video = _planes(edited)
    return (warp(video[1:], there) - video[:-1]).square().mean(1) * seen, seen


def background_psnr(source: Tensor, edited: Tensor, mask: Tensor) -> float:
    """Peak signal-to-noise ratio in dB outside a mask [frames or 1, h, w] in 0..1 (1 = was edited); inf if equal.

    Raises ValueError for sizes that differ, or for a mask that leaves nothing.
    """
    check_same(source, edited)
    if mask.shape[-2:] != source.shape[1:3]:
        raise ValueError(f"mask: it is {tuple(mask.shape[-2:])}, the video's frames are {tuple(source.shape[1:3])}.")
    outside = (mask.reshape(-1, *mask.shape[-2:]) < 0.5).expand(len(source), -1, -1)
    if not outside.any():
        raise ValueError("mask: it covers every pixel, so there is no background to compare.")
    error = float((source.double() - edited.double()).square().mean(-1)[outside].mean())
    return 10 * math.log10(1 / error) if error else math.inf


def evaluate(
    source: Tensor,
    edited: Tensor,
    embeddings: Tensor | None = None,
    text: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """All that can be said of an edit: figures by name, and those that each frame has of its own.

    ``source``, ``edited``: [frames, h, w, 3] in 0..1. ``embeddings``: the edit's CLIP image embeddings
    [frames, width]; ``text``: its prompt's [width]; ``mask`` [frames or 1, h, w]: where it was edited. What is
    not given is left out. Raises ValueError for inputs that don't fit together.
    """
    check_same(source, edited)
    figures: dict[str, float] = {}
    curves: dict[str, list[float]] = {}
    if embeddings is not None:
        unit = F.normalize(embeddings.double(), dim=-1)
        figures["frame consistency"] = frame_consistency(embeddings)
        if len(unit) > 1:
            curves["similarity to the frame before"] = (unit[1:] * unit[:-1]).sum(-1).tolist()
        if text is not None:
            if text.numel() != embeddings.shape[-1]:
                raise ValueError(
                    f"clip: its text embeddings have {text.numel()} numbers, the clip_vision's images "
                    f"{embeddings.shape[-1]}. Load the text and the vision half of one CLIP."
                )
            figures["textual faithfulness"] = textual_faithfulness(embeddings, text)
            curves["CLIP score"] = (100 * (unit @ F.normalize(text.double().flatten(), dim=0))).tolist()
    figures["motion alignment"] = motion_alignment(source, edited)
    figures["warp error"] = warp_error(source, edited)
    if len(source) > 1:
        squares, seen = _warp_squares(source, edited)
        curves["warp error"] = (squares.sum((1, 2)) / seen.sum((1, 2)).clamp(min=1)).sqrt().tolist()
    if mask is not None:
        figures["background PSNR, dB"] = background_psnr(source, edited, mask)
    return figures, curves


_GOOD = {
    "frame consistency": "1 = all frames alike to CLIP",
    "textual faithfulness": "higher = closer to the prompt; 25 to 35 is usual for ViT-L/14",
    "motion alignment": "1 = moves as the source, 0 = unrelated",
    "warp error": "0 = follows the source's motion exactly",
    "background PSNR, dB": "higher = kept better outside the mask; above 30 it looks the same",
}


def rows(figures: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Figures as (name, value, what is good)."""
    return [(name, f"{value:.4g}", _GOOD.get(name, "")) for name, value in figures.items()]


def table(figures: Mapping[str, float]) -> str:
    """Figures as a Markdown table, with what is good."""
    return "\n".join(
        ["| figure | value | |", "| --- | --- | --- |", *map("| {0[0]} | {0[1]} | {0[2]} |".format, rows(figures))]
    )


def check_same(source: Tensor, edited: Tensor) -> None:
    """Refuse videos of different size or length (ValueError)."""
    if source.shape != edited.shape:
        frames, height, width, _ = source.shape
        other_frames, other_height, other_width, _ = edited.shape
        raise ValueError(
            f"source and edited: one has {frames} frames of {width}x{height}, the other {other_frames} of "
            f"{other_width}x{other_height}. Compare a video with an edit of the same frames."
        )
