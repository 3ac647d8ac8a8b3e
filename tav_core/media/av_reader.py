"""Reads clips with PyAV, in the process of ``reader.py``."""

from __future__ import annotations

import gc
import math
import struct
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import count, islice
from typing import Any

import av
import av.logging
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from .container_crop import Crop, container_crop
from .ictcp import rgb_of_ictcp

# A text file with a video's name may be a playlist that names other files or addresses: only real containers
# are opened, and only from the disk.
CONTAINERS = "apng,asf,avi,flv,gif,matroska,mov,mpeg,mpegts,mpegvideo,mxf,ogg"
MAX_PIXELS = 2**26  # 8192x8192: a few bytes of header can announce pictures that fill the memory
KEY, CORRUPT, DISCARDED = 0x1, 0x2, 0x4
_CUT_SHORT = ("partial file", "ended prematurely")
_DEFAULT = 0x1  # AV_DISPOSITION_DEFAULT
_COVERS = 0x400 | 0x800  # AV_DISPOSITION_ATTACHED_PIC, AV_DISPOSITION_TIMED_THUMBNAILS
_THREADS = 4
# Packets to read at most before the first key frame, and from there to the first frame.
_KEYLESS_PACKETS, _FIRST_PACKETS = 5000, 100
_MOST_ASPECT = 16  # of a pixel; more is a damaged header
_PREROLL = 0.25  # seconds that sound decoders need before what they give is right
# Timestamps of these containers may restart midway, where recordings were joined. A jump of this many seconds, back or
# either way, is a restart. FFmpeg's program uses the same limits.
_JOINED, _BACK, _APART = ("mpeg", "mpegts"), 0.1, 10.0  # seconds

# Numbers of FFmpeg's enumerations (ITU-T H.273).
UNSPECIFIED, BT709, SMPTE170M, YCGCO, BT2020, ICTCP = 2, 1, 6, 8, 9, 14
PQ, HLG, LINEAR = 16, 18, 8
WIDE_PRIMARIES = (BT2020, 11, 12)  # DCI-P3, Display P3
# Matrix -> its number in swscale. BT.601 for all others, as swscale has it.
_SWS_BT601 = 5
_MATRICES = {BT709: 1, 4: 4, 7: 7, BT2020: 9, 10: 9}
_MATRIX_OF_PRIMARIES = {BT709: BT709, 4: 4, 5: SMPTE170M, 6: SMPTE170M, 7: 7, BT2020: BT2020}
_LIMITED, _FULL = 1, 2
# swscale's name of an order of pixels -> that with alpha.
_WITH_ALPHA = {"rgb24": "rgba", "rgb48le": "rgba64le"}

# One scaler for all frames. Each starts up to 16 threads and keeps them.
_SCALER = VideoReformatter()

Results = Iterator[tuple[dict[str, Any], Any]]  # a header and, as bytes, what it is of


def _open(path: str) -> Any:
    # Without the scheme, a colon in a name would be taken for one.
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file", "max_pixels": str(MAX_PIXELS)}
    # PyAV 19 replaces always, and has no such argument.
    replaced: dict[str, Any] = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
    return av.open(f"file:{path}", options=options, **replaced)


def _picture_stream(container: Any) -> Any:
    """Return the video stream that a player takes, no cover, or None."""
    return _played([each for each in container.streams.video if not each.disposition.value & _COVERS])


def _played(streams: Sequence[Any]) -> Any:
    """Return the first stream that the file marks as its default one, else the first, or None."""
    marked = [each for each in streams if each.disposition.value & _DEFAULT]
    return next(iter([*marked, *streams]), None)


def _prepare(context: Any, threads: int) -> None:
    """Set a decoder's options. "unaligned" has it crop on the left to the pixel."""
    context.options = {"max_pixels": str(MAX_PIXELS), "flags": "+unaligned"}
    context.thread_type = "AUTO"
    context.thread_count = threads


