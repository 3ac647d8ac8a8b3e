"""EvaluateVideo and CompareVideos."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..tav_core import host
from ..tav_core.evaluation import metrics
from ..tav_core.media import pictures
from .support.memory import memory_explained
from .support.preview import FRAMES_PER_SECOND, temporary_video
from .support.types import CATEGORY, search_aliases

REMEDY = "Compare fewer frames, or make them smaller."


class EvaluateVideo(io.ComfyNode):
    """Source and edited IMAGEs -> a table of what the edit kept and how well it fits its prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="TAV_EvaluateVideo",
            display_name="Evaluate Video (Tune-A-Video)",
            category=CATEGORY,
            **search_aliases("clip score", "frame consistency", "video metrics"),
            description="Measures an edited clip: motion and background against the source; with a CLIP Vision "
            "model also how consistent its frames are, and with the matching CLIP how well they fit the prompt.",
            inputs=[
                io.Image.Input("source", tooltip="The clip that was edited, all its frames."),
                io.Image.Input("edited", tooltip="The edit, as many frames of the same size."),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip="What the edit should show. Without effect unless both CLIP inputs are connected.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="From Load CLIP Vision. The paper's figures are of OpenAI's CLIP ViT-L/14.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text half of the same CLIP, with its text projection: Load CLIP with clip_l for "
                    "ViT-L/14. A checkpoint's own CLIP has no projection.",
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Where the clip was to change; what lies outside is compared."
                ),
            ],
            outputs=[
                io.String.Output(display_name="table", tooltip="The figures, as a Markdown table."),
                io.Image.Output(
                    display_name="plot", tooltip="The figures that each frame has of its own, over frames."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    @memory_explained("source", REMEDY)
    def execute(
        cls,
        source: Any,
        edited: Any,
        prompt: str = "",
        clip_vision: Any = None,
        clip: Any = None,
        mask: Any = None,
    ) -> io.NodeOutput:
        """Refuses clips that differ in size or length, and halves of different CLIPs (ValueError)."""
        embeddings = text = None
        if clip is not None and clip_vision is None:
            raise ValueError("clip_vision: it is missing. The clip alone cannot look at frames; add Load CLIP Vision.")
        metrics.check_same(source, edited)
        if clip_vision is not None:
            embeddings = host.image_embeddings(clip_vision, edited)
            if clip is not None and prompt.strip():
                text = host.text_embedding(clip, prompt)
        found, curves = metrics.evaluate(source, edited, embeddings, text, mask)
        table, plot = metrics.table(found), pictures.frame_curves(curves)
        # A picture, because front ends show the text of core's own nodes only.
        shown = ui.PreviewImage(pictures.figures_above(metrics.rows(found), plot), cls=cls).as_dict()
        return io.NodeOutput(table, plot, ui={**shown, **ui.PreviewText(table).as_dict()})


class CompareVideos(io.ComfyNode):
    """A source and its edits, next to each other."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        edits = [
            io.Image.Input(f"edit_{index}", optional=index > 1, tooltip="An edit of the source, at the same size.")
            for index in range(1, 5)
        ]
        return io.Schema(
            node_id="TAV_CompareVideos",
            display_name="Compare Videos (Tune-A-Video)",
            category=CATEGORY,
            **search_aliases("side by side", "contact sheet", "before and after"),
            description="Puts a clip and up to four edits side by side, with captions: one video, which plays "
            "in the node, and one picture with every frame.",
            inputs=[
                io.Image.Input("source", tooltip="The clip that was edited."),
                *edits,
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    tooltip="One line for each clip, the source's first. Lines that are missing say source, edit 1, "
                    "edit 2, ...",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="video", tooltip="All clips next to each other, for Save Video."),
                io.Image.Output(display_name="contact_sheet", tooltip="One row of frames for each clip."),
            ],
            is_output_node=True,
        )

    @classmethod
    @memory_explained("source", REMEDY)
    def execute(
        cls,
        source: Any,
        edit_1: Any,
        captions: str = "",
        edit_2: Any = None,
        edit_3: Any = None,
        edit_4: Any = None,
    ) -> io.NodeOutput:
        """Refuses clips of different sizes (ValueError)."""
        given = {"source": source, "edit 1": edit_1, "edit 2": edit_2, "edit 3": edit_3, "edit 4": edit_4}
        videos = [(name, frames) for name, frames in given.items() if frames is not None]
        lines = captions.splitlines()
        named = [
            (lines[index] if index < len(lines) and lines[index].strip() else name, frames)
            for index, (name, frames) in enumerate(videos)
        ]
        together = pictures.side_by_side(named)
        shown = temporary_video(together, FRAMES_PER_SECOND, "compared")
        return io.NodeOutput(together, pictures.contact_sheet(named), ui=shown)
