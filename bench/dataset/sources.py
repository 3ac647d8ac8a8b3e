"""Frames and masks of a data set at the size of the study."""

from __future__ import annotations

import re
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
# A grey mask whose brightest level is this or less numbers objects.
_MOST_OBJECTS = 32


def load(path: Path, first: int, step: int, count: int, size: tuple[int, int], mask: bool = False) -> results.Pixels:
    """Load ``count`` frames (0: all) of a folder of pictures or a video file at ``size`` (width, height).

    The result is [n, h, w, 3] in 0..255; of a ``mask`` [n, h, w], 255 in the region and 0 outside. Raises Refusal for a
    clip that cannot be read or has no such frames.
    """
    if path.is_file():
        images = load_clip(path, float(first), "frames", count, step, *size, _CROP).images
        pixels = (images * 255).round().byte().numpy()
        # Black is not quite black in a compressed video.
        return np.where(pixels.max(-1) > 127, 255, 0).astype(np.uint8) if mask else pixels
    files = pictures_of(path)[first::step][: count or None]
    if not files:
        raise Refusal("frames", f"{path.name} has no frame {first}", "Choose an earlier one.")
    return np.stack([_picture(file, size, mask) for file in files])


def load_mask(row: Row, frames: int, size: tuple[int, int]) -> results.Pixels:
    """Load the mask of a row's ``frames`` frames as [frames, h, w].

    One mask is for all frames. Pictures belong to the frames of their place, or where some frames have none, to those
    of their number. Raises Refusal where a frame of the clip has no mask.
    """
    assert row.mask is not None
    if row.mask.is_dir():
        masks = pictures_of(row.mask)
        clip = pictures_of(row.frames) if row.frames.is_dir() else None
        if len(masks) > 1 and clip is not None and len(masks) != len(clip):
            by_number = {_number(file): file for file in masks}
            chosen = clip[row.first :: row.step][:frames]
            missing = next((file.name for file in chosen if _number(file) not in by_number), None)
            if missing is not None:
                raise Refusal("mask", f"{row.mask.name} has none for {missing}", "Give one for all or one a frame.")
            return np.stack([_picture(by_number[_number(file)], size, mask=True) for file in chosen])
        chosen = masks if len(masks) == 1 else masks[row.first :: row.step][:frames]
        found = np.stack([_picture(file, size, mask=True) for file in chosen]) if chosen else np.empty((0, *size))
    else:
        found = load(row.mask, row.first, row.step, frames, size, mask=True)
    if len(found) not in (1, frames):
        raise Refusal("mask", f"{row.mask.name} has {len(found)} frames, the clip {frames}", "Give one a frame.")
    return np.broadcast_to(found, (frames, *found.shape[1:]))


def _number(file: Path) -> int | str:
    """Return the last number in a picture's name, or the name."""
    digits = re.findall(r"\d+", file.stem)
    return int(digits[-1]) if digits else file.stem


def _picture(file: Path, size: tuple[int, int], mask: bool) -> results.Pixels:
    try:
        with Image.open(file) as picture:
            if picture.width * picture.height > _MOST_PIXELS:
                raise Refusal("frames", f"{file} has more than {_MOST_PIXELS} pixels", "Make it smaller.")
            target = fitted_size(picture.size, *size, _CROP)
            box = source_box(picture.size, target, _CROP)
            if not mask:
                return np.asarray(picture.convert("RGB").resize(target, Image.Resampling.LANCZOS, box=box))
            # Palettes number objects, and so do a few levels of grey near black; every object but the background, 0,
            # belongs to the edited region.
            levels = picture if picture.mode == "P" else picture.convert("L")
            resized = np.asarray(levels.resize(target, Image.Resampling.NEAREST, box=box))
            is_numbered = picture.mode == "P" or picture.format != "JPEG" and levels.getextrema()[1] <= _MOST_OBJECTS
            return np.where(resized > (0 if is_numbered else 127), 255, 0).astype(np.uint8)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, Refusal):
            raise
        raise Refusal("frames", f"{file} cannot be read ({error})", "Convert it again.") from error


def keep(output: Path, row: Row, frames: int, size: tuple[int, int]) -> None:
    """Put the frames and the mask of a row's clip into the study's folder, unless they are there.

    ``frames``: how many at most, 0 for as many as the row says. Raises Refusal for a clip that cannot be read.
    """
    clip = output / "source" / results.clip_id(row)
    if not clip.is_dir():
        results.write_frames(clip, load(row.frames, row.first, row.step, frames or row.count, size), ".png")
    mask = results.mask_folder(output, row)
    if mask is not None and not mask.is_dir():
        results.write_frames(mask, load_mask(row, len(pictures_of(clip)), size), ".png")