def packets(path: str, most: int) -> Results:
    """Yield once what a clip's headers say, with pts, dts, duration and flags of ``most`` packets as int64."""
    with _open(path) as container:
        stream = _picture_stream(container)
        found: dict[str, Any] = {
            "container": container.format.name,
            "sound": any(each.type == "audio" for each in container.streams),
            "picture": stream is not None,
        }
        table = array("q")
        shifts: list[float] = []
        if stream is not None:
            # A decoder's threads must not log to Python, which would wait for them: here nothing is decoded.
            av.logging.set_level(av.logging.WARNING)
            with av.logging.Capture(local=False) as log, suppress(FFmpegError):  # the log says what
                for packet in islice(_demuxed(container, stream, shifts), most):
                    if packet.size:
                        table.extend(_packet_row(packet))
            av.logging.set_level(None)
            found["shifts"] = shifts
            found["cut"] = any(mark in line for _, _, line in log for mark in _CUT_SHORT)
            found |= _described(path, stream, container)
        yield found, table.tobytes()


def _demuxed(container: Any, stream: Any, shifts: list[float] | None = None, known: bool = False) -> Iterator[Any]:
    """Yield a stream's packets; where the file's timestamps restart, the yielded ones continue.

    ``shifts``: seconds added after each restart. The list is filled, or read if ``known``, so that sound follows its
    picture.
    """
    shifts = [] if shifts is None else shifts
    joined, unit = container.format.name in _JOINED, stream.time_base
    last: int | None = None
    end, length, shift, jumps = 0, 0, 0, 0  # end: when the last picture ends; B-frames are stored out of order
    for packet in container.demux(stream):
        if joined and packet.dts is not None:
            step = 0.0 if last is None else float((packet.dts - last) * unit)
            begin = packet.dts if packet.pts is None else packet.pts
            if last is not None and (step < -_BACK or abs(step) > _APART):
                shift += max(last + length - packet.dts, end - begin)
                if not known:
                    shifts.append(float(shift * unit))
                elif jumps < len(shifts):
                    shift = round(shifts[jumps] / unit)
                jumps += 1
                end = begin
            last, length = packet.dts, packet.duration or 0
            end = max(end, begin + length)
            packet.dts += shift
            packet.pts = None if packet.pts is None else packet.pts + shift
        yield packet


def _packet_row(packet: Any) -> tuple[int, int, int, int]:
    pts = packet.dts if packet.pts is None else packet.pts
    dts = packet.pts if packet.dts is None else packet.dts
    flags = KEY * packet.is_keyframe | CORRUPT * packet.is_corrupt | DISCARDED * packet.is_discard
    return pts or 0, dts or 0, packet.duration or 0, flags


def _described(path: str, stream: Any, container: Any) -> dict[str, Any]:
    rate, unit, context = stream.average_rate, stream.time_base, stream.codec_context
    first: dict[str, Any] = {"shown": [context.width, context.height] if context else [0, 0]}
    plain, begin = False, None
    with suppress(FFmpegError, ValueError):
        picture, frame = _first_picture(path)
        # decord would choose between several streams by itself.
        first, plain, begin = picture.header, picture.is_plain and len(container.streams.video) == 1, frame.pts
    return {
        "first": first,
        "plain": plain,
        "begin": begin,
        "rate": [rate.numerator, rate.denominator] if rate else None,
        "unit": [unit.numerator, unit.denominator],
        "reordered": bool(context and context.has_b_frames),
        "origin": round((container.start_time or 0) / av.time_base / unit),
    }


def _first_picture(path: str) -> tuple[_Picture, Any]:
    with _open(path) as container:
        stream = _picture_stream(container)
        _prepare(stream.codec_context, 1)
        tried = 0
        for packet in islice(container.demux(stream), _KEYLESS_PACKETS):
            tried += tried > 0 or packet.is_keyframe
            if tried > _FIRST_PACKETS:
                break
            with suppress(FFmpegError):
                for frame in packet.decode():
                    return _Picture(frame, stream, _crop(path, stream)), frame
    raise ValueError("no frame can be decoded")


