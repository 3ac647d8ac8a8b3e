"""Frames and masks of a data set at the size of the study."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from tune_a_video.tav_core.errors import Refusal
from tune_a_video.tav_core.media.clip import load_clip
from tune_a_video.tav_core.media.select import fitted_size, source_box

from . import results
from .layouts import Row, pictures_of

_CROP = "crop to fill"
# A picture of more pixels is none of a video.
_MOST_PIXELS = 2**26


def load(path: Path, first: int, step: int, count: int, size: tuple[int, int], mask: bool = False) -> results.Pixels:
    """Load ``count`` frames (0: all) of a folder of pictures or a video file at ``size`` (width, height).

    The result is [n, h, w, 3] in 0..255; of a ``mask`` [n, h, w], 255 where it is not black. Raises Refusal for a clip
    that cannot be read or has no such frames.
    """
    if path.is_file():
        images = load_clip(path, float(first), "frames", count, step, *size, _CROP).images
        pixels = (images * 255).round().byte().numpy()
        return np.where(pixels.max(-1) > 0, 255, 0).astype(np.uint8) if mask else pixels
    files = pictures_of(path)[first::step][: count or None]
    if not files:
        raise Refusal("frames", f"{path.name} has no frame {first}", "Choose an earlier one.")
    return np.stack([_picture(file, size, mask) for file in files])


def _picture(file: Path, size: tuple[int, int], mask: bool) -> results.Pixels:
    try:
        with Image.open(file) as picture:
            if picture.width * picture.height > _MOST_PIXELS:
                raise Refusal("frames", f"{file} has more than {_MOST_PIXELS} pixels", "Make it smaller.")
            target = fitted_size(picture.size, *size, _CROP)
            box = source_box(picture.size, target, _CROP)
            if not mask:
                return np.asarray(picture.convert("RGB").resize(target, Image.Resampling.LANCZOS, box=box))
            # Palettes number objects; every object but the background, 0, belongs to the edited region.
            levels = picture if picture.mode == "P" else picture.convert("L")
            resized = np.asarray(levels.resize(target, Image.Resampling.NEAREST, box=box))
            return np.where(resized > (0 if picture.mode == "P" else 127), 255, 0).astype(np.uint8)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, Refusal):
            raise
        raise Refusal("frames", f"{file} cannot be read ({error})", "Convert it again.") from error


def keep(output: Path, row: Row, frames: int, size: tuple[int, int]) -> None:
    """Put the frames and the mask of a row's clip into the study's folder, unless they are there.

    ``frames``: how many at most, 0 for as many as the row says. Raises Refusal for a clip that cannot be read.
    """
    place = results.clip_id(row)
    clip = output / "source" / place
    if not clip.is_dir():
        results.write_frames(clip, load(row.frames, row.first, row.step, frames or row.count, size), ".png")
    mask = output / "mask" / place
    if row.mask is not None and not mask.is_dir():
        found = load(row.mask, row.first, row.step, frames or row.count, size, mask=True)
        count = len(pictures_of(clip))
        if len(found) not in (1, count):
            raise Refusal("mask", f"{row.mask.name} has {len(found)} frames, the clip {count}", "Give one a frame.")
        results.write_frames(mask, np.broadcast_to(found, (count, *found.shape[1:])), ".png")
