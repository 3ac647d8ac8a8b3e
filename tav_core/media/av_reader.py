"""Reads clips with PyAV, in the process of ``reader.py``."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

import av
import av.logging
import numpy as np
from av.error import FFmpegError

# A text file with a video's name may be a playlist that names other files or addresses: only real containers
# are opened, and only from the disk.
CONTAINERS = "asf,avi,flv,gif,matroska,mov,mpeg,mpegts,mpegvideo,mxf,ogg"
MAX_PIXELS = 2**26  # 8192x8192: a few bytes of header can announce pictures that fill the memory
KEY, CORRUPT, DISCARDED = 0x1, 0x2, 0x4
_CUT_SHORT = ("partial file", "ended prematurely")
_COVERS = 0x400 | 0x800  # AV_DISPOSITION_ATTACHED_PIC, AV_DISPOSITION_TIMED_THUMBNAILS
_THREADS = 4
_FIRST_PACKETS = 100  # that may pass before the first frame
_PREROLL = 0.25  # seconds that sound decoders need before what they give is right

# FFmpeg's AVColorSpace -> the matrix that swscale is told. BT.601 for all others, as swscale has it.
_MATRICES = {1: "ITU709", 4: "FCC", 7: "SMPTE240M", 9: "BT2020", 10: "BT2020"}
_FULL_RANGE = 2
_FULL_RANGE_FORMATS = ("yuvj", "gray", "ya")

Results = Iterator[tuple[dict[str, Any], bytes]]


def _open(path: str) -> Any:
    # Without the scheme, a colon in a name would be taken for one.
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file", "max_pixels": str(MAX_PIXELS)}
    return av.open(f"file:{path}", options=options, metadata_errors="replace")


def _picture_stream(container: Any) -> Any:
    """Return the first video stream that is no cover and has a decoder, or None."""
    streams = [each for each in container.streams.video if not each.disposition.value & _COVERS]
    return streams[0] if streams else None


def packets(path: str, most: int) -> Results:
    """Yield once what a clip's headers say, with pts, dts and flags of its packets as int64, at most ``most``."""
    av.logging.set_level(av.logging.WARNING)
    with av.logging.Capture(local=False) as log, _open(path) as container:
        stream = _picture_stream(container)
        found: dict[str, Any] = {
            "container": container.format.name,
            "sound": any(each.type == "audio" for each in container.streams),
            "picture": stream is not None,
        }
        table = array("q")
        if stream is not None:
            with suppress(FFmpegError):  # the log says what
                for packet in islice(container.demux(stream), most):
                    if packet.size:
                        table.extend(_packet_row(packet))
            found |= _described(path, stream, container)
        yield {**found, "cut": any(mark in line for _, _, line in log for mark in _CUT_SHORT)}, table.tobytes()


def _packet_row(packet: Any) -> tuple[int, int, int]:
    pts = packet.dts if packet.pts is None else packet.pts
    dts = packet.pts if packet.dts is None else packet.dts
    flags = KEY * packet.is_keyframe | CORRUPT * packet.is_corrupt | DISCARDED * packet.is_discard
    return pts or 0, dts or 0, flags


def _described(path: str, stream: Any, container: Any) -> dict[str, Any]:
    rate, unit, context = stream.average_rate, stream.time_base, stream.codec_context
    size = (context.width, context.height) if context else (0, 0)
    return {
        "size": size[::-1] if _quarter_turns(_first_frame(path)) % 2 else size,
        "rate": [rate.numerator, rate.denominator] if rate else None,
        "unit": [unit.numerator, unit.denominator],
        "origin": round((container.start_time or 0) / av.time_base / unit),
    }


def _first_frame(path: str) -> Any:
    with suppress(FFmpegError, ValueError), _open(path) as container:
        stream = _picture_stream(container)
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        for packet in islice(container.demux(stream), _FIRST_PACKETS):
            with suppress(FFmpegError):
                for frame in packet.decode():
                    return frame
    return None