def _display_matrix(frame: Any) -> tuple[float, float, float, float]:
    """Return a, b, c, d: what turns and mirrors a frame when it is shown."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV has no name for some of it; rotation alone does not tell of mirroring
        angle = math.radians(frame.rotation)
        return math.cos(angle), math.sin(angle), -math.sin(angle), math.cos(angle)
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20]) if matrix is not None else (1, 0, 0, 0, 1)
    return a, b, c, d


def _crop(path: str, stream: Any) -> Crop | None:
    videos = stream.container.streams.video
    number = [each.index for each in videos].index(stream.index)
    return container_crop(path, stream.container.format.name, stream.id, number, (stream.width, stream.height))


class _Picture:
    """The properties that decide how a frame is shown: size, shape, position and colours."""

    def __init__(self, frame: Any, stream: Any, crop: Crop | None) -> None:
        self.frame, context = frame, stream.codec_context
        self.coded_width = context.coded_width
        self.matrix, self.primaries, self.transfer = _colours(frame, context)
        a, b, c, d = _display_matrix(frame)
        # Other angles than quarter turns are rounded to them, as players do.
        self.turned = abs(b) > abs(a)
        self.flipped = (c < 0, b < 0) if self.turned else (a < 0, d < 0)  # horizontally, vertically
        same_size = (frame.width, frame.height) == (stream.width, stream.height)
        self.crop = crop if crop and same_size else (0, 0, 0, 0)
        # A broadcast may change its pixel aspect ratio midway, and only the codec's header says so.
        stated = stream if same_size and stream.container.format.name not in _JOINED else context
        aspect = float(stated.sample_aspect_ratio or 1)
        self.aspect = aspect if 1 / _MOST_ASPECT <= aspect <= _MOST_ASPECT else 1.0

    @property
    def needs_signal(self) -> bool:
        """Tell whether its colours need more than swscale does."""
        special = self.transfer in (PQ, HLG, LINEAR) or self.primaries in WIDE_PRIMARIES
        return special or (self.matrix in (YCGCO, ICTCP) and not self.frame.format.is_rgb)

    @property
    def has_alpha(self) -> bool:
        """Tell whether it may be transparent somewhere."""
        form = self.frame.format
        return bool(form.has_palette) or any(component.is_alpha for component in form.components)

    @property
    def is_plain(self) -> bool:
        """Tell whether an older FFmpeg, which decord brings, shows it alike."""
        tagged = self.frame.format.is_rgb or self.frame.colorspace == self.matrix or self.matrix == SMPTE170M
        upright = not self.turned and not any(self.flipped)
        # It crops on the left to multiples of 16 or so, and not what the container cuts off.
        whole = self.coded_width == self.frame.width and not any(self.crop) and not self.has_alpha
        bits = max(component.bits for component in self.frame.format.components)
        return tagged and upright and whole and self.aspect == 1 and not self.needs_signal and bits == 8

    @property
    def header(self) -> dict[str, Any]:
        """Return its size in pixels, the size that it is shown at, and for 16 bits its colours' tags."""
        left, top, right, bottom = self.crop
        size = [self.frame.width - left - right, self.frame.height - top - bottom]
        shown = [max(1, round(size[0] * self.aspect)), size[1]]
        if self.turned:
            size, shown = size[::-1], shown[::-1]
        found = {"width": size[0], "height": size[1], "shown": shown}
        return found | ({"transfer": self.transfer, "primaries": self.primaries} if self.needs_signal else {})

    @property
    def pixels(self) -> np.ndarray:
        """Return it upright [h, w, 3]: uint8 as it is shown, or uint16 as it is coded where colours need more."""
        pixels = self._signal() if self.needs_signal else self._rgb("rgb24")
        left, top, right, bottom = self.crop
        pixels = pixels[top : len(pixels) - bottom, left : pixels.shape[1] - right]
        if self.turned:
            pixels = pixels.transpose(1, 0, 2)
        horizontally, vertically = self.flipped
        return pixels[:: -1 if vertically else 1, :: -1 if horizontally else 1]

    def _rgb(self, name: str) -> np.ndarray:
        frame = self.frame
        grey = frame.format.name.startswith(("gray", "ya"))
        full = frame.color_range == _FULL or frame.format.name.startswith("yuvj") or grey
        scaled: Any = _SCALER.reformat(
            frame,
            format=_WITH_ALPHA[name] if self.has_alpha else name,
            src_colorspace=_MATRICES.get(self.matrix, _SWS_BT601),
            src_color_range="JPEG" if full else "MPEG",
            dst_color_range="JPEG",
            interpolation="BICUBIC",
        )
        pixels: np.ndarray = scaled.to_ndarray()
        if self.has_alpha:
            pixels = _on_white(pixels)
        if grey and frame.color_range == _LIMITED:  # swscale takes grey for full range
            top = np.iinfo(pixels.dtype).max
            limited = (pixels / top * 255 - 16) / 219
            pixels = (limited.clip(0, 1) * top).round().astype(pixels.dtype)
        return pixels

    def _signal(self) -> np.ndarray:
        if self.matrix not in (YCGCO, ICTCP) or self.frame.format.is_rgb:
            return self._rgb("rgb48le")
        whole: Any = _SCALER.reformat(  # one matrix for both: the planes keep their meaning
            self.frame,
            format="yuv444p16le",
            src_colorspace=_SWS_BT601,
            dst_colorspace=_SWS_BT601,
            src_color_range="JPEG" if self.frame.color_range == _FULL else "MPEG",
            dst_color_range="MPEG",
            interpolation="BICUBIC",
        )
        planes = [
            np.frombuffer(plane, np.uint16).reshape(plane.height, -1)[:, : plane.width] / 256 for plane in whole.planes
        ]
        luma, green, orange = (planes[0] - 16) / 219, (planes[1] - 128) / 224, (planes[2] - 128) / 224
        if self.matrix == ICTCP:
            return (rgb_of_ictcp(luma, green, orange, self.transfer == HLG) * 65535).round().astype(np.uint16)
        rest = luma - green
        return (np.stack([rest + orange, luma + green, rest - orange], -1).clip(0, 1) * 65535).round().astype(np.uint16)


