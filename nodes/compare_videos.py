"""Compare Videos: a source and its edits side by side."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from comfy_api.latest import io

from ..tav_core import host
from ..tav_core.cancel import cancellable
from ..tav_core.media import pictures
from .support.limits import within_limits
from .support.memory import memory_explained
from .support.preview import FRAMES_PER_SECOND, temporary_video
from .support.types import CATEGORY, search_aliases


class CompareVideos(io.ComfyNode):
    """Source and edited IMAGEs -> one video and one contact sheet."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        edits = [
            io.Image.Input(f"edit_{index}", optional=index > 1, tooltip="An edit of the source, of the same size.")
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
                    tooltip="One line for each clip, the source first. Missing lines become source, edit 1, "
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
    @cancellable(host.raise_if_cancelled)
    @memory_explained("source", "Compare fewer frames, or make them smaller.")
    @within_limits
    def execute(
        cls,
        source: Any,
        edit_1: Any,
        captions: str = "",
        edit_2: Any = None,
        edit_3: Any = None,
        edit_4: Any = None,
    ) -> io.NodeOutput:
        """Place the clips. Raises Refusal for clips of different sizes, and for what is no clip."""
        given = {"source": source, "edit 1": edit_1, "edit 2": edit_2, "edit 3": edit_3, "edit 4": edit_4}
        clips = [(name, frames) for name, frames in given.items() if frames is not None]
        for name, frames in clips:
            pictures.check_frames(name, frames)
        lines = [line if line.strip() else None for line in captions.splitlines()]
        captioned = [(line or name, frames) for (name, frames), line in zip_longest(clips, lines[: len(clips)])]
        video = pictures.side_by_side(captioned)
        sheet = pictures.contact_sheet(captioned)
        return io.NodeOutput(video, sheet, ui=temporary_video(video, FRAMES_PER_SECOND, "compared"))


NODES = [CompareVideos]
