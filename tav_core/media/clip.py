"""Part of a video file as frames and sound."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .decode import Progress, read_frames
from .probe import probe
from .select import check_selection, check_size, select_frames
from .sound import Audio, read_audio


@dataclass(frozen=True)
class Clip:
    """images [F, H, W, 3] float32 in 0..1, fps after stepping, the sound of the kept span or None."""

    images: Tensor
    fps: float
    audio: Audio | None


def load_clip(
    path: str | Path,
    start: float = 0.0,
    start_unit: str = "seconds",
    frame_count: int = 24,
    frame_step: int = 1,
    width: int = 512,
    height: int = 512,
    resize: str = "crop to fill",
    progress: Progress | None = None,
) -> Clip:
    """Read part of a video file.

    See `select_frames` for start, frame_count and frame_step, `fitted_size` for width, height and resize. If
    fewer frames are left than asked for, those that are left are taken. Raises Refusal for a file that cannot be read
    and for settings that cannot be met.
    """
    check_selection(start, start_unit, frame_count, frame_step)
    check_size(width, height, resize)
    info = probe(path)
    indices = select_frames(info.times, info.end, start, start_unit, frame_count, frame_step)
    if len(indices) < frame_count:
        logging.warning(
            "%s: %d frames are left after start and frame_step, fewer than frame_count %d",
            info.name,
            len(indices),
            frame_count,
        )
    images = read_frames(info, indices, width, height, resize, progress)
    begin, end = info.span(indices, frame_step)
    fps = len(indices) / (end - begin)
    stated = info.fps / frame_step
    # Times are rounded: a rate that agrees with them is the exact one.
    if abs(len(indices) / stated - (end - begin)) <= 1.5 * info.tick:
        fps = stated
    audio = read_audio(info, begin, len(indices) / fps) if info.has_audio else None
    return Clip(images, fps, audio)
