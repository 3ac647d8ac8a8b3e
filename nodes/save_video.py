"""Save Video: frames as a video file in the output folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import InputImpl, io, ui
from torch import Tensor

from ..tav_core import host
from ..tav_core.cancel import cancellable
from ..tav_core.media.encode import FORMATS, save_clip
from ..tav_core.media.sound import Audio
from .support.limits import within_limits
from .support.memory import memory_explained
from .support.paths import check_target, disk_explained, next_name
from .support.preview import temporary_video
from .support.types import CATEGORY, search_aliases

_PREFIX, _OPTION = "TuneAVideo/video", "--output-directory"


class SaveVideo(io.ComfyNode):
    """Frames as a video file in the output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TAV_SaveVideo",
            display_name="Save Video (Tune-A-Video)",
            category=CATEGORY,
            **search_aliases("video combine", "export mp4", "save gif", "images to video"),
            description="Saves frames as mp4, webm or gif in the output folder and plays them in the node. mp4"
            " and webm files hold the workflow: drop one on the canvas to get it back.",
            inputs=[
                io.Image.Input("images", tooltip="The frames, as a batch of images."),
                io.Float.Input(
                    "fps",
                    default=8.0,
                    min=0.01,
                    max=1000.0,
                    step=0.01,
                    tooltip="Frames a second. Connect fps of Load Video to keep the clip's speed."
                    " gif takes 50 at most.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default=_PREFIX,
                    tooltip="Folder and beginning of the name inside the output folder; a number is added.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default="mp4",
                    tooltip="mp4 (H.264) plays everywhere. webm is VP9. gif has 256 colours and no sound; dropping"
                    " it on the canvas does not restore the workflow (it is in the file, as a comment).",
                ),
                io.Int.Input(
                    "quality",
                    default=80,
                    min=0,
                    max=100,
                    tooltip="0 (small file) to 100 (best picture); 80 is hard to tell from the original."
                    " gif does not use it.",
                ),
                io.Audio.Input(
                    "audio",
                    optional=True,
                    tooltip="Sound to go with it, cut to the length of the video. Not for gif.",
                ),
            ],
            outputs=[
                io.Video.Output(display_name="video", tooltip="The saved file, for nodes that take a video."),
                io.String.Output(display_name="path", tooltip="The absolute path of the saved file."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None) -> bool | str:
        return check_target(filename_prefix, folder_paths.get_output_directory(), _PREFIX, _OPTION)

    @classmethod
    @cancellable(host.raise_if_cancelled)
    @memory_explained("images", "Save fewer frames at a time, or make them smaller.")
    @within_limits
    def execute(
        cls,
        images: Tensor,
        fps: float,
        filename_prefix: str,
        format: str,
        quality: int,
        audio: Audio | None = None,
    ) -> io.NodeOutput:
        height, width = images.shape[1:3] if images.ndim == 4 else (0, 0)
        root = folder_paths.get_output_directory()
        with disk_explained(_OPTION):
            folder, name, subfolder = next_name(filename_prefix, root, _PREFIX, width, height)
            path = Path(folder, f"{name}.{format}").absolute()
            metadata = _workflow(cls.hidden) if host.saves_workflows() else {}
            save_clip(images, fps, path, quality, audio, metadata, host.progress_bar(1).update_absolute)
        saved = ui.SavedResult(path.name, subfolder, io.FolderType.output)
        if format == "gif":
            with disk_explained("--temp-directory"):
                preview = _gif_preview(images, fps, saved)
        else:
            preview = ui.PreviewVideo([saved])
        return io.NodeOutput(InputImpl.VideoFromFile(str(path)), str(path), ui=preview)


def _workflow(hidden: Any) -> dict[str, Any]:
    metadata = dict(hidden.extra_pnginfo or {})
    if hidden.prompt is not None:
        metadata["prompt"] = hidden.prompt
    return metadata


def _gif_preview(images: Tensor, fps: float, saved: ui.SavedResult) -> dict[str, Any]:
    """Return what the node shows for a gif: a temporary mp4, and the file itself under "gifs".

    The front end takes every animated result but webp and png for a video, and a browser plays no gif as one.
    """
    shown = temporary_video(images, fps, f"{Path(saved.filename).stem}preview")
    return {**shown.as_dict(), "gifs": [saved]}


NODES = [SaveVideo]
