"""Metrics of an edited video against its source, and their tables.

Videos are [frames, height, width, 3] in 0..1. The CLIP scores are the paper's; the others are computed from pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from ..errors import Refusal
from .clip_scores import clip_scores, frame_consistency, similarity_to_previous, textual_faithfulness
from .optical_flow import channels_first, optical_flow, visible_in_both, warp

# Flow below this root mean square, in pixels, is rounding error: the video does not move.
_STILL = 0.01


def motion_alignment(flow: Tensor, edited_flow: Tensor) -> float:
    """Return the cosine similarity of two videos' optical flows [frames - 1, 2, h, w], -1..1.

    It is taken over all pixels and frames at once, so that large motion weighs more. 0 if either video is still.
    """
    if min(float(each.square().mean()) for each in (flow, edited_flow)) < _STILL**2:
        return 0.0
    return float((flow * edited_flow).sum() / (flow.norm() * edited_flow.norm()))


def warp_error(edited: Tensor, flow: Tensor, backward: Tensor) -> tuple[float, list[float]]:
    """Return how far the edited video departs from the source's motion: root mean square in 0..1, and per frame pair.

    Each edited frame is compared with the next one, warped back along the *source's* ``flow`` [frames - 1, 2, h, w],
    at the pixels that the source shows in both frames. ``backward`` is the source's flow from each frame to the
    one before.
    """
    visible = visible_in_both(flow, backward)
    planes = channels_first(edited)
    squares = (warp(planes[1:], flow) - planes[:-1]).square().mean(1) * visible
    per_pair = (squares.sum((1, 2)) / visible.sum((1, 2)).clamp(min=1)).sqrt()
    return math.sqrt(float(squares.sum() / visible.sum().clamp(min=1))), per_pair.tolist()


def background_psnr(source: Tensor, edited: Tensor, mask: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB outside a mask [frames or 1, h, w] (>= 0.5: edited); inf if equal.

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
    error = float((source.double() - edited.double()).square().mean(-1)[outside].mean())
    return 10 * math.log10(1 / error) if error else math.inf


def evaluate(
    source: Tensor,
    edited: Tensor,
    embeddings: Tensor | None = None,
    text: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Compute all figures by name, and the curves over frames by name.

    ``source``, ``edited``: [frames, h, w, 3] in 0..1. ``embeddings``: the edit's CLIP image embeddings
    [frames, width]; ``text``: its prompt's [width]; ``mask`` [frames or 1, h, w]: the edited region. Figures whose
    inputs are missing are left out. Raises Refusal for inputs that do not match.
    """
    check_same(source, edited)
    figures: dict[str, float] = {}
    curves: dict[str, list[float]] = {}
    if embeddings is not None:
        figures["frame consistency"] = frame_consistency(embeddings)
        if len(embeddings) > 1:
            curves["similarity to the frame before"] = similarity_to_previous(embeddings).tolist()
        if text is not None:
            if text.numel() != embeddings.shape[-1]:
                raise Refusal(
                    "clip",
                    f"its text embeddings have {text.numel()} numbers, the clip_vision's images {embeddings.shape[-1]}",
                    "Load the text and the vision half of one CLIP.",
                )
            figures["textual faithfulness"] = textual_faithfulness(embeddings, text)
            curves["CLIP score"] = clip_scores(embeddings, text).tolist()
    figures["motion alignment"] = figures["warp error"] = 0.0
    if len(source) > 1:
        flow, backward = optical_flow(source[:-1], source[1:]), optical_flow(source[1:], source[:-1])
        figures["motion alignment"] = motion_alignment(flow, optical_flow(edited[:-1], edited[1:]))
        figures["warp error"], curves["warp error"] = warp_error(edited, flow, backward)
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
    """Format figures as rows of name, value and what is good."""
    return [(name, f"{value:.4g}", _GOOD.get(name, "")) for name, value in figures.items()]


def table(figures: Mapping[str, float]) -> str:
    """Format figures as a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in rows(figures)]
    return "\n".join(["| figure | value | |", "| --- | --- | --- |", *lines])


def check_same(source: Tensor, edited: Tensor) -> None:
    """Raise Refusal for videos of different size or length."""
    if source.shape != edited.shape:
        frames, height, width, _ = source.shape
        other_frames, other_height, other_width, _ = edited.shape
        raise Refusal(
            "source and edited",
            f"one has {frames} frames of {width}x{height}, the other {other_frames} of {other_width}x{other_height}",
            "Compare a video with an edit of the same frames.",
        )
