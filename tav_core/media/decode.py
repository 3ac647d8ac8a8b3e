"""Frames of a clip as images: decord where it is exact, else PyAV."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import closing

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor

from ..errors import Refusal
from ..out_of_memory import mentions_oom
from .probe import VideoInfo
from .process import CannotReadError, read
from .select import fitted_size, source_box

DECODE_LIMIT = 900  # seconds
MAX_PASSED_OVER = 300  # frames; above that PyAV, which can jump to a key frame, is the faster reader

Progress = Callable[[int, int], None]  # frames done, frames in all; may raise to stop
Frames = Generator[np.ndarray, None, None]  # [h, w, 3] uint8


def read_frames(
    info: VideoInfo, indices: Sequence[int], width: int, height: int, resize: str, progress: Progress | None = None
) -> Tensor:
    """Decode the frames with these indices (increasing by one step): [F, H, W, 3] float32 in 0..1.

    Each frame is resized as it is decoded (Lanczos, antialiased), so that only the result is held in memory.
    Raises Refusal if the result would not fit in memory, or if the file's frames cannot be decoded, MemoryError
    if the decoder itself ran out of memory.
    """
    source = info.width, info.height
    target = fitted_size(source, width, height, resize)
    _check_memory(len(indices), target)
    box = source_box(source, target, resize)
    images = torch.empty(len(indices), target[1], target[0], 3)
    done, reason = 0, ""
    for reader in (decord_frames, av_frames):
        done = 0
        try:
            with closing(reader(info, indices)) as frames:
                for frame in frames:
                    resized = Image.fromarray(frame).resize(target, Image.Resampling.LANCZOS, box=box)
                    images[done] = torch.from_numpy(np.array(resized)).float().div_(255)
                    done += 1
                    if progress:
                        progress(done, len(indices))
            return images
        except CannotReadError as error:
            reason = str(error)
            logging.info("%s: %s does not read it (%s)", info.name, reader.__name__, reason)
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


def decord_frames(info: VideoInfo, indices: Sequence[int]) -> Frames:
    """Yield frames by decord. Raises CannotReadError where it is not installed, not exact, or slow."""
    if importlib.util.find_spec("decord") is None:  # there is none for this platform
        raise CannotReadError("decord is not installed")
    if not info.keys:
        raise CannotReadError("its frame numbers would be wrong")
    passed_over = indices[-1] + 1 - len(indices)
    if passed_over > MAX_PASSED_OVER:
        raise CannotReadError(f"{passed_over} frames would be decoded in vain")
    wanted = [indices[0], indices[-1] + 1, indices[1] - indices[0] if len(indices) > 1 else 1]
    yield from _frames(
        info, "decord", len(indices), width=info.width, height=info.height, count=len(info.times), wanted=wanted
    )


def av_frames(info: VideoInfo, indices: Sequence[int]) -> Frames:
    """Yield the same frames by PyAV, from the last key frame before them on."""
    key = max((key for key in info.keys if key[0] <= indices[0]), default=(0, 0))
    wanted = list(indices) if info.pts is None else [info.pts[index] for index in indices]
    yield from _frames(
        info, "av", len(indices), wanted=wanted, timed=info.pts is not None, seek=key[1] if key[0] else None
    )


def _frames(info: VideoInfo, library: str, expected: int, **arguments: object) -> Frames:
    picture_bytes = info.width * info.height * 3
    done = 0
    for header, pixels in read(library, "frames", DECODE_LIMIT, picture_bytes, path=info.path, **arguments):
        size = header["height"], header["width"]
        if size != (info.height, info.width):
            raise CannotReadError(f"a frame of {size[1]}x{size[0]}")
        yield np.frombuffer(pixels, np.uint8).reshape(*size, 3)
        done += 1
    if done < expected:
        raise CannotReadError("it ends early")
