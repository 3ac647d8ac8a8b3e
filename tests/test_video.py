"""LoadVideo and SaveVideo. Clips are made here with ffmpeg; each frame shows its own number in black and white."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from tune_a_video.tav_core.errors import Refusal
from tune_a_video.tav_core.media import decode, encode, probe, process, select
from tune_a_video.tav_core.media.clip import load_clip
from tune_a_video.tav_core.media.process import CannotReadError
from tune_a_video.tav_core.media.sound import read_audio

WIDTH, HEIGHT, BITS = 96, 64, 8
GROUPS = ["-c:v", "libx264", "-g", "12", "-bf", "3", "-pix_fmt", "yuv420p"]

HALF_OPAQUE = ["-vf", "format=rgba,colorchannelmixer=aa=0.5"]
OPEN_GROUPS = ["-c:v", "mpeg4", "-bf", "2", "-g", "12", "-q:v", "2"]


def ffmpeg(*arguments: str | Path, stdin: bytes = b"") -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, input=stdin, stdout=subprocess.PIPE, check=True).stdout


def numbered(count: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Frames [count, height, width, 3] uint8: column b is white if bit b of the frame's number is set."""
    column = np.arange(width) * BITS // width
    lit = (np.arange(count)[:, None] >> column) & 1
    return np.broadcast_to((lit * 255).astype(np.uint8)[:, None, :, None], (count, height, width, 3)).copy()


def numbers(images: Tensor) -> list[int]:
    """The numbers that frames [F, H, W, 3] show, whatever their size."""
    parts = images.mean(dim=(1, 3)).tensor_split(BITS, dim=1)
    return [sum(int(part[frame].mean() > 0.5) << bit for bit, part in enumerate(parts)) for frame in range(len(images))]


