"""Clips in and out of files: which frames are kept, how they are resized, and how results are encoded.

Reading goes in two steps. `probe` lets the ffmpeg program walk through the file's packets, without decoding,
in a process of its own: that refuses files that are no videos or are cut short, and gives every frame's time.
Then `read_frames` keeps the wanted frames, decoded with decord where it is installed and finds frames exactly,
else with ffmpeg; decord, too, in a process of its own (`decord_reader.py`). Both turn frames upright by the
file's rotation tag and convert colours alike.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import logging
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import uuid
from bisect import bisect_left
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, isfinite
from pathlib import Path
from typing import Any, BinaryIO

import imageio_ffmpeg
import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor

from ..out_of_memory import mentions_oom

START_UNITS = ("seconds", "frames")
RESIZE_MODES = ("crop to fill", "fit", "stretch", "keep")
FORMATS = ("mp4", "webm", "gif")

SIDE_MULTIPLE = 8  # the VAE halves a side three times
MAX_SIDE = 16384
PROBE_LIMIT = 120  # seconds; packets are only listed, at the speed of the disk
DECODE_LIMIT = 900
MAX_PASSED_OVER = 300  # frames; above that, ffmpeg, which can jump to a key frame, is the faster reader
ENCODE_LIMIT = 1800  # after the last frame was handed over
MAX_FRAMES = 1_000_000  # of a clip; a few bytes of header can announce billions
MAX_PIXELS = 2**26  # 8192x8192: a few bytes of header can announce pictures that fill the memory
# What a decoder may take: so many bytes, and so many pictures that refer to each other.
DECODER_MEMORY, FRAMES_IN_FLIGHT = 2 * 2**30, 32
MOST_SOUND = 48000 * 2 * 4 * 4  # bytes a second while sound is read: stereo, and some copies

# A text file with a video's name may be a playlist that names other files or addresses: only real containers
# are opened, and only from the disk.
CONTAINERS = "asf,avi,flv,gif,matroska,mov,mpeg,mpegts,mpegvideo,mxf,ogg"
READ_SAFELY = ["-protocol_whitelist", "file", "-format_whitelist", CONTAINERS, "-max_pixels", str(MAX_PIXELS)]
CUT_SHORT = ("partial file", "ended prematurely")
KEY, CORRUPT, DISCARDED = 0x1, 0x2, 0x4  # AV_PKT_FLAG_*

_DECORD_READER = str(Path(__file__).with_name("decord_reader.py"))

Audio = dict[str, Any]  # the host's AUDIO: waveform [1, channels, samples] float32, sample_rate in Hz
Progress = Callable[[int, int], None]  # frames done, frames in all; may raise to stop


@dataclass(frozen=True)
class VideoInfo:
    """What `probe` found.

    Size in pixels as displayed; mean frames a second; the time of each frame in seconds, in display order;
    keys: the numbers of the frames where decoding can begin, none if the container does not find them exactly.
    """

    path: str
    width: int
    height: int
    fps: float
    times: tuple[float, ...]
    keys: tuple[int, ...]
    has_audio: bool

    @property
    def name(self) -> str:
        return os.path.basename(self.path)


@dataclass(frozen=True)
class Clip:
    """images [F, H, W, 3] float32 in 0..1, fps after stepping, the sound of the kept span if there is any."""

    images: Tensor
    fps: float
    audio: Audio | None


class _CannotReadError(Exception):
    """One reader gives up; the next one may manage."""


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
    fewer frames are left than asked for, those that are left are taken. Raises ValueError, naming the input
    and the remedy, for a file that cannot be read and for settings that cannot be met.
    """
    check_selection(start, start_unit, frame_count, frame_step)
    check_size(width, height, resize)
    info = probe(path)
    indices = select_frames(info.times, info.fps, start, start_unit, frame_count, frame_step)
    if len(indices) < frame_count:
        logging.warning(
            "%s: %d frames are left after start and frame_step, fewer than frame_count %d",
            info.name,
            len(indices),
            frame_count,
        )
    images = read_frames(info, indices, width, height, resize, progress)
    fps = info.fps / frame_step
    begin, end = info.times[indices[0]], info.times[indices[-1]] + 1 / fps
    audio = read_audio(info, begin, end - begin) if info.has_audio else None
    return Clip(images, fps, audio)


