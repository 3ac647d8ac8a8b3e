"""Frames of a clip as images: decord where it is exact, else PyAV."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import psutil
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ..errors import Refusal
from ..out_of_memory import mentions_oom
from .colour import Colours, to_bt709_
from .probe import VideoInfo
from .process import CannotReadError, read
from .select import fitted_size, source_box

DECODE_LIMIT = 900  # seconds

Progress = Callable[[int, int], None]  # frames done, frames in all; may raise to stop
Frames = Generator[tuple[dict[str, Any], np.ndarray], None, None]  # a picture's header, [h, w, 3] uint8 or uint16


def read_frames(
    info: VideoInfo, indices: Sequence[int], width: int, height: int, resize: str, progress: Progress | None = None
) -> Tensor:
    """Decode the frames with these indices (increasing by one step): [F, H, W, 3] float32 in 0..1, as BT.709.

    Each frame is resized as it is decoded (Lanczos, antialiased), so that only the result is held in memory. Where
    size or shape change midway, the first frame's hold. Raises Refusal if the result would not fit in memory, or if
    the file's frames cannot be decoded, MemoryError if the decoder itself ran out of memory.
    """
    _check_memory(len(indices), fitted_size((info.width, info.height), width, height, resize))
    done, reason = 0, ""
    for reader in (decord_frames, av_frames):
        done = 0
        colours: dict[Colours, list[int]] = {}
        try:
            with closing(reader(info, indices)) as frames:
                for header, frame in frames:
                    shown = header["shown"][0], header["shown"][1]
                    if not done:
                        first, target = shown, fitted_size(shown, width, height, resize)
                        images = torch.empty(len(indices), target[1], target[0], 3)
                    # "keep" is the first frame's size: others are scaled to it.
                    mode = "crop to fill" if resize == "keep" and shown != first else resize
                    box = source_box(shown, target, mode)
                    x, y = header["width"] / shown[0], header["height"] / shown[1]
                    images[done] = resized(frame, target, (box[0] * x, box[1] * y, box[2] * x, box[3] * y))
                    if "transfer" in header:
                        colours.setdefault((header["transfer"], header["primaries"]), []).append(done)
                    done += 1
                    if progress:
                        progress(done, len(indices))
            for tags, numbers in colours.items():
                to_bt709_(images, numbers, *tags)
            return images
        except CannotReadError as error:
            reason = str(error)
            logging.info("Tune-A-Video: %s: %s leaves it to the next reader (%s)", info.name, reader.__name__, reason)
    if mentions_oom(reason):
        raise MemoryError(reason)
    raise Refusal(
        "file",
        f"'{info.name}' is damaged or truncated: {done} of the {len(indices)} wanted frames could be decoded",
        "Convert it again, or choose a part that plays.",
    )


def _check_memory(count: int, size: tuple[int, int]) -> None:
    needed = count * size[0] * size[1] * 3 * 4
    available = psutil.virtual_memory().available
    if needed > available:
        raise Refusal(
            "frame_count",
            f"{count} frames of {size[0]}x{size[1]} need {needed / 2**30:.1f} GiB of memory, and"
            f" {available / 2**30:.1f} GiB are free",
            "Keep fewer frames or make them smaller.",
        )


def resized(frame: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float]) -> Tensor:
    """Scale the part ``box`` of a frame [h, w, 3], uint8 or uint16, to (width, height): [height, width, 3] in 0..1."""
    if frame.dtype == np.uint8:
        picture = Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS, box=box)
        return torch.from_numpy(np.array(picture)).float().div_(255)
    channels = rearrange(frame.astype(np.float32), "h w c -> c h w")
    scaled = [Image.fromarray(each).resize(size, Image.Resampling.LANCZOS, box=box) for each in channels]
    return torch.from_numpy(rearrange(np.array(scaled), "c h w -> h w c")).div_(65535).clamp_(0, 1)


def decord_frames(info: VideoInfo, indices: Sequence[int]) -> Frames:
    """Yield frames by decord. Raises CannotReadError where it is not installed or not exact.

    Its FFmpeg is of 2018, and it scales every picture to the size of the first: later groups of pictures, which may
    have another size, and all that takes more than a conversion to RGB are left to PyAV.
    """
    if importlib.util.find_spec("decord") is None:  # there is none for this platform
        raise CannotReadError("decord is not installed")
    if not info.plain or indices[-1] >= info.first_group:
        raise CannotReadError("it may not be exact")
    wanted = [indices[0], indices[-1] + 1, indices[1] - indices[0] if len(indices) > 1 else 1]
    size = {"width": info.width, "height": info.height}
    yield from _frames(info, "decord", len(indices), count=len(info.times), wanted=wanted, **size)


def av_frames(info: VideoInfo, indices: Sequence[int]) -> Frames:
    """Yield the same frames by PyAV, from the last key frame before them on."""
    key = max((key for key in info.keys if key[0] <= indices[0]), default=(0, 0))
    wanted = list(indices) if info.pts is None else [info.pts[index] for index in indices]
    timed, seek = info.pts is not None, key[1] if key[0] else None
    yield from _frames(info, "av", len(indices), wanted=wanted, timed=timed, seek=seek)


def _frames(info: VideoInfo, library: str, expected: int, **arguments: object) -> Frames:
    picture_bytes = info.width * info.height * 6
    done = 0
    for header, pixels in read(library, "frames", DECODE_LIMIT, picture_bytes, path=info.path, **arguments):
        shape = header["height"], header["width"], 3
        yield header, np.frombuffer(pixels, np.uint16 if "transfer" in header else np.uint8).reshape(shape)
        done += 1
    if done < expected:
        raise CannotReadError("it ends early")