def make_clip(path: Path, *options: str, count: int = 50, fps: str = "25", size: tuple[int, int] = (WIDTH, HEIGHT)):
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[0]}x{size[1]}", "-r", fps, "-i", "-"]
    ffmpeg(*raw, *(options or GROUPS), path, stdin=numbered(count, *size).tobytes())
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Good clips of 50 numbered frames (edit.mp4 hides its first ones), in containers that index differently."""
    folder = tmp_path_factory.mktemp("clips")
    made = {
        "plain.mp4": make_clip(folder / "plain.mp4"),
        # Open groups: frames shown before a key frame are stored after it, and need it.
        "open.mp4": make_clip(folder / "open.mp4", *OPEN_GROUPS),
        "open.mkv": make_clip(folder / "open.mkv", *OPEN_GROUPS),
        "long.mkv": make_clip(folder / "long.mkv", "-c:v", "libx264", "-g", "500", "-pix_fmt", "yuv420p"),
        "plain.webm": make_clip(folder / "plain.webm", "-c:v", "libvpx-vp9", "-g", "20", "-pix_fmt", "yuv420p"),
        "plain.avi": make_clip(folder / "plain.avi", "-c:v", "mpeg4", "-q:v", "2"),
        "plain.gif": make_clip(folder / "plain.gif", "-c:v", "gif"),
        "odd.mp4": make_clip(folder / "odd.mp4", "-c:v", "libx264", "-pix_fmt", "yuv444p", size=(97, 63)),
        "ten.mp4": make_clip(folder / "ten.mp4", "-c:v", "libx264", "-pix_fmt", "yuv420p10le"),
        "full.mp4": make_clip(folder / "full.mp4", "-c:v", "libx264", "-pix_fmt", "yuvj420p"),
        "alpha.webm": make_clip(folder / "alpha.webm", *HALF_OPAQUE, "-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p"),
        "alpha.mov": make_clip(folder / "alpha.mov", *HALF_OPAQUE, "-c:v", "qtrle", "-pix_fmt", "argb"),
    }
    made["plain.ts"] = folder / "plain.ts"
    ffmpeg("-i", made["plain.mp4"], "-c", "copy", made["plain.ts"])
    made["edit.mp4"] = folder / "edit.mp4"
    ffmpeg("-ss", "0.8", "-i", made["plain.mp4"], "-c", "copy", made["edit.mp4"])
    made["one.mp4"] = make_clip(folder / "one.mp4", count=1)
    return made


def first_number(name: str) -> int:
    return 20 if name == "edit.mp4" else 0


DECORD_READS = [
    "plain.mp4",
    "open.mp4",
    "open.mkv",
    "long.mkv",
    "plain.webm",
    "full.mp4",
    "alpha.webm",
]
# Containers that it numbers otherwise, colours that its scaler rounds otherwise, widths that are cropped, transparency.
DECORD_ERRS = ["plain.avi", "plain.ts", "plain.gif", "edit.mp4", "ten.mp4", "odd.mp4", "alpha.mov"]


# --- which frames --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "unit", "count", "step", "expected"),
    [
        (0, "seconds", 4, 1, [0, 1, 2, 3]),
        (0.5, "seconds", 3, 2, [5, 7, 9]),
        (0.34, "seconds", 2, 1, [3, 4]),  # the nearest frame, not the next
        (0.36, "seconds", 2, 1, [4, 5]),
        (1.94, "seconds", 5, 1, [19]),
        (7, "frames", 2, 3, [7, 10]),
        (19, "frames", 0, 1, [19]),
        (15, "frames", 24, 2, [15, 17, 19]),
        (0, "frames", 0, 7, [0, 7, 14]),
    ],
)
def test_selection(start: float, unit: str, count: int, step: int, expected: list[int]) -> None:
    times = [i / 10 for i in range(20)]
    assert select.select_frames(times, 2.0, start, unit, count, step) == expected


def test_selection_of_a_varying_rate_goes_by_time() -> None:
    times = [0.0, 0.1, 0.2, 1.0, 2.0, 3.0]
    assert select.select_frames(times, 4.0, 1.9, "seconds", 2, 1) == [4, 5]


@pytest.mark.parametrize(("start", "unit"), [(20, "frames"), (2.0, "seconds"), (1e9, "frames"), (1e9, "seconds")])
def test_no_frame_left(start: float, unit: str) -> None:
    with pytest.raises(ValueError, match=r"^start: no frame is left .* 20 frames \(2\.00 seconds\): give"):
        select.select_frames([i / 10 for i in range(20)], 2.0, start, unit, 4, 1)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"start": -1.0}, "start: -1"),
        ({"start": float("nan")}, "start: nan"),
        ({"start_unit": "minutes"}, "start_unit: 'minutes'"),
        ({"frame_count": -1}, "frame_count: -1"),
        ({"frame_step": 0}, "frame_step: 0"),
        ({"width": 508}, r"width: 508 is a size that the VAE cannot take\. .* for instance 512"),
        ({"height": 0}, "height: 0 is a size that the VAE cannot take"),
        ({"height": -8}, "height: -8 is a size that the VAE cannot take"),
        ({"width": 1_000_000}, "width: 1000000 is a size that the VAE cannot take"),
        ({"resize": "zoom"}, "resize: 'zoom' is not a way to resize"),
    ],
)
def test_impossible_settings_are_refused_before_the_file_is_touched(settings: dict, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}"):
        load_clip("not-there.mp4", **settings)


# --- how large -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "resize", "expected"),
    [
        ((1280, 720), "crop to fill", (512, 512)),
        ((1280, 720), "stretch", (512, 512)),
        ((1280, 720), "fit", (512, 288)),
        ((720, 1280), "fit", (288, 512)),
        ((64, 48), "fit", (512, 384)),
        ((5000, 10), "fit", (512, 8)),
        ((1283, 719), "keep", (1280, 712)),
    ],
)
def test_size(source: tuple[int, int], resize: str, expected: tuple[int, int]) -> None:
    assert select.fitted_size(source, 512, 512, resize) == expected


@pytest.mark.parametrize(
    ("source", "target", "resize", "expected"),
    [
        ((1280, 720), (512, 512), "crop to fill", (280, 0, 1000, 720)),
        ((720, 1280), (512, 512), "crop to fill", (0, 280, 720, 1000)),
        ((1280, 720), (512, 512), "stretch", (0, 0, 1280, 720)),
        ((1283, 719), (1280, 712), "keep", (1, 3, 1281, 715)),
        ((1280, 720), (512, 288), "fit", (0, 0, 1280, 720)),
    ],
)
def test_source_box(source: tuple[int, int], target: tuple[int, int], resize: str, expected: tuple) -> None:
    assert select.source_box(source, target, resize) == pytest.approx(expected)


def test_keep_needs_a_clip_of_eight_pixels() -> None:
    with pytest.raises(ValueError, match="^resize: the clip's 640x6 pixels are a size that the VAE cannot take"):
        select.fitted_size((640, 6), 512, 512, "keep")


def test_resize_of_a_real_frame(tmp_path: Path) -> None:
    """A white disc in the middle stays round and centred in every mode but stretch."""
    y, x = np.mgrid[:90, :160]
    disc = ((x - 79.5) ** 2 + (y - 44.5) ** 2 < 30**2).astype(np.uint8) * 255
    path = tmp_path / "disc.mkv"
    raw = ["-f", "rawvideo", "-pix_fmt", "gray", "-s", "160x90", "-r", "5", "-i", "-"]
    ffmpeg(*raw, "-c:v", "ffv1", path, stdin=disc.tobytes() * 2)
    for resize, shape, spread in [
        ("crop to fill", (64, 64), (43, 43)),
        ("fit", (32, 64), (24, 24)),
        ("stretch", (64, 64), (24, 43)),
        ("keep", (88, 160), (60, 60)),
    ]:
        image = load_clip(path, frame_count=2, width=64, height=64, resize=resize).images[0, :, :, 0]
        assert image.shape == shape
        columns, rows = ((image > 0.5).any(dim=axis).nonzero().flatten().float() for axis in (0, 1))
        assert (len(columns), len(rows)) == (pytest.approx(spread[0], abs=2), pytest.approx(spread[1], abs=2))
        assert columns.mean().item() == pytest.approx((shape[1] - 1) / 2, abs=0.51)
        assert rows.mean().item() == pytest.approx((shape[0] - 1) / 2, abs=0.51)


def test_keep_leaves_pixels_as_they_are(clips: dict[str, Path]) -> None:
    ((_, frame),) = decode.av_frames(probe.probe(clips["odd.mp4"]), [21])  # 97x63
    kept = load_clip(clips["odd.mp4"], 21, "frames", 1, resize="keep").images[0]
    assert torch.equal(kept, torch.from_numpy(frame[3:59, 0:96].copy()).float() / 255)


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*DECORD_READS, *DECORD_ERRS, "one.mp4"])
@pytest.mark.parametrize("without_decord", [False, True])
def test_exact_frames(clips: dict[str, Path], name: str, without_decord: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if without_decord:
        monkeypatch.setitem(sys.modules, "decord", None)
    total = len(probe.probe(clips[name]).times)
    assert total == {"edit.mp4": 30, "one.mp4": 1}.get(name, 50)
    for start, count, step in [(0, 0, 1), (0, 5, 4), (13, 6, 1), (17, 9, 3), (total - 1, 4, 2)]:
        if start >= total or start < 0:
            continue
        clip = load_clip(clips[name], start, "frames", count, step, resize="keep")
        wanted = list(range(start, total, step))[: count or None]
        assert numbers(clip.images) == [first_number(name) + i for i in wanted]
        assert clip.images.dtype == torch.float32 and clip.images.min() >= 0 and clip.images.max() <= 1
        assert clip.fps == pytest.approx(25 / step)
        assert clip.audio is None


@pytest.mark.parametrize("name", DECORD_READS)
def test_both_readers_give_the_same_pixels(clips: dict[str, Path], name: str) -> None:
    info = probe.probe(clips[name])
    indices = range(1, info.first_group, 3)
    pairs = zip(decode.decord_frames(info, indices), decode.av_frames(info, indices), strict=True)
    assert all((a == b).all() for (_, a), (_, b) in pairs)


@pytest.mark.parametrize("name", DECORD_ERRS)
def test_decord_is_not_asked_where_its_frame_numbers_are_wrong(clips: dict[str, Path], name: str) -> None:
    with pytest.raises(CannotReadError):
        next(decode.decord_frames(probe.probe(clips[name]), [0]))


def test_a_crash_of_decord_is_its_own_affair(
    clips: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The clip is read all the same, and the reason is in the log."""
    reader = tmp_path / "crashing.py"
    reader.write_text(
        "import io, os, runpy, sys\n"
        "job = sys.stdin.read()\n"
        'if \'"library": "decord"\' in job:\n'
        "    print('std::bad_alloc', file=sys.stderr, flush=True)\n"
        "    os.abort()\n"
        "sys.stdin = io.StringIO(job)\n"
        f"runpy.run_path({process.READER!r}, run_name='__main__')\n"
    )
    monkeypatch.setattr(process, "READER", str(reader))
    with caplog.at_level("INFO"):
        clip = load_clip(clips["plain.mp4"], 3, "frames", 4, resize="keep")
    assert numbers(clip.images) == [3, 4, 5, 6]
    assert "decord_frames leaves it to the next reader (std::bad_alloc)" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds a process to a limit of its memory")
