"""Select the frames of a clip that are kept, and their size."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from math import isfinite

from ..errors import Refusal

START_UNITS = ("seconds", "frames")
RESIZE_MODES = ("crop to fill", "fit", "stretch", "keep")
SIDE_MULTIPLE = 8  # the VAE halves a side three times
MAX_SIDE = 16384


def check_selection(start: float, start_unit: str, frame_count: int, frame_step: int) -> None:
    """Raise Refusal for settings that no clip could meet."""
    if start_unit not in START_UNITS:
        raise Refusal("start_unit", f"{start_unit!r} is not a unit", f"Choose one of {', '.join(START_UNITS)}.")
    if not isfinite(start) or start < 0:
        raise Refusal("start", f"{start} is not a position in the clip", "Give 0 or more.")
    if frame_count < 0:
        raise Refusal("frame_count", f"{frame_count} frames cannot be kept", "Give 1 or more, or 0 for all.")
    if frame_step < 1:
        raise Refusal("frame_step", f"{frame_step} is not a step", "Give 1 for every frame, 2 for every second one.")


def select_frames(
    times: Sequence[float], end: float, start: float, start_unit: str, frame_count: int, frame_step: int
) -> list[int]:
    """Return the indices of the frames to keep: every ``frame_step``-th from ``start``, at most ``frame_count``.

    ``frame_count`` 0 keeps all. ``times``: seconds of each frame in display order; ``end``: when the last one ends.
    ``start`` in seconds takes the frame nearest to it, in frames a number from 0. Raises Refusal if no frame is left.
    """
    if start_unit == "frames":
        first = round(start)
    elif start >= end:
        first = len(times)
    else:
        first = _nearest(times, start)
    kept = list(range(first, len(times), frame_step))
    if not kept:
        raise Refusal(
            "start",
            f"no frame is left from {start:g} {start_unit} on",
            f"The clip has {len(times)} frames ({end:.2f} seconds): give an earlier start.",
        )
    return kept[:frame_count] if frame_count else kept


def _nearest(times: Sequence[float], wanted: float) -> int:
    after = bisect_left(times, wanted)
    if after == 0:
        return 0
    if after == len(times) or wanted - times[after - 1] < times[after] - wanted:
        return after - 1
    return after


def check_size(width: int, height: int, resize: str) -> None:
    """Raise Refusal for a size that the VAE cannot take; "keep" does not use width and height."""
    if resize not in RESIZE_MODES:
        raise Refusal("resize", f"{resize!r} is not a way to resize", f"Choose one of {', '.join(RESIZE_MODES)}.")
    if resize == "keep":
        return
    for name, side in (("width", width), ("height", height)):
        if not SIDE_MULTIPLE <= side <= MAX_SIDE or side % SIDE_MULTIPLE:
            near = min(max(SIDE_MULTIPLE, round(side / SIDE_MULTIPLE) * SIDE_MULTIPLE), MAX_SIDE)
            raise Refusal(
                name,
                f"{side} is a size that the VAE cannot take",
                f"Give a multiple of {SIDE_MULTIPLE} from {SIDE_MULTIPLE} to {MAX_SIDE}, for instance {near}.",
            )


def fitted_size(source: tuple[int, int], width: int, height: int, resize: str) -> tuple[int, int]:
    """Return (width, height) of the result for a source of (width, height) pixels, both multiples of 8.

    "crop to fill" and "stretch" give the asked size. "fit" scales until the picture fits inside it, each side
    rounded to the nearest multiple of 8, without bars. "keep" leaves the scale and trims each side to a
    multiple of 8. Raises Refusal if "keep" would leave nothing.
    """
    if resize == "keep":
        kept_width, kept_height = (side // SIDE_MULTIPLE * SIDE_MULTIPLE for side in source)
        if not kept_width or not kept_height:
            raise Refusal(
                "resize",
                f"the clip's {source[0]}x{source[1]} pixels are a size that the VAE cannot take",
                'Choose "crop to fill" and a width and height instead of "keep".',
            )
        return kept_width, kept_height
    if resize == "fit":
        scale = min(width / source[0], height / source[1])
        fitted = [max(1, round(side * scale / SIDE_MULTIPLE)) * SIDE_MULTIPLE for side in source]
        return fitted[0], fitted[1]
    return width, height


def source_box(source: tuple[int, int], target: tuple[int, int], resize: str) -> tuple[float, float, float, float]:
    """Return the part (left, top, right, bottom) of the source that becomes the target: centred, in source pixels.

    "stretch" takes all of it, "keep" a part of the target's size, the others the largest part that has the target's
    proportions ("fit" loses the few pixels of its rounding).
    """
    if resize == "stretch":
        return 0.0, 0.0, float(source[0]), float(source[1])
    if resize == "keep":  # on whole pixels, so that resampling leaves them as they are
        x, y = (source[0] - target[0]) // 2, (source[1] - target[1]) // 2
        return float(x), float(y), float(x + target[0]), float(y + target[1])
    scale = max(target[0] / source[0], target[1] / source[1])
    width, height = min(target[0] / scale, source[0]), min(target[1] / scale, source[1])
    left, top = (source[0] - width) / 2, (source[1] - height) / 2
    return left, top, left + width, top + height
