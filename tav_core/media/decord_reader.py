"""Reads frames with decord, in the process of ``reader.py``: a damaged clip can end the process that decord is in."""

from collections.abc import Iterator
from typing import Any

import decord


def frames(path: str, width: int, height: int, count: int, wanted: list[int]) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield the frames ``range(*wanted)`` of a clip of ``count`` frames as rgb24.

    Raises ValueError if decord counts other frames or gives another size.
    """
    reader = decord.VideoReader(path, num_threads=1)
    # It also counts the frames that an edit list hides, and loses the first ones of some containers.
    if len(reader) != count:
        raise ValueError("its frame numbers would be wrong")
    # Read on from frame to frame: where a clip's groups of frames are open (HEVC's default), decord's own access
    # by number, and its skip_frames, give a frame some numbers off, without an error.
    numbers = range(*wanted)
    for index in range(numbers[-1] + 1):
        frame = reader.next()
        if index not in numbers:
            continue
        pixels = frame.asnumpy()
        if pixels.shape != (height, width, 3):
            raise ValueError(f"a frame of {pixels.shape[1]}x{pixels.shape[0]}")
        yield {"width": width, "height": height, "shown": [width, height]}, pixels.tobytes()
