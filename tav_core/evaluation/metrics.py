"""Metrics of an edited video against its source, and their tables.

Videos are [frames, height, width, 3] in 0..1. The CLIP scores are the paper's; the others are computed from pixels.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..errors import Refusal
from .background import background_psnr, background_ssim, semantic_score
from .clip_scores import clip_scores, frame_consistency, similarity_to_previous, textual_faithfulness
from .motion import end_point_error, ff_beta, motion_alignment, motion_fidelity
from .optical_flow import optical_flow
from .warping import ff_alpha, warp_error, warp_ssim


def source_flows(source: Tensor) -> tuple[Tensor, Tensor]:
    """Return a video's optical flow to the next frame and back, [frames - 1, 2, h, w] each."""
    return optical_flow(source[:-1], source[1:]), optical_flow(source[1:], source[:-1])


def evaluate(
    source: Tensor,
    edited: Tensor,
    embeddings: Tensor | None = None,
    text: Tensor | None = None,
    mask: Tensor | None = None,
    flows: tuple[Tensor, Tensor] | None = None,
    edited_flow: Tensor | None = None,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Compute all figures by name, and the curves over frames by name.

    ``source``, ``edited``: [frames, h, w, 3] in 0..1. ``embeddings``: the edit's CLIP image embeddings
    [frames, width]; ``text``: its prompt's [width]; ``mask`` [frames or 1, h, w]: the edited region. Figures whose
    inputs are missing are left out, and so is FF-alpha for a source that does not warp well. ``flows``: the
    source's ``source_flows``, for several edits of one source, and ``edited_flow``: the edit's to the next frame; they
    are computed if missing. Raises Refusal for inputs that do not match.
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
    moves = len(source) > 1
    if moves:
        flow, backward = flows or source_flows(source)
        after = optical_flow(edited[:-1], edited[1:]) if edited_flow is None else edited_flow
        figures["motion alignment"] = motion_alignment(flow, after)
        figures["warp error"], curves["warp error"] = warp_error(edited, flow, backward)
    if mask is not None:
        figures["background PSNR, dB"] = background_psnr(source, edited, mask)
    if moves:
        figures["minus end-point error, px"] = end_point_error(flow, after)
        figures["motion fidelity"] = motion_fidelity(flow, after)
        figures["FF-beta"] = ff_beta(flow, after)
        alpha = ff_alpha(source, edited, flow)
        if alpha is not None:
            figures["FF-alpha"] = alpha
        figures["WarpSSIM"] = warp_ssim(edited, flow)
    if mask is not None:
        figures["background SSIM"] = background_ssim(source, edited, mask)
        figures["semantic score"] = semantic_score(source, edited, mask)
    return figures, curves


_GOOD = {
    "frame consistency": "1 = all frames alike to CLIP",
    "textual faithfulness": "higher = closer to the prompt; 25 to 35 is usual for ViT-L/14",
    "motion alignment": "1 = moves as the source, 0 = unrelated",
    "warp error": "0 = follows the source's motion exactly",
    "background PSNR, dB": "higher = kept better outside the mask; above 30 it looks the same",
    "minus end-point error, px": "0 = every pixel moves as in the source (V2VBench)",
    "motion fidelity": "1 = the tracks of points are the source's (Yatim et al.)",
    "FF-beta": "0 = directions of motion as in the source, 2 = opposite (EditBoard)",
    "FF-alpha": "0 = follows the source's motion exactly, in grey levels of 255 (EditBoard)",
    "WarpSSIM": "1 = follows the source's motion exactly (RAVE)",
    "background SSIM": "1 = kept outside the mask",
    "semantic score": "0 = kept outside the mask, in grey levels of 255 (EditBoard)",
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