# --- which frames, and how large ------------------------------------------------------------------


def check_selection(start: float, start_unit: str, frame_count: int, frame_step: int) -> None:
    """Raise ValueError for settings that no clip could meet."""
    if start_unit not in START_UNITS:
        raise ValueError(f"start_unit: {start_unit!r} is not one of {', '.join(START_UNITS)}.")
    if not isfinite(start) or start < 0:
        raise ValueError(f"start: {start} is not a position in the clip; give 0 or more.")
    if frame_count < 0:
        raise ValueError(f"frame_count: {frame_count} frames cannot be kept; give 1 or more, or 0 for all.")
    if frame_step < 1:
        raise ValueError(f"frame_step: {frame_step} is not a step; give 1 for every frame, 2 for every second one.")


def select_frames(
    times: Sequence[float], fps: float, start: float, start_unit: str, frame_count: int, frame_step: int
) -> list[int]:
    """Indices of the frames to keep: every `frame_step`-th from `start`, at most `frame_count`, 0 = all.

    times: seconds of each frame in display order (so that clips of a varying rate start where they should);
    fps: mean frames a second. start in seconds takes the frame nearest to it, in frames a number from 0.
    Raises ValueError if no frame is left.
    """
    if start_unit == "frames":
        first = round(start)
    elif start > times[-1] + 0.5 / fps:
        first = len(times)
    else:
        first = _nearest(times, start)
    kept = list(range(first, len(times), frame_step))
    if not kept:
        seconds = times[-1] + 1 / fps
        raise ValueError(
            f"start: no frame is left from {start:g} {start_unit} on; the clip has {len(times)} frames"
            f" ({seconds:.2f} seconds), so give an earlier start."
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
    """Raise ValueError for a size that the VAE cannot take ("keep" does not use width and height)."""
    if resize not in RESIZE_MODES:
        raise ValueError(f"resize: {resize!r} is not one of {', '.join(RESIZE_MODES)}.")
    if resize == "keep":
        return
    for name, side in (("width", width), ("height", height)):
        if not SIDE_MULTIPLE <= side <= MAX_SIDE or side % SIDE_MULTIPLE:
            near = min(max(SIDE_MULTIPLE, round(side / SIDE_MULTIPLE) * SIDE_MULTIPLE), MAX_SIDE)
            raise ValueError(
                f"{name}: {side} is a size that the VAE cannot take; give a multiple of {SIDE_MULTIPLE}"
                f" from {SIDE_MULTIPLE} to {MAX_SIDE}, for instance {near}."
            )


def fitted_size(source: tuple[int, int], width: int, height: int, resize: str) -> tuple[int, int]:
    """(width, height) of the result for a source of (width, height) pixels; every side a multiple of 8.

    "crop to fill" and "stretch" give the asked size. "fit" scales until the picture fits inside it, each side
    rounded to the nearest multiple of 8, without bars. "keep" leaves the scale and trims each side to a
    multiple of 8. Raises ValueError if "keep" would leave nothing.
    """
    if resize == "keep":
        kept_width, kept_height = (side // SIDE_MULTIPLE * SIDE_MULTIPLE for side in source)
        if not kept_width or not kept_height:
            raise ValueError(
                f"resize: the clip's {source[0]}x{source[1]} pixels are a size that the VAE cannot take;"
                ' choose "crop to fill" and a width and height instead of "keep".'
            )
        return kept_width, kept_height
    if resize == "fit":
        scale = min(width / source[0], height / source[1])
        fitted = [max(1, round(side * scale / SIDE_MULTIPLE)) * SIDE_MULTIPLE for side in source]
        return fitted[0], fitted[1]
    return width, height


def source_box(source: tuple[int, int], target: tuple[int, int], resize: str) -> tuple[float, float, float, float]:
    """The part (left, top, right, bottom) of the source that becomes the target: centred, in source pixels.

    "stretch" takes all of it; "keep" a part of the target's size; the others the largest part that has the
    target's proportions, so that nothing is distorted ("fit" loses at most the few pixels of its rounding).
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


# --- reading --------------------------------------------------------------------------------------


def probe(path: str | Path) -> VideoInfo:
    """List a video file's frames without decoding them.

    Raises ValueError with one sentence for a file that is missing, empty, no video, without a picture, or cut
    short.
    """
    full = _existing_file(path)
    name = os.path.basename(full)
    command = [*_ffmpeg(), *READ_SAFELY, "-i", _file_url(full)]
    command += ["-map", "0:V:0", "-c", "copy", "-frames:v", str(MAX_FRAMES + 1), "-f", "framecrc", "-"]
    try:
        result = subprocess.run(command, capture_output=True, timeout=PROBE_LIMIT)  # noqa: S603
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"file: '{name}' could not be read within {PROBE_LIMIT} seconds; cut out the part you need first."
        ) from None
    report = result.stderr.decode("utf-8", "replace")
    described = re.split(r"^(?:Stream mapping|Output #)", report, flags=re.M)[0]
    streams = re.split(r"^  (?=Stream #)", described, flags=re.M)[1:]
    kinds = [found.group(1) if (found := re.match(r"Stream #.*?: (\w+): ", text)) else "" for text in streams]
    pictures = [
        text
        for kind, text in zip(kinds, streams, strict=True)
        if kind == "Video" and "(attached pic)" not in text and "(timed thumbnails)" not in text
    ]
    if not pictures and "Audio" in kinds:
        raise ValueError(f"file: '{name}' holds sound but no video; choose a file with a video track.")
    if not pictures:
        raise ValueError(
            f"file: '{name}' cannot be opened: it is no video, or it is truncated; upload it again, or choose"
            " another file."
        )
    packets = _packets(result.stdout.decode("ascii", "replace"))
    if len(packets) > MAX_FRAMES:
        raise ValueError(f"file: '{name}' has more than {MAX_FRAMES} frames; cut out the part you need first.")
    complaints = "\n".join(line for line in report.splitlines() if line.startswith("["))
    if any(mark in complaints for mark in CUT_SHORT) or (packets and packets[-1][1] & CORRUPT):
        raise ValueError(f"file: '{name}' is truncated: its end is missing; upload or download it again.")
    # An edit list hides frames that others need for decoding: they are never displayed.
    shown = sorted((time, flags) for time, flags in packets if not flags & DISCARDED)
    times = [time for time, _ in shown]
    width, height = _displayed_size(pictures[0])
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ValueError(
            f"file: '{name}' is {width}x{height} pixels large; at most {MAX_SIDE} a side and"
            f" {MAX_PIXELS / 1e6:.0f} million in all are read, so make it smaller first."
        )
    if result.returncode or not times or not (width and height):
        raise ValueError(
            f"file: '{name}' has no frames that can be read ({len(times)} of {width}x{height} pixels);"
            " convert it to mp4 and try again."
        )
    fps = _frame_rate(pictures[0], times)
    if any(later <= earlier for earlier, later in zip(times, times[1:], strict=False)):
        times = [i / fps for i in range(len(times))]  # some containers store no usable times
    keys = [number for number, (_, flags) in enumerate(shown) if flags & KEY]
    if not re.match(r"Input #0, (mov|matroska)", described):
        keys = []
    return VideoInfo(full, width, height, fps, tuple(times), tuple(keys), "Audio" in kinds)


def _existing_file(path: str | Path) -> str:
    name = os.path.basename(str(path)).replace("\0", "?")
    if "\0" in str(path) or not os.path.isfile(path):
        raise ValueError(f"file: '{name}' does not exist; upload it again, or choose another file.")
    if os.path.getsize(path) == 0:
        raise ValueError(f"file: '{name}' is empty (0 bytes); upload it again, or choose another file.")
    return os.path.abspath(path)


def _ffmpeg() -> list[str]:
    return [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin"]


def _file_url(path: str | Path) -> str:
    # Without the scheme, a colon in a name would be taken for one.
    return f"file:{path}"


def _packets(listing: str) -> list[tuple[float, int]]:
    """(seconds, flags) of each packet of a framecrc listing, in the file's order."""
    unit = Fraction(1)
    packets = []
    for line in listing.splitlines():
        if line.startswith("#tb 0:"):
            unit = Fraction(line.split(":")[1].strip())
        elif line and not line.startswith("#"):
            fields = [field.strip() for field in line.split(",")]
            flags = next((int(field[2:], 16) for field in fields if field.startswith("F=")), KEY)
            packets.append((float(int(fields[2]) * unit), flags))
    return packets


def _displayed_size(stream: str) -> tuple[int, int]:
    found = re.search(r", (\d+)x(\d+)\b", stream)
    width, height = (int(found.group(1)), int(found.group(2))) if found else (0, 0)
    rotation = re.search(r"rotation of (-?[\d.]+) degrees", stream)
    if rotation and round(float(rotation.group(1))) % 180 == 90:
        return height, width
    return width, height


def _frame_rate(stream: str, times: Sequence[float]) -> float:
    """The container's mean rate. ffmpeg prints two decimals of it: NTSC rates or the times give the rest."""
    measured = (len(times) - 1) / (times[-1] - times[0]) if times[-1] > times[0] else 1.0
    printed = re.search(r"([\d.]+)(k?) fps", stream) or re.search(r"([\d.]+)(k?) tbr", stream)
    rate = float(printed.group(1)) * (1000 if printed.group(2) else 1) if printed else measured
    if rate.is_integer():
        return rate or measured
    ntsc = round(rate * 1.001) * 1000 / 1001
    finer = (round(each, 6) for each in (ntsc, measured))
    return next((each for each in finer if each and abs(each - rate) < 0.006), rate)


def read_frames(
    info: VideoInfo,
    indices: Sequence[int],
    width: int,
    height: int,
    resize: str,
    progress: Progress | None = None,
) -> Tensor:
    """Decode the frames with these indices (increasing by one step): [F, H, W, 3] float32 in 0..1.

    Each frame is resized as it is decoded (Lanczos, antialiased), so that only the result is held in memory.
    Raises ValueError if the result would not fit in memory, or if the file's frames cannot be decoded, MemoryError
    if the decoder itself ran out of memory.
    """
    source = info.width, info.height
    target = fitted_size(source, width, height, resize)
    needed = len(indices) * target[0] * target[1] * 3 * 4
    available = psutil.virtual_memory().available
    if needed > available:
        raise ValueError(
            f"frame_count: {len(indices)} frames of {target[0]}x{target[1]} need {needed / 2**30:.1f} GiB of"
            f" memory, and {available / 2**30:.1f} GiB are free; keep fewer frames or make them smaller."
        )
    box = source_box(source, target, resize)
    images = torch.empty(len(indices), target[1], target[0], 3)
    done, reason = 0, ""
    for reader in (_decord_frames, _ffmpeg_frames):
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
        except _CannotReadError as error:
            reason = str(error)
            logging.info("%s: %s does not read it (%s)", info.name, reader.__name__, reason)
    if mentions_oom(reason):
        raise MemoryError(reason)
    raise ValueError(
        f"file: '{info.name}' is damaged or truncated: {done} of the {len(indices)} wanted frames could be"
        " decoded; convert it again, or choose a part that plays."
    )


def _decord_frames(info: VideoInfo, indices: Sequence[int]) -> Generator[np.ndarray, None, None]:
    """Frames [H, W, 3] uint8 by decord, in a process of its own: some damaged clips end the one that it is in."""
    if importlib.util.find_spec("decord") is None:  # there is none for this platform
        raise _CannotReadError("decord is not installed")
    if not info.keys:
        raise _CannotReadError("its frame numbers would be wrong")
    passed_over = indices[-1] + 1 - len(indices)
    if passed_over > MAX_PASSED_OVER:
        raise _CannotReadError(f"{passed_over} frames would be decoded in vain")
    job = {
        "module_path": [str(Path(entry).absolute()) for entry in sys.path],
        "path": info.path,
        "width": info.width,
        "height": info.height,
        "frames": len(info.times),
        "wanted": [indices[0], indices[-1] + 1, indices[1] - indices[0] if len(indices) > 1 else 1],
        "memory": DECODER_MEMORY + FRAMES_IN_FLIGHT * info.width * info.height * 3,
    }
    yield from _piped_frames([sys.executable, "-I", _DECORD_READER, json.dumps(job)], info, len(indices))


def _ffmpeg_frames(info: VideoInfo, indices: Sequence[int]) -> Generator[np.ndarray, None, None]:
    """The same frames by the ffmpeg program, one at a time through a pipe."""
    first, step = indices[0], indices[1] - indices[0] if len(indices) > 1 else 1
    seek: list[str] = []
    key = max((key for key in info.keys if key <= first), default=0)
    if key:
        # To a key frame: from elsewhere, ffmpeg too can lose frames of an open group. And halfway to the frame
        # before it, so that rounding cannot move the cut.
        seek = ["-ss", f"{(info.times[key - 1] + info.times[key]) / 2:.6f}"]
        first -= key
    # Frames leave at the rate that they are picked at: none is dropped or doubled to keep the clip's own rate.
    pick = rf"select=gte(n\,{first})*not(mod(n-{first}\,{step})),setpts=N/TB,fps=1"
    scale = f"scale={info.width}:{info.height}"
    command = [*_ffmpeg(), "-loglevel", "error", *READ_SAFELY, *seek, "-i", _file_url(info.path)]
    command += ["-map", "0:V:0", "-vf", f"{pick},{scale}", "-frames:v", str(len(indices))]
    command += ["-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
    yield from _piped_frames(command, info, len(indices))


def _piped_frames(command: list[str], info: VideoInfo, count: int) -> Generator[np.ndarray, None, None]:
    """Frames [H, W, 3] uint8 that a program writes to its standard output."""
    size = info.width * info.height * 3
    with tempfile.TemporaryFile() as log:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process:  # noqa: S603
            assert process.stdout is not None
            limit = threading.Timer(DECODE_LIMIT, process.kill)
            limit.start()
            try:
                for _ in range(count):
                    frame = process.stdout.read(size)
                    if len(frame) < size:
                        raise _CannotReadError(_last_line(log) or "it ends early")
                    yield np.frombuffer(frame, np.uint8).reshape(info.height, info.width, 3)
            finally:
                limit.cancel()
                process.kill()


def _last_line(log: BinaryIO) -> str:
    log.seek(0)
    lines = log.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip() if lines else ""


def read_audio(info: VideoInfo, start: float, duration: float) -> Audio | None:
    """The first audio track from `start` for `duration` seconds, exactly so long, silent where it has a gap.

    None if the track has no sound in that span, or cannot be decoded (which is logged, not raised).
    """
    if not duration * MOST_SOUND < psutil.virtual_memory().available:
        logging.warning("%s: %g seconds of sound do not fit in memory and are left out", info.name, duration)
        return None
    command = [*_ffmpeg(), "-loglevel", "error", *READ_SAFELY]
    command += ["-ss", f"{start:.6f}", "-i", _file_url(info.path), "-t", f"{duration:.6f}"]
    command += ["-map", "0:a:0", "-af", "aresample=async=1:first_pts=0"]
    command += ["-c:a", "pcm_f32be", "-f", "au", "-"]
    try:
        result = subprocess.run(command, capture_output=True, timeout=PROBE_LIMIT)  # noqa: S603
    except subprocess.TimeoutExpired:
        logging.warning("%s: its sound could not be read in time and is left out", info.name)
        return None
    if result.returncode or len(result.stdout) < 24:
        reason = result.stderr.decode("utf-8", "replace").strip()
        logging.warning("%s: its sound cannot be decoded and is left out (%s)", info.name, reason)
        return None
    _, offset, _, _, sample_rate, channels = struct.unpack(">4s5I", result.stdout[:24])
    samples = np.frombuffer(result.stdout[offset:], ">f4")
    if not samples.size:
        return None
    heard = torch.from_numpy(samples.astype(np.float32).reshape(-1, channels).T.copy())
    waveform = torch.zeros(1, channels, round(duration * sample_rate))
    length = min(waveform.shape[-1], heard.shape[-1])
    waveform[0, :, :length] = heard[:, :length]
    return {"waveform": waveform, "sample_rate": sample_rate}


# --- writing --------------------------------------------------------------------------------------


def save_clip(
    images: Tensor,
    fps: float,
    path: str | Path,
    quality: int = 80,
    audio: Audio | None = None,
    metadata: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write frames as a video; the file's extension is the format: mp4 (H.264), webm (VP9) or gif.

    images: [F, H, W, 3 or 4] in 0..1, alpha is dropped; fps: frames a second; quality: 0..100 for mp4 and
    webm (80 is crf 17 and crf 21); audio: trimmed to the video's length, not in gif; metadata: each value is
    stored as JSON under its key, as the host's own SaveVideo does it (gif: one JSON object as the comment).
    H.264 needs even sides: an odd one gets its last row or column twice. The file appears only when it is
    complete. Raises ValueError, before any work, for frames or sound that cannot be encoded, OSError for a disk
    that is full or cannot be written to, MemoryError or RuntimeError if ffmpeg fails for want of memory or otherwise.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    _check_encodable(images, fps, kind, quality)
    rate = Fraction(fps).limit_denominator(1001)
    frames, height, width = images.shape[:3]
    pad = (height % 2, width % 2) if kind == "mp4" else (0, 0)
    partial = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")
    with tempfile.TemporaryDirectory() as scratch:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-f", "rawvideo"]
        command += ["-pix_fmt", "rgb24", "-s", f"{width + pad[1]}x{height + pad[0]}", "-r", str(rate)]
        command += ["-i", "pipe:0"]
        if audio is not None and kind == "gif":
            logging.info("%s: gif has no sound, it is left out", path.name)
        elif audio is not None:
            command += _audio_input(audio, frames / rate, Path(scratch) / "sound.f32")
        if metadata and kind != "gif":
            # In a file, because a workflow can be longer than a command line may be.
            tags = Path(scratch) / "tags.txt"
            tags.write_text(_ffmetadata(metadata), encoding="utf-8")
            command += ["-f", "ffmetadata", "-i", _file_url(tags), "-map_metadata", str(command.count("-i"))]
        command += [*_codec_options(kind, quality), _file_url(partial)]
        try:
            _run_encoder(command, images, pad, path.name, progress)
            if metadata and kind == "gif":
                _add_gif_comment(partial, json.dumps(metadata))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _check_encodable(images: Tensor, fps: float, kind: str, quality: int) -> None:
    if kind not in FORMATS:
        raise ValueError(f"format: {kind!r} is not one of {', '.join(FORMATS)}.")
    if images.ndim != 4 or images.shape[-1] not in (3, 4) or 0 in images.shape:
        raise ValueError(
            f"images: shape {list(images.shape)} is not that of frames [count, height, width, 3]; connect an IMAGE."
        )
    if not isfinite(fps) or fps < 0.01:
        raise ValueError(f"fps: {fps} frames a second cannot be played; give 0.01 or more.")
    if kind == "gif" and fps > 50:
        raise ValueError(f"fps: gif cannot play {fps:g} frames a second; give at most 50, or choose mp4.")
    if not 0 <= quality <= 100:
        raise ValueError(f"quality: {quality} is outside 0..100.")
    for index, frame in enumerate(images):
        if not torch.isfinite(frame).all():
            raise ValueError(
                f"images: frame {index} holds NaN or infinite values; look at the nodes before this one"
                " (a VAE in fp16 is the usual cause: start the host with --fp32-vae)."
            )


def _audio_input(audio: Audio, seconds: Fraction, raw: Path) -> list[str]:
    """ffmpeg's options for the sound as one more input; writes its samples to the file `raw`."""
    waveform, sample_rate = audio["waveform"], int(audio["sample_rate"])
    if waveform.ndim != 3 or waveform.shape[1] < 1 or sample_rate < 1 or not torch.isfinite(waveform).all():
        raise ValueError(
            f"audio: a waveform of shape {list(waveform.shape)} at {sample_rate} Hz is not sound"
            " [1, channels, samples] without NaN; connect another AUDIO, or none."
        )
    heard = waveform[0, :, : ceil(seconds * sample_rate)]
    raw.write_bytes(heard.detach().float().cpu().T.contiguous().numpy().astype("<f4").tobytes())
    return ["-f", "f32le", "-ar", str(sample_rate), "-ac", str(heard.shape[0]), "-i", _file_url(raw)]


def _ffmetadata(metadata: Mapping[str, Any]) -> str:
    def escaped(text: str) -> str:
        return re.sub(r"([=;#\\\n])", r"\\\1", text)

    lines = [f"{escaped(key)}={escaped(json.dumps(value))}" for key, value in metadata.items()]
    return "\n".join([";FFMETADATA1", *lines, ""])


def _codec_options(kind: str, quality: int) -> list[str]:
    if kind == "gif":
        palette = "split[a][b];[a]palettegen=stats_mode=diff[p];[b][p]paletteuse=diff_mode=rectangle"
        return ["-filter_complex", palette, "-loop", "0"]
    # Untagged video is taken for BT.709 or BT.601, depending on its size and the player: say which it is.
    colours = "scale=out_color_matrix=bt709:out_range=tv,format=yuv420p"
    colours += ",setparams=range=tv:color_primaries=bt709:color_trc=bt709:colorspace=bt709"
    options = ["-vf", colours]
    if kind == "webm":
        crf = round(63 - 0.53 * quality)
        options += ["-c:v", "libvpx-vp9", "-b:v", "0", "-crf", str(crf), "-row-mt", "1", "-cpu-used", "4"]
        return [*options, "-c:a", "libopus", "-b:a", "160k"]
    crf = round(51 - 0.43 * quality)
    options += ["-c:v", "libx264", "-crf", str(crf), "-c:a", "aac", "-b:a", "192k"]
    # use_metadata_tags keeps keys that mp4 does not know; faststart puts them, and the index, first.
    return [*options, "-movflags", "use_metadata_tags+faststart"]


def _run_encoder(
    command: list[str], images: Tensor, pad: tuple[int, int], name: str, progress: Progress | None
) -> None:
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)  # noqa: S603
        assert process.stdin is not None
        try:
            for done, frame in enumerate(images, 1):
                levels = frame[..., :3].detach().float().mul(255).round_().clamp_(0, 255)
                pixels = np.pad(levels.byte().cpu().numpy(), ((0, pad[0]), (0, pad[1]), (0, 0)), mode="edge")
                try:
                    process.stdin.write(pixels.tobytes())
                except OSError:  # ffmpeg has ended: its log says why
                    break
                if progress:
                    progress(done, len(images))
            with suppress(OSError):
                process.stdin.close()
            code = process.wait(ENCODE_LIMIT)
        finally:
            process.kill()
            process.wait()
            with suppress(OSError):
                process.stdin.close()
        if code:
            raise _encoder_error(name, code, log)


def _encoder_error(name: str, code: int, log: BinaryIO) -> Exception:
    said = _last_line(log)
    log.seek(0)
    if os.strerror(errno.ENOSPC).encode() in log.read():  # in any of its lines; the last is "Conversion failed!"
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    if os.name == "posix" and code == -signal.SIGKILL:
        return MemoryError(f"the system ended ffmpeg while it wrote {name}, as it does when memory runs out")
    return RuntimeError(f"ffmpeg could not write {name}: {said or f'exit status {code}'}")


def _add_gif_comment(path: Path, text: str) -> None:
    """Put a comment extension after the gif's header; ffmpeg's own gif writer stores no metadata."""
    gif, comment = path.read_bytes(), text.encode("ascii")
    parts = (comment[i : i + 255] for i in range(0, len(comment), 255))
    extension = b"\x21\xfe" + b"".join(bytes([len(part)]) + part for part in parts) + b"\0"
    colours = 3 * 2 ** ((gif[10] & 7) + 1) if gif[10] & 0x80 else 0  # the global colour table
    path.write_bytes(gif[: 13 + colours] + extension + gif[13 + colours :])
