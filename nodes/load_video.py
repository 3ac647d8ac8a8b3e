"""Load Video: part of a clip of the input folder as frames."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..tav_core import host
from ..tav_core.cancel import cancellable
from ..tav_core.errors import Refusal
from ..tav_core.media.clip import load_clip
from ..tav_core.media.probe import EXTENSIONS
from ..tav_core.media.select import MAX_SIDE, RESIZE_MODES, SIDE_MULTIPLE, START_UNITS
from .support.memory import memory_explained
from .support.types import CATEGORY, search_aliases


class LoadVideo(io.ComfyNode):
    """A part of a clip of the input folder, as frames."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        folder = folder_paths.get_input_directory()
        files = [entry.name for entry in os.scandir(folder) if entry.is_file()]
        # The system's table of types knows not all of them, and takes .ts for another's.
        known = {name for name in files if name.lower().endswith(EXTENSIONS)}
        known |= set(folder_paths.filter_files_content_types(files, ["video"]))
        return io.Schema(
            node_id="TAV_LoadVideo",
            display_name="Load Video (Tune-A-Video)",
            category=CATEGORY,
            **search_aliases("upload video", "video to frames", "video to images"),
            description="Loads part of a clip as frames, sized for the VAE, together with its sound.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=sorted(known),
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
                    options=list(START_UNITS),
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
                    min=SIDE_MULTIPLE,
                    max=MAX_SIDE,
                    step=SIDE_MULTIPLE,
                    tooltip="Width of the frames in pixels, a multiple of 8. Not used with resize keep.",
                ),
                io.Int.Input(
                    "height",
                    default=512,
                    min=SIDE_MULTIPLE,
                    max=MAX_SIDE,
                    step=SIDE_MULTIPLE,
                    tooltip="Height of the frames in pixels, a multiple of 8. Not used with resize keep.",
                ),
                io.Combo.Input(
                    "resize",
                    options=list(RESIZE_MODES),
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
        except Refusal as refusal:
            return refusal.without_input
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str | None, **others: Any) -> str:
        """Return the digest of the file's content: the same clip uploaded again must not be tuned on again."""
        # A constant where there is no file to look at: an error here would load and tune again on every run.
        try:
            path = _input_file(file)
            status = os.stat(path)
            return _digest(path, status.st_mtime_ns, status.st_size)
        except (OSError, ValueError):
            return ""

    @classmethod
    @cancellable(host.raise_if_cancelled)
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
        progress = host.progress_bar(1).update_absolute
        clip = load_clip(path, start, start_unit, frame_count, frame_step, width, height, resize, progress)
        return io.NodeOutput(clip.images, clip.fps, len(clip.images), clip.audio)


def _input_file(name: Any) -> str:
    """Return the path of a file of the input folder, or of the one that the name's end says: [output] or [temp].

    Raises Refusal if there is none, or if it lies elsewhere.
    """
    if not _is_name(name):
        raise Refusal("file", f"{name!r} is not the name of a file", "Choose one from the list or upload one.")
    # Not get_annotated_filepath, which on newer hosts has words of its own for names that lead elsewhere.
    bare, base = folder_paths.annotated_filepath(name)
    base = base or folder_paths.get_input_directory()
    path = os.path.realpath(os.path.join(base, bare))
    kind = next((kind for kind in ("output", "temp") if name.endswith(f"[{kind}]")), "input")
    if not Path(path).is_relative_to(os.path.realpath(base)):
        raise Refusal("file", f"'{name}' is outside the {kind} folder", "Copy it there, or upload it.")
    if not os.path.isfile(path):
        raise Refusal("file", f"'{name}' is not in the {kind} folder", "Upload it, or choose another one.")
    return path


@lru_cache(maxsize=256)
def _digest(path: str, mtime_ns: int, size: int) -> str:
    """Return the SHA-256 of a file, computed again only when its time or size has changed."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _is_name(name: Any) -> bool:
    """Tell whether a file can have this name: text without NUL and without half a character."""
    try:
        return isinstance(name, str) and name != "" and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


NODES = [LoadVideo]