def _on_white(pixels: np.ndarray) -> np.ndarray:
    """Lay pixels [h, w, 4] with straight alpha on white, as browsers and the readers of gif do; [h, w, 3]."""
    colours, alpha, top = pixels[..., :3], pixels[..., 3:], np.iinfo(pixels.dtype).max
    if alpha.min() == top:
        return colours
    laid = top + (colours.astype(np.float32) - top) * (alpha / np.float32(top))
    return laid.round().astype(pixels.dtype)


def _colours(frame: Any, context: Any) -> tuple[int, int, int]:
    """Return matrix, primaries and transfer, guessed as players do where the clip does not say."""
    matrix, primaries, transfer = frame.colorspace, context.color_primaries, context.color_trc
    if primaries == UNSPECIFIED and transfer in (PQ, HLG):
        primaries = BT2020
    if matrix in (12, 13):  # derived from the primaries
        matrix = _MATRIX_OF_PRIMARIES.get(primaries, UNSPECIFIED)
    if matrix in (0, UNSPECIFIED, 3):
        high = frame.width >= 1280 or frame.height > 576
        matrix = _MATRIX_OF_PRIMARIES.get(primaries, BT709 if high else SMPTE170M)
    return matrix, primaries, transfer


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Yield the frames that can be decoded."""
    context = stream.codec_context
    for packet in _demuxed(container, stream):
        with suppress(FFmpegError):
            yield from context.decode(packet if packet.size else None)


def frames(path: str, wanted: list[int], timed: bool, seek: int | None) -> Results:
    """Yield frames as they are to be shown, see ``_Picture``.

    ``wanted``: their times in the stream's unit if they are ``timed``, else their numbers, both increasing; ``seek``:
    where to begin in the file, a key frame's decoding time.
    """
    left = set(wanted)
    # Reading side_data creates a reference cycle, so that only a collection frees the frame.
    gc.freeze()
    with _open(path) as container:
        stream = _picture_stream(container)
        crop = _crop(path, stream)
        _prepare(stream.codec_context, _THREADS)
        if seek is not None:
            container.seek(seek, stream=stream)
        decoded = _decoded(container, stream)
        for number in count():
            frame = next(decoded, None)
            if frame is None:
                return
            place = frame.pts if timed else number
            if place in left:
                left.remove(place)
                picture = _Picture(frame, stream, crop)
                pixels = np.ascontiguousarray(picture.pixels)
                yield picture.header, pixels.data.cast("B")
                del picture, pixels, frame
                gc.collect()
            if not left:
                return


def sound(path: str, start: float, duration: float, shifts: list[float]) -> Results:
    """Yield once a player's audio stream from ``start`` for ``duration`` seconds, float32 [channels, samples].

    ``start`` counts from the beginning of the file; ``shifts``: those of the picture's timestamps (``_demuxed``).
    Gaps are silent. Nothing is yielded for a span without sound.
    Raises ValueError if nothing can be decoded.
    """
    with _open(path) as container:
        begin = start + (container.start_time or 0) / av.time_base
        if start > _PREROLL and not shifts:
            with suppress(FFmpegError):  # else it is read from its beginning
                container.seek(round((begin - _PREROLL) * av.time_base))
        whole = _Waveform(begin, duration)
        reason = ""
        for packet in _demuxed(container, _played(container.streams.audio), shifts, known=True):
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
        self._layout: Any = None
        self._at: int | None = None
        self._resamplers: dict[Any, Any] = {}

    def is_full_with(self, frame: Any) -> bool:
        """Put a frame where its time says; return whether it reaches the end."""
        if self.samples is None:
            self.rate, self._layout = frame.sample_rate, frame.layout
            shape = frame.layout.nb_channels, round(self.duration * self.rate)
            self.samples = np.zeros(shape, np.float32)
        heard = self._as_float(frame)
        time = self.begin if frame.time is None else frame.time
        placed = round((time - self.begin) * self.rate)
        # Time stamps are rounded: only what is off by more than a tenth of a second is a gap.
        if self._at is None or (frame.time is not None and abs(placed - self._at) > self.rate / 10):
            self._at = placed
        first, last = max(self._at, 0), min(self._at + heard.shape[1], self.samples.shape[1])
        if first < last:
            self.samples[:, first:last] = heard[:, first - self._at : last - self._at]
            self.heard = True
        self._at += heard.shape[1]
        return self._at >= self.samples.shape[1]

    def _as_float(self, frame: Any) -> np.ndarray:
        """Return a frame's samples as float32 [channels, samples] in -1..1, at the first frame's rate and channels."""
        channels = frame.layout.nb_channels
        same = (frame.sample_rate, channels) == (self.rate, self._layout.nb_channels)
        # PyAV reads planes beyond the last one where there are eight or more.
        if not same or (frame.format.is_planar and channels >= 8):
            setup = frame.format.name, frame.sample_rate, channels
            if setup not in self._resamplers:
                self._resamplers[setup] = av.AudioResampler("flt", self._layout, self.rate)
            parts = [np.zeros((1, 0), np.float32)]
            parts += [part.to_ndarray() for part in self._resamplers[setup].resample(frame)]
            return np.concatenate(parts, axis=1).reshape(-1, self._layout.nb_channels).T
        samples = frame.to_ndarray()
        if not frame.format.is_planar:
            samples = samples.reshape(-1, channels).T
        if samples.dtype == np.uint8:
            return (samples.astype(np.float32) - 128) / 128
        if samples.dtype.kind == "i":
            return (samples / -float(np.iinfo(samples.dtype).min)).astype(np.float32)
        return samples.astype(np.float32)
