"""LoadVideo and SaveVideo: clips between files and the graph."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import folder_paths
from comfy.cli_args import args
from comfy.utils import ProgressBar
from comfy_api.latest import InputImpl, io, ui
from torch import Tensor

from ..tav_core.media import video
from .support.limits import check_limits
from .support.memory import memory_explained
from .support.paths import check_target, disk_explained, next_name
from .support.preview import temporary_video
from .support.types import CATEGORY, search_aliases

_PREFIX, _OPTION = "TuneAVideo/video", "--output-directory"


class LoadVideo(io.ComfyNode):
    """A part of a clip of the input folder, as frames."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        folder = folder_paths.get_input_directory()
        files = [entry.name for entry in os.scandir(folder) if entry.is_file()]
        return io.Schema(
            node_id="TAV_LoadVideo",
            display_name="Load Video (Tune-A-Video)",
            category=CATEGORY,
            **search_aliases("upload video", "video to frames", "video to images"),
            description="Loads part of a clip as frames, sized for the VAE, together with its sound.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=sorted(folder_paths.filter_files_content_types(files, ["video"])),
                    upload=io.UploadType.video,
                    tooltip="A video of the input folder. Upload one with the button, or drop it here.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1e6,
                    step=0.01,
                    tooltip="Where the kept part begins, in the unit below: 0 is the beginning of the clip.",
                ),
                io.Combo.Input(
                    "start_unit",
                    options=list(video.START_UNITS),
                    default="seconds",
                    tooltip="Whether start counts seconds (the nearest frame is taken) or frames.",
                ),
                io.Int.Input(
                    "frame_count",
                    default=24,
                    min=0,
                    max=1_000_000,
                    tooltip="How many frames to keep, 0 for all. If the clip has fewer left, those are taken."
                    " The paper tunes on 24; memory and time grow with it.",
                ),
                io.Int.Input(
                    "frame_step",
                    default=1,
                    min=1,
                    max=1_000,
                    tooltip="Keep every n-th frame: 2 takes every second one, which covers twice the time at"
                    " half the frame rate.",
                ),
                io.Int.Input(
                    "width",
                    default=512,
                    min=video.SIDE_MULTIPLE,
                    max=video.MAX_SIDE,
                    step=video.SIDE_MULTIPLE,
                    tooltip="Width of the frames in pixels, a multiple of 8. Not used with resize keep.",
                ),
                io.Int.Input(
                    "height",
                    default=512,
                    min=video.SIDE_MULTIPLE,
                    max=video.MAX_SIDE,
                    step=video.SIDE_MULTIPLE,
                    tooltip="Height of the frames in pixels, a multiple of 8. Not used with resize keep.",
                ),
                io.Combo.Input(
                    "resize",
                    options=list(video.RESIZE_MODES),
                    default="crop to fill",
                    tooltip="crop to fill: scaled to cover width x height, what sticks out is cut off evenly."
                    " fit: scaled to fit inside it, without bars, sides rounded to multiples of 8."
                    " stretch: distorted to it."
                    " keep: the clip's own size, trimmed by up to 7 pixels a side to multiples of 8.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The frames, as a batch of images."),
                io.Float.Output(
                    display_name="fps",
                    tooltip="Frames a second of the kept frames: the clip's rate / frame_step.",
                ),
                io.Int.Output(display_name="frame_count", tooltip="How many frames were kept."),
                io.Audio.Output(
                    display_name="audio",
                    tooltip="The sound of the kept part. Nothing if the clip has no sound.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None) -> bool | str:
        if file is None:  # linked: known, and checked, when the node runs
            return True
        try:
            _input_file(file)
        except ValueError as error:
            return str(error).removeprefix("file: ")  # the host names the input itself
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str | None, **others: Any) -> str:
        """The file's content: the same clip uploaded again must not be tuned and inverted again."""
        # A constant where there is no file to look at: an error here would load and tune anew on every run.
        try:
            path = _input_file(file)
            status = os.stat(path)
            return _digest(path, status.st_mtime_ns, status.st_size)
        except (OSError, ValueError):
            return ""

    @classmethod
    @memory_explained("frame_count", "Keep fewer frames, or make them smaller.")
    def execute(
        cls,
        file: str,
        start: float,
        start_unit: str,
        frame_count: int,
        frame_step: int,
        width: int,
        height: int,
        resize: str,
    ) -> io.NodeOutput:
        path = _input_file(file)
        progress = ProgressBar(1).update_absolute
        clip = video.load_clip(path, start, start_unit, frame_count, frame_step, width, height, resize, progress)
        return io.NodeOutput(clip.images, clip.fps, len(clip.images), clip.audio)


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
                    options=list(video.FORMATS),
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
    @memory_explained("images", "Save fewer frames at a time, or make them smaller.")
    def execute(
        cls,
        images: Tensor,
        fps: float,
        filename_prefix: str,
        format: str,
        quality: int,
        audio: video.Audio | None = None,
    ) -> io.NodeOutput:
        check_limits(cls, fps=fps, format=format, quality=quality)
        height, width = images.shape[1:3] if images.ndim == 4 else (0, 0)
        root = folder_paths.get_output_directory()
        with disk_explained(_OPTION):
            folder, name, subfolder = next_name(filename_prefix, root, _PREFIX, width, height)
            path = Path(folder, f"{name}.{format}").absolute()
            metadata = {} if args.disable_metadata else _workflow(cls.hidden)
            video.save_clip(images, fps, path, quality, audio, metadata, ProgressBar(1).update_absolute)
        saved = ui.SavedResult(path.name, subfolder, io.FolderType.output)
        if format == "gif":
            with disk_explained("--temp-directory"):
                preview = _gif_preview(images, fps, saved)
        else:
            preview = ui.PreviewVideo([saved])
        return io.NodeOutput(InputImpl.VideoFromFile(str(path)), str(path), ui=preview)


def _input_file(name: Any) -> str:
    """The path of a file of the input folder. Raises ValueError if there is none, or if it lies elsewhere."""
    if not _is_name(name):
        raise ValueError(f"file: {name!r} is not the name of a file; choose one from the list or upload one.")
    folder = os.path.realpath(folder_paths.get_input_directory())
    path = os.path.realpath(folder_paths.get_annotated_filepath(name))
    if not Path(path).is_relative_to(folder):
        raise ValueError(f"file: '{name}' is outside the input folder; copy it there, or upload it.")
    if not os.path.isfile(path):
        raise ValueError(f"file: '{name}' is not in the input folder; upload it again, or choose another one.")
    return path


@lru_cache(maxsize=256)
def _digest(path: str, mtime_ns: int, size: int) -> str:
    """SHA-256 of a file, read again only when its time or size has changed."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _is_name(name: Any) -> bool:
    """Whether the file system could know a file by it: not so with NUL, or half a character, in it."""
    try:
        return isinstance(name, str) and name != "" and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def _workflow(hidden: Any) -> dict[str, Any]:
    metadata = dict(hidden.extra_pnginfo or {})
    if hidden.prompt is not None:
        metadata["prompt"] = hidden.prompt
    return metadata


def _gif_preview(images: Tensor, fps: float, saved: ui.SavedResult) -> dict[str, Any]:
    """What the node shows for a gif. The front end takes every animated result but webp and png for a video, and
    a browser does not play a gif as one: so it gets a temporary mp4, and the file itself goes under "gifs"."""
    shown = temporary_video(images, fps, f"{Path(saved.filename).stem}preview")
    return {**shown.as_dict(), "gifs": [saved]}
