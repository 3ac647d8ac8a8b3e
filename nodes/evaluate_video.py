"""Evaluate Video: metrics of an edit against its source."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..tav_core import host
from ..tav_core.cancel import cancellable
from ..tav_core.errors import Refusal
from ..tav_core.evaluation import metrics
from ..tav_core.evaluation.faults import faults, in_words
from ..tav_core.evaluation.optical_flow import optical_flow
from ..tav_core.media import pictures
from .support.limits import within_limits
from .support.memory import memory_explained
from .support.types import CATEGORY, search_aliases


class EvaluateVideo(io.ComfyNode):
    """Source and edited IMAGEs -> a table and a plot of metrics."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TAV_EvaluateVideo",
            display_name="Evaluate Video (Tune-A-Video)",
            category=CATEGORY,
            **search_aliases("clip score", "frame consistency", "video metrics"),
            description="Measures an edited clip, its motion and background against the source, and says what went "
            "wrong. With a CLIP Vision "
            "model it also measures how consistent the frames are; with the matching CLIP, how well they fit the "
            "prompt.",
            inputs=[
                io.Image.Input("source", tooltip="The clip that was edited, all its frames."),
                io.Image.Input("edited", tooltip="The edit: as many frames, of the same size."),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip="The edit's prompt. Used only if both CLIP inputs are connected.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="From Load CLIP Vision. The paper measures with OpenAI's CLIP ViT-L/14.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text half of the same CLIP, with its text projection: Load CLIP with clip_l for "
                    "ViT-L/14. A checkpoint's own CLIP has no projection.",
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="The part that was to change. The rest is compared with the source."
                ),
            ],
            outputs=[
                io.String.Output(display_name="table", tooltip="The figures, as a Markdown table."),
                io.Image.Output(display_name="plot", tooltip="The figures of each frame, over frames."),
                io.String.Output(
                    display_name="verdict",
                    tooltip="What went wrong, in words: edit not made, background changed, motion lost, flicker; with "
                    "the frames.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    @cancellable(host.raise_if_cancelled)
    @memory_explained("source", "Compare fewer frames, or make them smaller.")
    @within_limits
    def execute(
        cls,
        source: Any,
        edited: Any,
        prompt: str = "",
        clip_vision: Any = None,
        clip: Any = None,
        mask: Any = None,
    ) -> io.NodeOutput:
        """Measure and plot. Raises Refusal for clips that differ in size or length, and for half a CLIP."""
        if clip is not None and clip_vision is None:
            raise Refusal("clip_vision", "it is missing", "The clip alone cannot look at frames; add Load CLIP Vision.")
        for name, frames in (("source", source), ("edited", edited)):
            pictures.check_frames(name, frames)
        # One of the two may have an alpha channel, and with --gpu-only one may lie on the GPU.
        source, edited = source[..., :3].cpu(), edited[..., :3].cpu()
        metrics.check_same(source, edited)
        mask = None if mask is None else _enlarged(pictures.check_mask(mask).cpu(), source.shape[1], source.shape[2])
        images = None if clip_vision is None else host.image_embeddings(clip_vision, edited)
        text = host.text_embedding(clip, prompt) if clip is not None and prompt.strip() else None
        moves = len(source) > 1
        flows = metrics.source_flows(source) if moves else None
        edited_flow = optical_flow(edited[:-1], edited[1:]) if moves else None
        figures, curves = metrics.evaluate(source, edited, images, text, mask, flows, edited_flow)
        wrong = faults(source, edited, flows, mask, edited_flow)
        table, plot, verdict = metrics.table(figures), pictures.frame_curves(curves), in_words(wrong)
        # A picture, because front ends show text only of the host's own nodes.
        rows = [("verdict", line, "") for line in verdict.splitlines()] + metrics.rows(figures)
        shown = ui.PreviewImage(pictures.table_over_plot(rows, plot), cls=cls).as_dict()
        return io.NodeOutput(table, plot, verdict, ui={**shown, **ui.PreviewText(f"{verdict}\n\n{table}").as_dict()})


def _enlarged(mask: Any, height: int, width: int) -> Any:
    """Return a mask [n, h, w] of the latent's size, as TAV Sample gives it, in the frames' size; others as they are."""
    times = height // mask.shape[-2]
    if times < 2 or (times * mask.shape[-2], times * mask.shape[-1]) != (height, width):
        return mask
    return mask.repeat_interleave(times, -2).repeat_interleave(times, -1)


NODES = [EvaluateVideo]
