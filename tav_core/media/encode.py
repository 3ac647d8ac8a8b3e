"""Frames as video files, by the ffmpeg program that imageio-ffmpeg brings."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from fractions import Fraction
from math import ceil, isfinite
from pathlib import Path
from typing import Any, BinaryIO

import imageio_ffmpeg
import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ..cancel import raise_if_cancelled
from ..errors import Refusal
from .decode import Progress
from .pictures import check_shape
from .process import last_line
from .select import MAX_SIDE
from .sound import Audio

FORMATS = ("mp4", "webm", "gif")
_MOST_CHANNELS = 8
# ffmpeg takes three and four channels for layouts that Opus does not have.
_OPUS_LAYOUTS = {3: "channelmap=map=0|1|2:channel_layout=3.0", 4: "channelmap=map=0|1|2|3:channel_layout=quad"}
ENCODE_LIMIT = 1800  # seconds after the last frame was handed over
_SECONDS_BETWEEN_CHECKS = 0.25


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
    complete. Raises Refusal, before any work, for frames or sound that cannot be encoded, OSError for a disk
    that is full or cannot be written to, MemoryError or RuntimeError if ffmpeg fails for want of memory or otherwise.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    _check_encodable(images, fps, kind, quality)
    rate = Fraction(fps).limit_denominator(1001)
    frames, height, width = images.shape[:3]
    pad = (height % 2, width % 2) if kind == "mp4" else (0, 0)
    partial = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")
    layout_options: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        command = [_ffmpeg(), "-hide_banner", "-loglevel", "error", "-f", "rawvideo"]
        command += ["-pix_fmt", "rgb24", "-s", f"{width + pad[1]}x{height + pad[0]}", "-r", str(rate)]
        command += ["-i", "pipe:0"]
        if audio is not None and kind == "gif":
            logging.info("%s: gif has no sound, it is left out", path.name)
        elif audio is not None and (sound := _waveform(audio, path.name)) is not None:
            command += _audio_input(*sound, frames / rate, Path(scratch) / "sound.f32")
            if kind == "webm" and len(sound[0]) in _OPUS_LAYOUTS:
                layout_options = ["-af", _OPUS_LAYOUTS[len(sound[0])]]
        if metadata and kind != "gif":
            # In a file, because a workflow can be longer than a command line may be.
            tags = Path(scratch) / "tags.txt"
            tags.write_text(_ffmetadata(metadata), encoding="utf-8")
            command += ["-f", "ffmetadata", "-i", _file_url(tags), "-map_metadata", str(command.count("-i"))]
        command += [*_codec_options(kind, quality), *layout_options, _file_url(partial)]
        try:
            _run_encoder(command, images, pad, path.name, progress)
            if metadata and kind == "gif":
                _add_gif_comment(partial, json.dumps(metadata))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _ffmpeg() -> str:
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise _no_ffmpeg(error) from None


def _no_ffmpeg(error: Exception) -> RuntimeError:
    reason = str(error).strip().split("\n")[0]
    return RuntimeError(
        f"No ffmpeg can be started, and nothing was saved ({reason}). Install imageio-ffmpeg again, or set"
        " IMAGEIO_FFMPEG_EXE to the path of an ffmpeg, and restart ComfyUI."
    )


def _file_url(path: Path) -> str:
    return f"file:{path}"  # without the scheme, a colon in a name would be taken for one


def _check_encodable(images: Tensor, fps: float, kind: str, quality: int) -> None:
    if kind not in FORMATS:
        raise Refusal("format", f"{kind!r} is not a format", f"Choose one of {', '.join(FORMATS)}.")
    check_shape("images", images)
    if max(images.shape[1:3]) > MAX_SIDE:
        reason = f"frames of {images.shape[2]}x{images.shape[1]} pixels are larger than {kind} and Load Video take"
        raise Refusal("images", reason, f"Scale them to at most {MAX_SIDE} a side.")
    if not isfinite(fps) or fps < 0.01:
        raise Refusal("fps", f"{fps} frames a second cannot be played", "Give 0.01 or more.")
    if kind == "gif" and fps > 50:
        raise Refusal("fps", f"gif cannot play {fps:g} frames a second", "Give at most 50, or choose mp4.")
    if not 0 <= quality <= 100:
        raise Refusal("quality", f"{quality} is outside 0..100", "Give a value between those.")
    for index, frame in enumerate(images):
        if not torch.isfinite(frame).all():
            raise Refusal(
                "images",
                f"frame {index} holds NaN or infinite values",
                "Check the nodes before this one. The usual cause is a VAE in fp16: start ComfyUI with --fp32-vae.",
            )


def _waveform(audio: Audio, name: str) -> tuple[Tensor, int] | None:
    """Return an AUDIO's sound [channels, samples] and its rate, None where it has none. Raises Refusal for no sound."""
    try:
        waveform, rate = torch.as_tensor(audio["waveform"]), float(audio["sample_rate"])
    except Exception as error:  # other packs' mappings read a file when they are asked, which may have no sound
        logging.warning("%s: its sound cannot be read and is left out (%s)", name, error)
        return None
    shape = list(waveform.shape)
    if len(shape) == 3 and 0 in shape:
        return None
    if len(shape) != 3 or not rate >= 1 or not torch.isfinite(waveform).all():
        raise Refusal(
            "audio",
            f"a waveform of shape {shape} at {rate:g} Hz is not sound [1, channels, samples] without NaN",
            "Connect another AUDIO, or none.",
        )
    heard = waveform[0].detach().float().cpu()
    if not waveform.is_floating_point():  # as files have it, where the host has -1 to 1
        info = torch.iinfo(waveform.dtype)
        middle = (info.max + info.min + 1) / 2
        heard = (heard - middle) / (info.max + 1 - middle)
    if len(heard) > _MOST_CHANNELS:  # more than formats have names for
        heard = heard.mean(0, keepdim=True)
    return heard, round(rate)


