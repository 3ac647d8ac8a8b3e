"""The frames of a clip, listed without decoding them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import Refusal
from .process import CannotReadError, TimeLimitError, read
from .select import MAX_SIDE

PROBE_LIMIT = 120  # seconds; packets are only listed, at the speed of the disk
MAX_FRAMES = 1_000_000  # of a clip; a few bytes of header can announce billions
# File extensions of the containers that are read (``av_reader.CONTAINERS``); web/js/upload.js repeats them.
EXTENSIONS = tuple(
    f".{name}"
    for name in "3g2 3gp apng asf avi divx f4v flv gif m1v m2t m2ts m2v m4v mk3d mkv mov mp4 mpeg mpg mts mxf ogm ogv"
    " qt ts vob webm wmv".split()
)
MAX_PIXELS = 2**26  # 8192x8192: a few bytes of header can announce pictures that fill the memory
# Browsers show pictures of gif and apng that are to last 10 ms or less for 100 ms.
_TOO_SHORT, _INSTEAD = 0.0105, 0.1  # seconds
_CONTRADICTION = 1.5  # a duration that differs from the usual one by this factor is not believed
KEY, CORRUPT, DISCARDED = 0x1, 0x2, 0x4


@dataclass(frozen=True)
class VideoInfo:
    """A clip as `probe` found it.

    ``width``, ``height``: pixels as displayed; ``fps``: mean frames a second; ``times``: seconds of each frame, in
    display order; ``end``: when the last one ends; ``tick``: seconds that times are rounded to; ``pts``: times in the
    file's unit, None if it has no usable ones; ``keys``: number and decoding time of each frame where decoding can
    begin, empty if the container does not find them exactly; ``shifts``: seconds added after each restart of the
    file's timestamps; ``plain``: whether pictures need nothing but a conversion to RGB.
    """

    path: str
    width: int
    height: int
    fps: float
    times: tuple[float, ...]
    end: float
    tick: float
    pts: tuple[int, ...] | None
    keys: tuple[tuple[int, int], ...]
    has_audio: bool
    shifts: tuple[float, ...]
    plain: bool

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    @property
    def first_group(self) -> int:
        """Count the frames of the first group of pictures; 0 if unknown."""
        return [*(key for key, _ in self.keys[1:2]), len(self.times)][0] if self.keys else 0

    def span(self, indices: Sequence[int], step: int) -> tuple[float, float]:
        """Return when frames with these indices, increasing by ``step``, begin and end, in seconds.

        The last one lasts until the next one at that step, even past the clip's end.
        """
        return self.times[indices[0]], self._time(indices[-1] + step)

    def _time(self, index: int) -> float:
        beyond = index - len(self.times)
        return self.times[index] if beyond < 0 else self.end + beyond * _last_duration(0, self.fps, self.times)


def probe(path: str | Path) -> VideoInfo:
    """List a video file's frames.

    Raises Refusal for a file that is missing, empty, no video, without a picture, too large, or cut short.
    """
    full = _existing_file(path)
    name = os.path.basename(full)
    try:
        found, table = next(read("av", "packets", PROBE_LIMIT, MAX_PIXELS, path=full, most=MAX_FRAMES + 1))
    except TimeLimitError:
        reason = f"'{name}' could not be read within {PROBE_LIMIT} seconds"
        raise Refusal("file", reason, "Cut out the part you need first.") from None
    except (CannotReadError, StopIteration) as error:
        if str(error).startswith(("ModuleNotFoundError", "ImportError")):
            raise RuntimeError(f"PyAV cannot be used ({error}). Install ComfyUI's requirements again.") from None
        raise _not_a_video(full) from None
    if not found["picture"] and found["sound"]:
        raise Refusal("file", f"'{name}' holds sound but no video", "Choose a file with a video track.")
    if not found["picture"]:
        raise _not_a_video(full)
    packets = np.frombuffer(table, np.int64).reshape(-1, 4)
    if len(packets) > MAX_FRAMES:
        raise Refusal("file", f"'{name}' has more than {MAX_FRAMES} frames", "Cut out the part you need first.")
    if found["cut"] or (len(packets) and packets[-1, 3] & CORRUPT):
        raise Refusal("file", f"'{name}' is truncated: its end is missing", "Upload or download it again.")
    width, height = found["first"]["shown"]
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise Refusal(
            "file",
            f"'{name}' is {width}x{height} pixels large",
            f"At most {MAX_SIDE} a side and {MAX_PIXELS / 1e6:.0f} million in all are read: make it smaller first.",
        )
    shown = _shown(packets, found["begin"])
    if not len(shown) or not (width and height):
        raise Refusal(
            "file",
            f"'{name}' has no frames that can be read ({len(shown)} of {width}x{height} pixels)",
            "Convert it to mp4 and try again.",
        )
    tick = found["unit"][0] / found["unit"][1]
    timed = bool((np.diff(shown[:, 0]) > 0).all())
    if timed and found["container"] in ("gif", "apng") and (shown[:, 2] * tick <= _TOO_SHORT).any():
        ends = np.where(shown[:, 2] * tick <= _TOO_SHORT, _INSTEAD, shown[:, 2] * tick).cumsum().tolist()
        times, end = [0.0, *ends[:-1]], ends[-1]
        fps = len(times) / end
    elif timed:
        times = [(int(pts) - found["origin"]) * found["unit"][0] / found["unit"][1] for pts in shown[:, 0]]
        fps = frame_rate(found["rate"], times)
        end = times[-1] + _last_duration(int(shown[-1, 2]) * tick, fps, times)
    else:  # some containers store no usable times
        fps = frame_rate(found["rate"], [])
        times, end = [number / fps for number in range(len(shown))], len(shown) / fps
    # AVI, and Matroska that wraps AVI's codecs, store decoding times only. With B-frames a decoder returns these times
    # with the wrong frames.
    ordered = timed and not (
        found["reordered"] and found["container"].startswith(("avi", "matroska")) and (np.diff(packets[:, 0]) > 0).all()
    )
    exact = ordered and found["container"].startswith(("mov", "matroska"))
    return VideoInfo(
        path=full,
        width=width,
        height=height,
        fps=fps,
        times=tuple(times),
        end=end,
        tick=tick,
        pts=tuple(shown[:, 0].tolist()) if ordered else None,
        keys=tuple((int(key), int(shown[key, 1])) for key in np.flatnonzero(shown[:, 3] & KEY) if exact),
        has_audio=found["sound"],
        shifts=tuple(found["shifts"]),
        plain=found["plain"],
    )


def _shown(packets: np.ndarray, begin: int | None) -> np.ndarray:
    """Return the rows of the frames that are displayed, in their order. ``begin``: pts of the first decoded frame."""
    # An edit list hides frames that others need for decoding.
    shown = packets[packets[:, 3] & DISCARDED == 0]
    shown = shown[np.argsort(shown[:, 0], kind="stable")]
    # Recordings of broadcasts begin with frames that lack the ones they refer to.
    if begin is not None and (shown[:, 0] == begin).any():
        shown = shown[shown[:, 0] >= begin]
    # Players show one of several frames with the same time. Many such frames mean that the file has no usable times.
    distinct = shown[np.unique(shown[:, 0], return_index=True)[1]]
    return distinct if len(distinct) > 0.9 * len(shown) else shown


def _last_duration(stated: float, fps: float, times: Sequence[float]) -> float:
    """Return the seconds of a clip's last frame: ``stated`` by the file (0: not stated), else by ``fps``.

    Browser and screen recordings may state no rate; FFmpeg then reads 1000 frames a second. So a duration much shorter
    than the median of ``times`` is replaced by it. A long one counts only if the file states it: a clip may end in a
    still.
    """
    usual = float(np.median(np.diff(times))) if len(times) > 2 else 0.0
    if not usual:
        return stated or 1 / fps
    duration, longest = (stated, float("inf")) if stated else (1 / fps, usual * _CONTRADICTION)
    return duration if usual / _CONTRADICTION < duration < longest else usual


def _not_a_video(path: str) -> Refusal:
    name = os.path.basename(path)
    with open(path, "rb") as file:
        head = file.read(12)
    if head[:4] + head[8:] == b"RIFFWEBP":
        return Refusal("file", f"'{name}' is a WebP picture, which cannot be read", "Convert it to mp4, gif or apng.")
    reason = f"'{name}' cannot be opened: it is no video, or it is truncated"
    return Refusal("file", reason, "Upload it again, or choose another file.")


def _existing_file(path: str | Path) -> str:
    name = os.path.basename(str(path)).replace("\0", "?")
    if "\0" in str(path) or not os.path.isfile(path):
        raise Refusal("file", f"'{name}' does not exist", "Upload it again, or choose another file.")
    if os.path.getsize(path) == 0:
        raise Refusal("file", f"'{name}' is empty (0 bytes)", "Upload it again, or choose another file.")
    return os.path.abspath(path)


def frame_rate(stated: Sequence[int] | None, times: Sequence[float]) -> float:
    """Return the stated rate (numerator, denominator), else that of the times, in frames a second, never 0."""
    if stated and stated[0] > 0 and stated[1] > 0:
        return stated[0] / stated[1]
    return (len(times) - 1) / (times[-1] - times[0]) if times[-1] > times[0] else 1.0