def test_decord_has_only_so_much_memory(clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    info = probe.probe(clips["plain.mp4"])
    assert len(list(decode.decord_frames(info, range(3)))) == 3
    monkeypatch.setattr(process, "DECODER_MEMORY", 0)
    monkeypatch.setattr(process, "FRAMES_IN_FLIGHT", 1)
    with pytest.raises(CannotReadError):
        list(decode.decord_frames(info, range(3)))


def test_too_many_pixels_are_refused_by_header(clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "MAX_PIXELS", WIDTH * HEIGHT)
    assert probe.probe(clips["plain.mp4"]).width == WIDTH
    monkeypatch.setattr(probe, "MAX_PIXELS", WIDTH * HEIGHT - 1)
    with pytest.raises(ValueError, match=f"^file: 'plain.mp4' is {WIDTH}x{HEIGHT} pixels large"):
        probe.probe(clips["plain.mp4"])


def test_too_many_frames_are_refused_without_listing_them(
    clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "MAX_FRAMES", 50)
    assert len(probe.probe(clips["plain.mp4"]).times) == 50
    monkeypatch.setattr(probe, "MAX_FRAMES", 20)
    listed, read = [], probe.read

    def counted(*arguments: object, **options: object) -> Iterator[tuple[dict, bytes]]:
        for header, table in read(*arguments, **options):
            listed.append(len(table) // 32)
            yield header, table

    monkeypatch.setattr(probe, "read", counted)
    with pytest.raises(Refusal, match=r"^file: 'plain.mp4' has more than 20 frames\. Cut out the part"):
        probe.probe(clips["plain.mp4"])
    assert listed == [21]


def test_sound_that_would_fill_the_memory_is_left_out(
    clips: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged clip's last frame can be said to come in a billion years."""
    info = probe.probe(clips["plain.mp4"])
    assert read_audio(info, 0.0, 3e16) is None
    assert "do not fit in memory" in caplog.text


@pytest.mark.parametrize("name", ["open.mp4", "open.mkv", "long.mkv"])
def test_a_far_start_is_jumped_to(clips: dict[str, Path], name: str) -> None:
    info = probe.probe(clips[name])
    if name != "long.mkv":
        with pytest.raises(CannotReadError, match="may not be exact"):
            next(decode.decord_frames(info, [31]))
    assert numbers(load_clip(clips[name], 31, "frames", 9, 2, resize="keep").images) == [*range(31, 49, 2)]


@pytest.mark.parametrize("angle", [90, 180, 270])
def test_rotation_is_undone(tmp_path: Path, angle: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path, turned = make_clip(tmp_path / "a.mp4", count=6), tmp_path / "turned.mp4"
    ffmpeg("-display_rotation", str(angle), "-i", path, "-c", "copy", turned)
    info = probe.probe(turned)
    assert (info.width, info.height) == ((HEIGHT, WIDTH) if angle % 180 else (WIDTH, HEIGHT))
    shown = np.stack([frame for _, frame in decode.av_frames(info, range(6))])
    upright = np.rot90(shown, k=-angle // 90, axes=(1, 2))  # the tag counts anticlockwise
    assert numbers(torch.from_numpy(upright.copy()).float() / 255) == list(range(6))


@pytest.mark.parametrize("rate", ["24", "25", "8", "12.5", "30000/1001", "24000/1001", "60", "25/3"])
@pytest.mark.parametrize("extension", ["mp4", "webm"])
def test_frame_rate(tmp_path: Path, rate: str, extension: str) -> None:
    codec = [] if extension == "mp4" else ["-c:v", "libvpx-vp9", "-pix_fmt", "yuv420p"]
    info = probe.probe(make_clip(tmp_path / f"a.{extension}", *codec, count=10, fps=rate))
    # webm stores whole milliseconds.
    assert info.fps == pytest.approx(float(Fraction(rate)), rel=1e-6 if extension == "mp4" else 1e-3)


@pytest.mark.parametrize(
    ("stated", "times", "rate"),
    [
        ((30000, 1001), [0.0, 0.033367], 30000 / 1001),
        ((0, 1), [0.0, 4e6], 2.5e-7),
        ((1, 10_000), [0.0, 1e8], 0.0001),
        (None, [0.0, 0.5, 1.0], 2.0),
        (None, [0.0], 1.0),
    ],
)
def test_a_rate_is_never_nothing(stated: tuple[int, int] | None, times: list[float], rate: float) -> None:
    assert probe.frame_rate(stated, times) == pytest.approx(rate, rel=1e-4)


def test_a_frame_may_last_minutes(tmp_path: Path) -> None:
    clip = load_clip(make_clip(tmp_path / "a.mp4", count=3, fps="1/300"), 500.0, "seconds", 0, resize="keep")
    assert numbers(clip.images) == [2]
    assert clip.fps == pytest.approx(1 / 300, rel=1e-3)


@pytest.mark.parametrize("without_decord", [False, True])
def test_varying_frame_rate(tmp_path: Path, without_decord: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if without_decord:
        monkeypatch.setitem(sys.modules, "decord", None)
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{WIDTH}x{HEIGHT}", "-r", "25", "-i", "-"]
    path = tmp_path / "vfr.mp4"  # frames 0-9, then every third one
    sparse = ["-vf", "select=lt(n\\,10)+not(mod(n\\,3))", "-fps_mode", "vfr", *GROUPS]
    ffmpeg(*raw, *sparse, path, stdin=numbered(50).tobytes())
    expected = [*range(10), *range(12, 50, 3)]
    info = probe.probe(path)
    assert [round(time * 25) for time in info.times] == expected
    assert numbers(load_clip(path, frame_count=0, resize="keep").images) == expected
    assert numbers(load_clip(path, 30 / 25, "seconds", 2, resize="keep").images) == [30, 33]
    assert 10 < info.fps < 14


def test_fewer_frames_than_asked_are_taken_and_told(clips: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    clip = load_clip(clips["plain.mp4"], 47, "frames", 24, 1, resize="keep")
    assert numbers(clip.images) == [47, 48, 49]
    assert "3 frames are left after start and frame_step, fewer than frame_count 24" in caplog.text


def test_progress_and_stop(clips: dict[str, Path]) -> None:
    seen = []
    load_clip(clips["plain.mp4"], frame_count=3, width=64, height=64, progress=lambda *at: seen.append(at))
    assert seen == [(1, 3), (2, 3), (3, 3)]

    def stop(done: int, total: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        load_clip(clips["plain.mp4"], frame_count=3, width=64, height=64, progress=stop)


def test_too_little_memory(clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    free = namedtuple("free", "available")(2**20)
    monkeypatch.setattr(decode.psutil, "virtual_memory", lambda: free)
    with pytest.raises(ValueError, match=r"^frame_count: 50 frames of 512x512 need 0\.1 GiB of memory"):
        load_clip(clips["plain.mp4"], frame_count=0)


# --- sound ---------------------------------------------------------------------------------------


def with_sound(clip: Path, path: Path, sound: str, *options: str) -> Path:
    source = ["-f", "lavfi", "-i", sound]
    ffmpeg("-i", clip, *source, "-map", "0:v", "-map", "1:a", "-c:v", "copy", *options, path)
    return path


@pytest.mark.parametrize(("codec", "extension"), [("aac", "mp4"), ("libopus", "mkv"), ("pcm_s16le", "mov")])
def test_sound_of_the_kept_span(clips: dict[str, Path], tmp_path: Path, codec: str, extension: str) -> None:
    tone = r"aevalsrc='if(gte(t\,1)\,0.5*sin(880*PI*t)\,0)':s=48000:d=2"  # silent up to 1 s
    path = with_sound(clips["plain.mp4"], tmp_path / f"a.{extension}", tone, "-c:a", codec)
    for step, count in [(1, 25), (5, 5)]:  # stepping over frames leaves the duration as it is
        audio = load_clip(path, 0.6, "seconds", count, step, 64, 64).audio
        assert audio is not None
        assert audio["sample_rate"] == 48000
        assert audio["waveform"].dtype == torch.float32 and audio["waveform"].shape == (1, 1, 48000)
        loudness = audio["waveform"].reshape(10, 4800).square().mean(dim=1).sqrt()
        assert loudness[:3].max() < 0.02, loudness  # 0.6 s to 0.9 s
        assert loudness[5:].sub(0.5 / 2**0.5).abs().max() < 0.02, loudness  # 1.1 s to 1.6 s


def test_sound_that_starts_late_and_ends_early_is_filled_with_silence(clips: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "late.mkv"
    tone = ["-itsoffset", "0.5", "-f", "lavfi", "-i", "sine=440:d=1:sample_rate=8000"]
    ffmpeg("-i", clips["plain.mp4"], *tone, "-c:v", "copy", "-c:a", "pcm_s16le", "-ac", "2", path)
    audio = load_clip(path, 0, "seconds", 50, 1, 64, 64).audio
    assert audio is not None
    assert audio["waveform"].shape == (1, 2, 16000)
    loud = audio["waveform"][0, 0].reshape(20, 800).abs().amax(dim=1) > 0.01
    assert loud.tolist() == [False] * 5 + [True] * 10 + [False] * 5
    assert load_clip(path, 1.6, "seconds", 5, 1, 64, 64).audio is None


def test_sound_that_cannot_be_decoded_is_left_out(
    clips: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = with_sound(clips["plain.mp4"], tmp_path / "a.mkv", "sine=440:d=2", "-c:a", "libopus")
    path.write_bytes(path.read_bytes().replace(b"A_OPUS", b"A_OPUX"))
    clip = load_clip(path, frame_count=5, width=64, height=64)
    assert len(clip.images) == 5 and clip.audio is None
    assert "a.mkv: its sound cannot be decoded and is left out" in caplog.text


# --- files that are refused ----------------------------------------------------------------------


def _cut(source: Path, path: Path, part: float) -> Path:
    data = source.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    return path


def _bad_file(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.mp4"
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("hello, this is no video\n" * 100)
    elif kind == "picture":
        Image.new("RGB", (64, 64)).save(path, "PNG")
    elif kind == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(100_000))
    elif kind == "playlist":  # would make ffmpeg open another file
        make_clip(folder / "secret.ts", count=5)
        path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.ts\n#EXT-X-ENDLIST\n")
    elif kind == "concat":
        make_clip(folder / "secret.mp4", count=5)
        path.write_text("ffconcat version 1.0\nfile secret.mp4\n")
    elif kind == "folder":
        path.mkdir()
    elif kind == "audio":
        ffmpeg("-f", "lavfi", "-i", "sine=440:d=1", path)
    elif kind == "cover":  # sound with a picture on its sleeve
        Image.new("RGB", (64, 64)).save(folder / "cover.png")
        ffmpeg(
            *["-f", "lavfi", "-i", "sine=440:d=1", "-i", folder / "cover.png"],
            *["-map", "0:a", "-map", "1:v", "-c:v", "copy", "-disposition:v:0", "attached_pic", path],
        )
    elif kind == "wide":
        ffmpeg("-f", "lavfi", "-i", "color=size=20000x16:rate=5:duration=0.2", "-c:v", "ffv1", "-f", "matroska", path)
    elif kind == "cut before its index":
        _cut(make_clip(folder / "whole.mp4"), path, 0.6)
    elif kind == "cut after its index":
        _cut(make_clip(folder / "whole.mp4", *GROUPS, "-movflags", "faststart"), path, 0.6)
    elif kind == "cut near the end":
        _cut(make_clip(folder / "whole.mp4", *GROUPS, "-movflags", "faststart"), path, 0.97)
    return path


BAD_FILES = {
    "missing": r"does not exist\. Upload it again",
    "folder": r"does not exist\. Upload it again",
    "empty": r"is empty \(0 bytes\)\. Upload it again",
    "text": r"cannot be opened: it is no video, or it is truncated\. Upload it again",
    "picture": r"cannot be opened: it is no video, or it is truncated\. Upload it again",
    "noise": r"cannot be opened: it is no video, or it is truncated\. Upload it again",
    "playlist": r"cannot be opened: it is no video, or it is truncated\. Upload it again",
    "concat": r"cannot be opened: it is no video, or it is truncated\. Upload it again",
    "cut before its index": r"cannot be opened: it is no video, or it is truncated\. Upload it again",
    "cut after its index": r"is truncated: its end is missing\. Upload or download it again",
    "cut near the end": r"is truncated: its end is missing\. Upload or download it again",
    "audio": r"holds sound but no video\. Choose a file with a video track",
    "cover": r"holds sound but no video\. Choose a file with a video track",
    "wide": r"is 20000x16 pixels large\. At most 16384 a side .*: make it smaller first",
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file(tmp_path: Path, kind: str) -> None:
    path = _bad_file(kind, tmp_path)
    with pytest.raises(ValueError, match=f"^file: '{kind}.mp4' {BAD_FILES[kind]}") as error:
        load_clip(path, width=64, height=64)
    assert "\n" not in str(error.value)


def test_cut_webm(clips: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^file: 'cut.webm' is truncated: its end is missing"):
        probe.probe(_cut(clips["plain.webm"], tmp_path / "cut.webm", 0.5))


def test_nul_in_a_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^file: 'a\?b.mp4' does not exist"):
        probe.probe(f"{tmp_path}/a\0b.mp4")


def test_frames_that_cannot_be_decoded(tmp_path: Path) -> None:
    """The index is whole, the pictures are not: the listing alone cannot tell."""
    whole = make_clip(tmp_path / "a.mp4", *GROUPS, "-movflags", "faststart")
    data = bytearray(whole.read_bytes())
    begin = data.index(b"mdat") + 4
    data[begin:] = bytes(len(data) - begin)
    path = tmp_path / "hollow.mp4"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="^file: 'hollow.mp4' "):
        load_clip(path, width=64, height=64)


@pytest.mark.parametrize("name", ["plain.mp4", "plain.webm"])
def test_corrupted_files_never_hang_or_crash(clips: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Each damaged file either loads as many frames as were asked for or raises one ValueError."""
    data = clips[name].read_bytes()
    path = tmp_path / name
    outcomes = set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), 8):
            damaged[at] ^= 0xFF
        path.write_bytes(damaged)
        try:
            clip = load_clip(path, frame_count=5, width=64, height=64)
            outcomes.add("read")
            assert 1 <= len(clip.images) <= 5 and torch.isfinite(clip.images).all()
        except ValueError as error:
            outcomes.add("refused")
            assert str(error).startswith("file: ")
    assert outcomes == {"read", "refused"}


def test_a_name_with_odd_characters(clips: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "-f concat:%d é; $(rm) 'x'.mp4"
    path.write_bytes(clips["plain.mp4"].read_bytes())
    assert numbers(load_clip(path, frame_count=3, resize="keep").images) == [0, 1, 2]
    copy = tmp_path / "out %03d é; 'x'.mp4"
    encode.save_clip(torch.rand(2, 16, 16, 3), 8, copy)
    assert copy.is_file()


# --- writing -------------------------------------------------------------------------------------


def smooth_frames(count: int, width: int, height: int) -> Tensor:
    """Colour gradients that move: [F, H, W, 3] in 0..1."""
    t = torch.arange(count).reshape(-1, 1, 1) / count
    y, x = torch.linspace(0, 1, height).reshape(1, -1, 1), torch.linspace(0, 1, width).reshape(1, 1, -1)
    channels = torch.stack([(x + t).expand(count, height, width), y + 0 * x + t, 1 - x + 0 * y + t], dim=-1)
    return (channels * 3).sin() / 2 + 0.5


def psnr(a: Tensor, b: Tensor) -> float:
    return -10 * (a - b).square().mean().log10().item()


@pytest.mark.parametrize(("extension", "floor"), [("mp4", 38), ("webm", 38), ("gif", 22)])
@pytest.mark.parametrize("size", [(96, 64), (97, 63)])
@pytest.mark.parametrize("fps", [8.0, 29.97002997002997, 0.5])
def test_round_trip(tmp_path: Path, extension: str, floor: float, size: tuple[int, int], fps: float) -> None:
    images = smooth_frames(7, *size)
    path = tmp_path / f"out.{extension}"
    encode.save_clip(images, fps, path)
    info = probe.probe(path)
    # H.264 in yuv420p has even sides: an odd one is padded, never cut.
    padded = tuple(side + side % 2 for side in size) if extension == "mp4" else size
    assert (info.width, info.height) == padded
    assert len(info.times) == 7
    assert info.fps == pytest.approx(fps, rel=0.12 if extension == "gif" else 1e-3)  # gif: hundredths of a second
    frames = np.stack([frame for _, frame in decode.av_frames(info, range(7))])
    back = torch.from_numpy(frames).float()[:, : size[1], : size[0]] / 255
    assert psnr(back, images) > floor
    assert os.listdir(tmp_path) == [path.name]


def test_colours_are_tagged_and_survive_other_decoders(tmp_path: Path) -> None:
    """Flat saturated colours shift by tens of levels if the matrix written and the matrix read differ."""
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.2, 0.7, 0.4]])
    images = colours.reshape(4, 1, 1, 3).expand(4, 64, 64, 3)
    for extension in ("mp4", "webm"):
        encode.save_clip(images, 8, tmp_path / f"a.{extension}", quality=100)
        back = load_clip(tmp_path / f"a.{extension}", frame_count=0, width=64, height=64).images
        assert (back - images).abs().max() < 0.03, extension


def test_quality_and_alpha(tmp_path: Path) -> None:
    images = torch.rand(6, 64, 64, 4)
    for extension in ("mp4", "webm"):
        sizes = []
        for quality in (0, 50, 100):
            encode.save_clip(images, 8, tmp_path / f"a.{extension}", quality)
            sizes.append((tmp_path / f"a.{extension}").stat().st_size)
        assert sizes[0] < sizes[1] < sizes[2], extension


@pytest.mark.parametrize(("extension", "rate"), [("mp4", 44100), ("webm", 48000)])
@pytest.mark.parametrize(("seconds", "channels"), [(5.0, 2), (1.0, 1), (2.0, 6)])
def test_sound_is_cut_to_the_video(tmp_path: Path, extension: str, rate: int, seconds: float, channels: int) -> None:
    samples = torch.arange(int(seconds * rate)) / rate
    waveform = (0.5 * torch.sin(2 * torch.pi * 440 * samples)).repeat(1, channels, 1)
    path = tmp_path / f"a.{extension}"
    encode.save_clip(smooth_frames(16, 64, 64), 8, path, audio={"waveform": waveform, "sample_rate": rate})
    clip = load_clip(path, frame_count=0, width=64, height=64)
    assert clip.audio is not None
    assert clip.audio["waveform"].shape == (1, channels, 2 * rate) and clip.audio["sample_rate"] == rate
    loud = clip.audio["waveform"][0, 0].reshape(20, -1).square().mean(dim=1).sqrt()
    heard = int(min(seconds, 2.0) * 10)
    assert (loud[1 : heard - 1] - 0.5 / 2**0.5).abs().max() < 0.03
    assert not loud[heard + 1 :].gt(0.01).any()
    everything = read_audio(probe.probe(path), 0, 10)
    assert everything is not None
    assert everything["waveform"][0, 0, int(2.1 * rate) :].abs().max() < 0.01  # nothing after the video's end


def test_gif_has_no_sound(tmp_path: Path) -> None:
    audio = {"waveform": torch.zeros(1, 1, 8000), "sample_rate": 8000}
    encode.save_clip(smooth_frames(4, 64, 64), 8, tmp_path / "a.gif", audio=audio)
    assert not probe.probe(tmp_path / "a.gif").has_audio


METADATA = {
    "prompt": {"1": {"class_type": "TAV_SaveVideo", "inputs": {"text": "a=b; #c \\ \n é 'q' \"r\""}}},
    "workflow": {"nodes": list(range(100_000)), "title": "long"},
}


@pytest.mark.parametrize("extension", ["mp4", "webm"])
def test_metadata(tmp_path: Path, extension: str) -> None:
    """The same keys and JSON as the host's SaveVideo, also where they are longer than a command line may be."""
    path = tmp_path / f"a.{extension}"
    audio = {"waveform": torch.zeros(1, 1, 8000), "sample_rate": 8000}
    encode.save_clip(smooth_frames(4, 64, 64), 8, path, audio=audio, metadata=METADATA)
    container = pytest.importorskip("av").open(str(path))
    stored = {key.lower(): value for key, value in container.metadata.items()}
    for key, value in METADATA.items():
        assert stored[key] == json.dumps(value)
    if extension == "mp4":  # where the front end looks: keys of type mdta, ahead of the frames
        data = path.read_bytes()
        assert data.index(b"mdtaworkflow") < data.index(b"mdat\0" if b"mdat\0" in data else b"mdat")


def test_gif_comment(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    encode.save_clip(smooth_frames(4, 64, 64), 8, path, metadata=METADATA)
    with Image.open(path) as image:
        assert image.n_frames == 4
        assert json.loads(image.info["comment"]) == METADATA
    assert len(probe.probe(path).times) == 4


def _nothing() -> Tensor:
    return smooth_frames(4, 16, 16)


def _with(value: float) -> Tensor:
    images = _nothing()
    images[2, 3, 4, 1] = value
    return images


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"images": _with(float("nan"))}, "images: frame 2 holds NaN"),
        ({"images": _with(float("inf"))}, "images: frame 2 holds NaN or infinite"),
        ({"images": torch.zeros(16, 16, 3)}, r"images: shape \[16, 16, 3\]"),
        ({"images": torch.zeros(0, 16, 16, 3)}, r"images: shape \[0, 16, 16, 3\]"),
        ({"images": torch.zeros(4, 16, 16, 1)}, r"images: shape \[4, 16, 16, 1\]"),
        ({"images": torch.zeros(1, 4, 16, 16, 3)}, r"images: shape \[1, 4, 16, 16, 3\]"),
        ({"images": torch.zeros(1, 8, 17000, 3)}, "images: frames of 17000x8 pixels are larger than mp4"),
        ({"images": torch.zeros(1, 17000, 8, 3), "path": "a.gif"}, "images: frames of 8x17000 pixels"),
        ({"fps": 0.0}, "fps: 0"),
        ({"fps": -8.0}, "fps: -8"),
        ({"fps": float("nan")}, "fps: nan"),
        ({"fps": 60.0, "path": "a.gif"}, "fps: gif cannot play 60"),
        ({"quality": 101}, "quality: 101"),
        ({"path": "a.avi"}, r"format: 'avi' is not a format\. Choose one of mp4, webm, gif"),
        ({"audio": {"waveform": torch.full((1, 1, 9), float("nan")), "sample_rate": 8}}, "audio: "),
        ({"audio": {"waveform": torch.zeros(9), "sample_rate": 8}}, r"audio: a waveform of shape \[9\]"),
        ({"audio": {"waveform": torch.zeros(1, 1, 9), "sample_rate": 0}}, "audio: .* at 0 Hz"),
    ],
)
def test_what_cannot_be_encoded_is_refused_before_any_work(
    tmp_path: Path, change: dict, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*arguments: object) -> None:
        raise AssertionError("ffmpeg was started")

    monkeypatch.setattr(encode, "_run_encoder", work)
    settings = {"images": _nothing(), "fps": 8.0, "path": "a.mp4", **change}
    with pytest.raises(ValueError, match=f"^{named}"):
        encode.save_clip(**{**settings, "path": tmp_path / settings["path"]})
    assert os.listdir(tmp_path) == []


def test_nothing_is_left_behind_when_encoding_stops(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_text("the file before")

    def stop(done: int, total: int) -> None:
        assert len(os.listdir(tmp_path)) <= 2
        if done == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        encode.save_clip(smooth_frames(200, 64, 64), 8, path, progress=stop)
    assert os.listdir(tmp_path) == ["a.mp4"]
    assert path.read_text() == "the file before"


def test_a_failing_ffmpeg_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_codec_options", lambda *_: ["-c:v", "no_such_codec"])
    with pytest.raises(RuntimeError, match="^ffmpeg could not write a.mp4: .*[Uu]nknown encoder|^ffmpeg .*Error"):
        encode.save_clip(smooth_frames(50, 256, 256), 8, tmp_path / "a.mp4")
    assert os.listdir(tmp_path) == []


# --- real clips ----------------------------------------------------------------------------------


@pytest.mark.shared
def test_real_clips(shared_videos: list[Path]) -> None:
    expected = {
        "car-turn.mp4": (80, 480, 480, 10.0, False),
        "man-skiing.mp4": (91, 718, 718, 30000 / 1001, True),
        "man-surfing.mp4": (72, 656, 656, 24.0, False),
    }
    for path in shared_videos:
        info = probe.probe(path)
        found = len(info.times), info.width, info.height, pytest.approx(info.fps, rel=1e-6), info.has_audio
        assert found == expected[path.name]
        assert info.plain == (path.name != "man-skiing.mp4")  # 718 pixels wide, coded as 720
        if info.plain:
            indices = range(5, info.first_group, 20)
            pairs = zip(decode.decord_frames(info, indices), decode.av_frames(info, indices), strict=True)
            assert all((a == b).all() for (_, a), (_, b) in pairs), path.name
        clip = load_clip(path, 0, "seconds", 24, 2)
        assert clip.images.shape == (24, 512, 512, 3)
        assert clip.fps == pytest.approx(info.fps / 2)
        if info.has_audio:
            assert clip.audio is not None
            assert clip.audio["waveform"].shape[-1] == pytest.approx(48 / info.fps * clip.audio["sample_rate"], abs=2)


# --- the nodes -----------------------------------------------------------------------------------


@pytest.fixture
def nodes() -> SimpleNamespace:
    import folder_paths
    from tune_a_video.nodes.load_video import LoadVideo
    from tune_a_video.nodes.save_video import SaveVideo

    return SimpleNamespace(LoadVideo=LoadVideo, SaveVideo=SaveVideo, folder_paths=folder_paths)


@pytest.fixture
def input_folder(
    nodes: SimpleNamespace, clips: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    folder = tmp_path / "input"
    folder.mkdir()
    (folder / "clip.mp4").write_bytes(clips["plain.mp4"].read_bytes())
    for kind in ("input", "output", "temp"):
        monkeypatch.setattr(nodes.folder_paths, f"{kind}_directory", str(tmp_path / kind))
    return folder


def hidden(node: type, prompt: object = None, extra_pnginfo: object = None) -> type:
    """The node as the host runs it: a copy of the class that carries the hidden inputs."""
    values = SimpleNamespace(prompt=prompt, extra_pnginfo=extra_pnginfo)
    return type(node.__name__, (node,), {"hidden": values})


@pytest.mark.comfyui
def test_schemas(nodes: SimpleNamespace, input_folder: Path) -> None:
    load, save = nodes.LoadVideo.define_schema(), nodes.SaveVideo.define_schema()
    assert load.node_id == "TAV_LoadVideo" and save.node_id == "TAV_SaveVideo"
    for schema in (load, save):
        assert schema.category == "Tune-A-Video" and schema.description
        assert all(part.tooltip for part in [*schema.inputs, *schema.outputs])
    names = ["file", "start", "start_unit", "frame_count", "frame_step", "width", "height", "resize"]
    assert [part.id for part in load.inputs] == names
    assert [part.default for part in load.inputs[1:]] == [0.0, "seconds", 24, 1, 512, 512, "crop to fill"]
    assert [part.display_name for part in load.outputs] == ["images", "fps", "frame_count", "audio"]
    assert load.inputs[0].options == ["clip.mp4"]
    assert [part.id for part in save.inputs] == ["images", "fps", "filename_prefix", "format", "quality", "audio"]
    assert [part.default for part in save.inputs[1:5]] == [8.0, "TuneAVideo/video", "mp4", 80]
    assert [part.display_name for part in save.outputs] == ["video", "path"]
    assert save.is_output_node
    for node, schema in ((nodes.LoadVideo, load), (nodes.SaveVideo, save)):
        assert list(inspect.signature(node.execute).parameters) == [part.id for part in schema.inputs]


@pytest.mark.comfyui
def test_paths_outside_the_input_folder_are_refused(nodes: SimpleNamespace, input_folder: Path) -> None:
    check: Callable = nodes.LoadVideo.validate_inputs
    assert check(file="clip.mp4") is True
    assert check(file="clip.mp4 [input]") is True
    assert check(file=None) is True  # linked
    outside = input_folder.parent / "secret.mp4"
    outside.write_bytes(b"secret")
    (input_folder / "link.mp4").symlink_to(outside)
    (input_folder / "away").symlink_to(input_folder.parent)
    (input_folder.parent / "output").mkdir()
    (input_folder.parent / "output" / "clip.mp4").write_bytes(b"secret")
    for name in (
        "../secret.mp4",
        str(outside),
        "link.mp4",
        "away/secret.mp4",
        "x/../../secret.mp4",
    ):
        assert check(file=name) == f"'{name}' is outside the input folder. Copy it there, or upload it."
        with pytest.raises(ValueError, match="is outside the input folder"):
            nodes.LoadVideo.execute(name, 0.0, "seconds", 4, 1, 64, 64, "fit")
    for kind in ("output", "temp"):
        assert check(file=f"../secret.mp4 [{kind}]").startswith(
            f"'../secret.mp4 [{kind}]' is outside the {kind} folder."
        )
    assert check(file="clip.mp4 [output]") is True
    assert check(file="clip.mp4 [temp]").startswith("'clip.mp4 [temp]' is not in the temp folder.")
    for name in ("a\0b.mp4", "", 5, "a\ud800b.mp4"):
        assert check(file=name).endswith("is not the name of a file. Choose one from the list or upload one.")
    for name in ("gone.mp4", "folder/gone.mp4"):
        assert check(file=name) == f"'{name}' is not in the input folder. Upload it, or choose another one."


@pytest.mark.comfyui
def test_files_of_the_output_folder_load(nodes: SimpleNamespace, input_folder: Path, clips: dict[str, Path]) -> None:
    for kind in ("output", "temp"):
        (input_folder.parent / kind).mkdir(exist_ok=True)
        (input_folder.parent / kind / "made.mp4").write_bytes(clips["plain.mp4"].read_bytes())
        name = f"made.mp4 [{kind}]"
        assert nodes.LoadVideo.validate_inputs(file=name) is True and nodes.LoadVideo.fingerprint_inputs(file=name)
        images = nodes.LoadVideo.execute(name, 3, "frames", 2, 1, 96, 64, "keep").args[0]
        assert numbers(images) == [3, 4]


@pytest.mark.comfyui
def test_hosts_words_for_other_folders_are_not_heard(
    nodes: SimpleNamespace, input_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Newer hosts raise by themselves in get_annotated_filepath."""

    def raising(*_: object) -> str:
        raise ValueError("the host's words")

    monkeypatch.setattr(nodes.folder_paths, "get_annotated_filepath", raising)
    assert nodes.LoadVideo.validate_inputs(file="../x.mp4").startswith("'../x.mp4' is outside the input folder.")
    assert nodes.LoadVideo.validate_inputs(file="clip.mp4") is True


@pytest.mark.comfyui
def test_the_list_has_what_can_be_read_whatever_the_system_calls_it(
    nodes: SimpleNamespace, input_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes.folder_paths, "filter_files_content_types", lambda files, kinds: [])
    names = ["a.mkv", "b.m4v", "c.MTS", "d.ts", "e.m2ts", "f.flv", "g.gif", "h.WMV", "i.3gp", "j.mxf"]
    for name in [*names, "notes.txt", "photo.png", "sound.wav", "mkv"]:
        (input_folder / name).touch()
    assert nodes.LoadVideo.define_schema().inputs[0].options == sorted([*names, "clip.mp4"])


def test_the_button_takes_what_the_list_does() -> None:
    script = (Path(__file__).parent.parent / "web" / "js" / "upload.js").read_text()
    listed = script[script.index("const EXTENSIONS") : script.index("split")]
    assert tuple(re.findall(r"\.\w+", listed)) == probe.EXTENSIONS


@pytest.mark.comfyui
def test_fingerprint(nodes: SimpleNamespace, input_folder: Path) -> None:
    fingerprint: Callable = nodes.LoadVideo.fingerprint_inputs
    before = fingerprint(file="clip.mp4", start=0.0, width=None)
    assert before == fingerprint(file="clip.mp4", start=0.0, width=None)
    content = (input_folder / "clip.mp4").read_bytes()
    os.utime(input_folder / "clip.mp4", (1, 1))
    assert fingerprint(file="clip.mp4", start=0.0, width=None) == before
    (input_folder / "other.mp4").write_bytes(content)
    assert fingerprint(file="other.mp4", start=0.0, width=None) == before
    (input_folder / "clip.mp4").write_bytes(content[:-1] + b"x")
    assert fingerprint(file="clip.mp4", start=0.0, width=None) != before
    for name in (None, "gone.mp4", "../x", "a\0b", 5):
        assert fingerprint(file=name, start=None) == ""


@pytest.mark.comfyui
def test_load_then_save(nodes: SimpleNamespace, input_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, fps, count, audio = nodes.LoadVideo.execute("clip.mp4", 0.4, "seconds", 6, 2, 96, 64, "fit").args
    assert numbers(images) == [10, 12, 14, 16, 18, 20]
    assert (fps, count, audio) == (12.5, 6, None)
    node = hidden(nodes.SaveVideo, prompt=METADATA["prompt"], extra_pnginfo={"workflow": METADATA["workflow"]})
    for number, extension in enumerate(("mp4", "webm", "gif", "mp4"), 1):
        output = node.execute(images, fps, "TuneAVideo/video", extension, 80)
        saved, path = output.args
        assert path == str(input_folder.parent / "output" / "TuneAVideo" / f"video_{number:05}_.{extension}")
        assert saved.get_dimensions() == (96, 64)
        components = saved.get_components()
        assert numbers(components.images[..., :3]) == [10, 12, 14, 16, 18, 20]
        shown = output.ui if isinstance(output.ui, dict) else output.ui.as_dict()
        assert shown["animated"] == (True,)
        entry = {"filename": f"video_{number:05}_.{extension}", "subfolder": "TuneAVideo", "type": "output"}
        if extension == "gif":
            assert shown["gifs"] == [entry]
            (preview,) = shown["images"]
            assert preview["type"] == "temp"
            assert len(probe.probe(input_folder.parent / "temp" / preview["filename"]).times) == 6
        else:
            assert shown["images"] == [entry]
            stored = {key.lower(): value for key, value in components.metadata.items()}
            assert json.loads(stored["workflow"]) == METADATA["workflow"]
            assert json.loads(stored["prompt"]) == METADATA["prompt"]
            assert float(components.frame_rate) == pytest.approx(12.5)
    monkeypatch.setattr("comfy.cli_args.args.disable_metadata", True)
    _, path = node.execute(images, fps, "bare", "mp4", 80).args
    assert b"TAV_SaveVideo" not in Path(path).read_bytes()


@pytest.mark.comfyui
@pytest.mark.parametrize("prefix", ["../x", "/x", "a/../../x", "a\0b"])
def test_saving_stays_in_the_output_folder(nodes: SimpleNamespace, input_folder: Path, prefix: str) -> None:
    with pytest.raises(ValueError, match="^filename_prefix: "):
        hidden(nodes.SaveVideo).execute(_nothing(), 8.0, prefix, "mp4", 80)
    assert not [name for name in os.listdir(input_folder.parent) if name not in ("input", "output")]