def _audio_input(heard: Tensor, rate: int, seconds: Fraction, raw: Path) -> list[str]:
    """Return ffmpeg's options for the sound as one more input; write its samples to the file ``raw``."""
    heard = heard[:, : ceil(seconds * rate)]
    raw.write_bytes(rearrange(heard, "c n -> n c").numpy().astype("<f4").tobytes())
    return ["-f", "f32le", "-ar", str(rate), "-ac", str(len(heard)), "-i", _file_url(raw)]


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
    colours = "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int,format=yuv420p"
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
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)  # noqa: S603
        except OSError as error:
            if error.errno == errno.ENOMEM:
                raise
            raise _no_ffmpeg(error) from error
        assert process.stdin is not None
        try:
            for done, frame in enumerate(images, 1):
                levels = frame[..., :3].detach().float().mul(255).round_().clamp_(0, 255)
                pixels = np.pad(levels.byte().cpu().numpy(), ((0, pad[0]), (0, pad[1]), (0, 0)), mode="edge")
                try:
                    process.stdin.write(pixels.tobytes())
                except OSError:  # ffmpeg has ended: its log says why
                    break
                raise_if_cancelled()
                if progress:
                    progress(done, len(images))
            with suppress(OSError):
                process.stdin.close()
            code = _waited_for(process, name)
        finally:
            process.kill()
            process.wait()
            with suppress(OSError):
                process.stdin.close()
        if code:
            raise _encoder_error(name, code, log)


def _waited_for(process: subprocess.Popen[bytes], name: str) -> int:
    """Return the exit status of an encoder that has all frames. A gif's palette takes most of its time then."""
    end = time.monotonic() + ENCODE_LIMIT
    while time.monotonic() < end:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(_SECONDS_BETWEEN_CHECKS)
        raise_if_cancelled()
    raise RuntimeError(
        f"ffmpeg did not finish {name} within {ENCODE_LIMIT} seconds after its last frame, and nothing was saved. Save "
        "fewer frames at a time, or choose mp4."
    )


def _encoder_error(name: str, code: int, log: BinaryIO) -> Exception:
    said = last_line(log)
    log.seek(0)
    if os.strerror(errno.ENOSPC).encode() in log.read():  # in any of its lines; the last is "Conversion failed!"
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    if os.name == "posix" and code == -signal.SIGKILL:
        return MemoryError(f"the system ended ffmpeg while it wrote {name}, as it does when memory runs out")
    return RuntimeError(
        f"ffmpeg could not write {name}: {said or f'exit status {code}'}. Choose another format, or reinstall "
        "imageio-ffmpeg."
    )


def _add_gif_comment(path: Path, text: str) -> None:
    """Put a comment extension after the gif's header; ffmpeg's own gif writer stores no metadata."""
    gif, comment = path.read_bytes(), text.encode("ascii")
    parts = (comment[i : i + 255] for i in range(0, len(comment), 255))
    extension = b"\x21\xfe" + b"".join(bytes([len(part)]) + part for part in parts) + b"\0"
    colours = 3 * 2 ** ((gif[10] & 7) + 1) if gif[10] & 0x80 else 0  # the global colour table
    path.write_bytes(gif[: 13 + colours] + extension + gif[13 + colours :])
