"""The PyAV reader: its threads and memory, unusual side data, transparency, late key frames, last durations."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from tune_a_video.tav_core.media import av_reader
from tune_a_video.tav_core.media.clip import load_clip
from tune_a_video.tav_core.media.probe import VideoInfo, _last_duration

WIDTH, HEIGHT = 64, 48
ROOT = Path(__file__).resolve().parent.parent


def encoded(path: Path, frames: int, codec: str = "libx264", **options: str) -> Path:
    """A clip of grey frames that grow brighter."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, 25, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(frames):
            pixels = np.full((HEIGHT, WIDTH, 3), 40 + number % 160, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode(None))
    return path


READ = """
import ctypes, gc, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import av, psutil
package = Path(av.__file__).parent
(library,) = [*package.with_name("av.libs").glob("libavutil*"), *package.glob(".dylibs/libavutil*")]
ctypes.CDLL(str(library)).av_cpu_force_count(16)
from tav_core.media import av_reader
most = kept = 0
for _ in av_reader.frames(sys.argv[2], list(range(60)), False, None):
    most = max(most, psutil.Process().num_threads())
    kept = max(kept, sum(isinstance(each, av.VideoFrame) for each in gc.get_objects()))
print(most, kept)
"""


def test_threads_and_frames_in_memory_do_not_grow_with_the_clip(tmp_path: Path) -> None:
    """On a processor with 16 cores a scaler starts 16 threads and keeps them; one scaler serves all frames."""
    clip = encoded(tmp_path / "clip.mp4", 60)
    command = [sys.executable, "-c", READ, str(ROOT), str(clip)]
    threads, kept = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert 1 < threads <= 64
    assert kept <= 8


def test_side_data_without_a_name_is_passed_over(tmp_path: Path) -> None:
    """PyAV has no name for EXIF in Motion JPEG, or for the view numbers of a spatial video."""

    class Frame(SimpleNamespace):
        @property
        def side_data(self) -> Any:
            raise ValueError("31 is not a valid Type")

    for rotation, expected in ((0, (1, 0, 0, 1)), (90, (0, 1, -1, 0)), (-90, (0, -1, 1, 0)), (180, (-1, 0, 0, -1))):
        assert np.allclose(av_reader._display_matrix(Frame(rotation=rotation)), expected, atol=1e-6)
    with av.open(str(tmp_path / "exif.avi"), "w") as container:
        stream: Any = container.add_stream("mjpeg", 25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        exif = Image.Exif()
        exif[0x010E] = "a camera"
        for number in range(3):
            file = io.BytesIO()
            Image.new("RGB", (WIDTH, HEIGHT), (90, 90, 90)).save(file, "jpeg", exif=exif)
            packet = av.Packet(file.getvalue())
            packet.stream, packet.pts, packet.dts = stream, number, number
            container.mux(packet)
    assert load_clip(tmp_path / "exif.avi", frame_count=0, resize="keep").images.shape == (3, HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("name", ["clip.apng", "clip.gif"])
def test_transparent_pictures_lie_on_white(tmp_path: Path, name: str) -> None:
    """Colours of fully transparent pixels stay hidden."""
    frames = []
    for shift in range(3):
        pixels = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
        pixels[..., 0] = 255
        pixels[:, 20 + shift : 44, 3] = 255
        frames.append(Image.fromarray(pixels))
    kind, cleared = ("png", 1) if name.endswith("apng") else ("gif", 2)
    frames[0].save(tmp_path / name, kind, save_all=True, append_images=frames[1:], duration=100, disposal=cleared)
    images = load_clip(tmp_path / name, frame_count=0, resize="keep").images
    assert len(images) == 3
    assert (images[:, 5, 5] > 0.99).all()
    assert (images[:, 5, 40] - images.new_tensor([1.0, 0.0, 0.0])).abs().max() < 0.01


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    for kind in (np.uint8, np.uint16):
        top = np.iinfo(kind).max
        laid = av_reader._on_white(np.array([[[top, 0, 0, 0], [top, 0, 0, top // 5], [0, 0, 0, top]]], kind))
        assert np.abs(laid.astype(float) / top - [[[1, 1, 1], [1, 0.8, 0.8], [0, 0, 0]]]).max() < 2 / 255


def test_a_recording_may_begin_long_before_a_key_frame(tmp_path: Path) -> None:
    whole = encoded(tmp_path / "whole.ts", 420, g="250", sc_threshold="0").read_bytes()
    packets = len(whole) // 188
    (tmp_path / "cut.ts").write_bytes(whole[188 * (packets // 8) :])
    images = load_clip(tmp_path / "cut.ts", frame_count=0, resize="keep").images
    assert 100 < len(images) <= 170


def info(times: list[float], end: float, fps: float) -> VideoInfo:
    return VideoInfo("clip", WIDTH, HEIGHT, fps, tuple(times), end, 0.001, None, (), False, (), True)


def test_a_wrong_rate_does_not_decide_how_long_the_last_frame_lasts() -> None:
    times = [number / 30 for number in range(30)]
    assert _last_duration(0.001, 1000, times) == pytest.approx(1 / 30)
    assert _last_duration(0, 1000, times) == pytest.approx(1 / 30)
    assert _last_duration(0, 5, times) == pytest.approx(1 / 30)
    # A duration that the file states for the last frame may be long: a recording can end in a still.
    assert _last_duration(2.0, 30, times) == 2.0
    assert _last_duration(0, 25, times) == 1 / 25
    assert _last_duration(0, 25, [0.0]) == 1 / 25
    begin, end = info(times, 1.0, 1000).span([26, 29], 3)
    assert end - begin == pytest.approx(6 / 30)