def _quarter_turns(frame: Any) -> int:
    """Return how many quarter turns anticlockwise bring a frame upright."""
    return round(frame.rotation / 90) % 4 if frame is not None else 0


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Yield the frames that can be decoded."""
    context = stream.codec_context
    for packet in container.demux(stream):
        with suppress(FFmpegError):
            yield from context.decode(packet if packet.size else None)


def frames(path: str, wanted: list[int], timed: bool, seek: int | None) -> Results:
    """Yield frames as rgb24, turned upright.

    ``wanted``: their times in the stream's unit if they are ``timed``, else their numbers, both increasing; ``seek``:
    where to begin in the file, a key frame's decoding time.
    """
    left = set(wanted)
    with _open(path) as container:
        stream = _picture_stream(container)
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        stream.codec_context.thread_type = "AUTO"
        stream.codec_context.thread_count = _THREADS
        if seek is not None:
            container.seek(seek, stream=stream)
        for number, frame in enumerate(_decoded(container, stream)):
            place = frame.pts if timed else number
            if place in left:
                left.remove(place)
                pixels = np.rot90(_rgb(frame), _quarter_turns(frame))
                yield {"width": pixels.shape[1], "height": pixels.shape[0]}, pixels.tobytes()
            if not left:
                return


def _rgb(frame: Any) -> np.ndarray:
    full = frame.color_range == _FULL_RANGE or frame.format.name.startswith(_FULL_RANGE_FORMATS)
    return frame.reformat(
        format="rgb24",
        src_colorspace=_MATRICES.get(frame.colorspace, "ITU601"),
        src_color_range="JPEG" if full else "MPEG",
        dst_color_range="JPEG",
        interpolation="BICUBIC",
    ).to_ndarray()


def sound(path: str, start: float, duration: float) -> Results:
    """Yield once the first audio stream from ``start`` for ``duration`` seconds, float32 [channels, samples].

    ``start`` counts from the beginning of the file. Gaps are silent. Nothing is yielded for a span without sound.
    Raises ValueError if nothing can be decoded.
    """
    with _open(path) as container:
        begin = start + (container.start_time or 0) / av.time_base
        if start > _PREROLL:
            with suppress(FFmpegError):  # else it is read from its beginning
                container.seek(round((begin - _PREROLL) * av.time_base))
        whole = _Waveform(begin, duration)
        reason = ""
        for packet in container.demux(container.streams.audio[0]):
            try:
                decoded = packet.decode()
            except FFmpegError as error:
                reason = str(error)
                continue
            if any(whole.is_full_with(frame) for frame in decoded):
                break
        if whole.samples is None:
            raise ValueError(reason or "it has no sound")
        if whole.heard:
            yield {"rate": whole.rate, "channels": len(whole.samples)}, whole.samples.tobytes()


class _Waveform:
    """Sound from ``begin`` for ``duration`` seconds, silent where no frame lies."""

    def __init__(self, begin: float, duration: float) -> None:
        self.begin, self.duration = begin, duration
        self.samples: np.ndarray | None = None
        self.rate, self.heard = 0, False
        self._at: int | None = None

    def is_full_with(self, frame: Any) -> bool:
        """Put a frame where its time says; return whether it reaches the end."""
        if self.samples is None:
            self.rate = frame.sample_rate
            self.samples = np.zeros((len(frame.layout.channels), round(self.duration * self.rate)), np.float32)
        heard = _as_float(frame)
        placed = round((frame.time - self.begin) * self.rate)
        # Time stamps are rounded: only what is off by more than a tenth of a second is a gap.
        if self._at is None or abs(placed - self._at) > self.rate / 10:
            self._at = placed
        first, last = max(self._at, 0), min(self._at + heard.shape[1], self.samples.shape[1])
        if first < last:
            self.samples[:, first:last] = heard[:, first - self._at : last - self._at]
            self.heard = True
        self._at += heard.shape[1]
        return self._at >= self.samples.shape[1]


def _as_float(frame: Any) -> np.ndarray:
    """Return a frame's samples as float32 [channels, samples] in -1..1."""
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, len(frame.layout.channels)).T
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if samples.dtype.kind == "i":
        return (samples / -float(np.iinfo(samples.dtype).min)).astype(np.float32)
    return samples.astype(np.float32)
