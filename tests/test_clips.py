"""Load Video gives what a player shows and plays: colours, shapes, times and sound of clips of all kinds.

Clips are made here with ffmpeg, whose zscale filter converts colours independently of the code under test.
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from tune_a_video.tav_core.errors import Refusal
from tune_a_video.tav_core.media.clip import Clip, load_clip
from tune_a_video.tav_core.media.encode import save_clip
from tune_a_video.tav_core.media.ictcp import rgb_of_ictcp

COLOURS = [
    (0, 185, 0),
    (185, 0, 0),
    (0, 0, 185),
    (224, 32, 64),
    (40, 90, 160),
    (190, 190, 190),
    (20, 20, 20),
    (250, 220, 60),
]
PATCH = 32


def ffmpeg(*arguments: str | Path, stdin: bytes = b"") -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, input=stdin, stdout=subprocess.PIPE, check=True).stdout


def patches(colours: list[tuple[int, int, int]] = COLOURS, width: int = 4 * PATCH) -> np.ndarray:
    """One frame [h, width, 3] uint8 of square patches, row by row."""
    rows = np.array(colours, np.uint8).reshape(-1, width // PATCH, 3)
    return rows.repeat(PATCH, 0).repeat(PATCH, 1)


def raw(size: tuple[int, int], rate: str = "5") -> list[str]:
    return ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[0]}x{size[1]}", "-r", rate, "-i", "-"]


def coded(path: Path, frame: np.ndarray, filters: str, *options: str, count: int = 3) -> Path:
    """A clip of one frame, ``count`` times, through ffmpeg's filters."""
    size = frame.shape[1], frame.shape[0]
    ffmpeg(*raw(size), "-vf", filters, *options, path, stdin=frame.tobytes() * count)
    return path


def shown_patches(clip: Clip, width: int = 4 * PATCH) -> list[tuple[int, int, int]]:
    """The colours in the middles of the patches of a clip's first frame."""
    image = (clip.images[0] * 255).round().int()
    scale = image.shape[1] // (width // PATCH)
    middles = image[scale // 2 :: scale, scale // 2 :: scale].reshape(-1, 3)
    return [tuple(each) for each in middles.tolist()]


def furthest(found: list[tuple[int, int, int]], expected: list[tuple[int, int, int]] = COLOURS) -> int:
    assert len(found) == len(expected)
    return int(np.abs(np.array(found) - np.array(expected)).max())


# --- colours -------------------------------------------------------------------------------------

X264 = ["-c:v", "libx264", "-qp", "4", "-pix_fmt", "yuv444p"]
MATRICES = {"bt709": "bt709", "smpte170m": "170m", "bt470bg": "470bg", "smpte240m": "2020_ncl", "bt2020nc": "2020_ncl"}


@pytest.mark.parametrize("tagged_range", ["tv", "pc"])
@pytest.mark.parametrize("matrix", ["bt709", "smpte170m", "bt470bg", "fcc", "smpte240m", "bt2020nc", "ycgco"])
def test_matrix_and_range(tmp_path: Path, matrix: str, tagged_range: str) -> None:
    name = {"bt2020nc": "2020_ncl", "smpte170m": "170m", "bt470bg": "470bg", "bt709": "709"}.get(matrix, matrix)
    filters = (
        f"zscale=m={name}:r={tagged_range}:rin=pc,format=yuv444p,setparams=colorspace={matrix}:range={tagged_range}"
    )
    path = coded(tmp_path / "a.mp4", patches(), filters, *X264)
    assert furthest(shown_patches(load_clip(path, resize="keep"))) <= 4


@pytest.mark.parametrize(
    ("size", "matrix"),
    [((1280, 720), "709"), ((720, 1280), "709"), ((640, 480), "170m"), ((1920, 1080), "709"), ((720, 576), "470bg")],
)
@pytest.mark.parametrize("pixels", ["yuv420p", "yuv420p10le"])
def test_untagged_clips_have_the_matrix_of_their_size(
    tmp_path: Path, size: tuple[int, int], matrix: str, pixels: str
) -> None:
    frame = np.full((size[1], size[0], 3), (224, 32, 64), np.uint8)
    untagged = "setparams=colorspace=unknown:color_primaries=unknown:color_trc=unknown"
    filters = f"zscale=m={matrix}:r=tv:rin=pc,format={pixels},{untagged}"
    path = coded(tmp_path / "a.mp4", frame, filters, "-c:v", "libx264", "-qp", "4", count=2)
    clip = load_clip(path, width=64, height=64)
    assert furthest([tuple((clip.images[0, 32, 32] * 255).round().int().tolist())], [(224, 32, 64)]) <= 4


@pytest.mark.parametrize("transfer", ["arib-std-b67", "smpte2084"])
@pytest.mark.parametrize("codec", ["hevc", "vp9", "tags missing"])
def test_hdr_is_shown_as_sdr(tmp_path: Path, transfer: str, codec: str) -> None:
    filters = f"zscale=rin=pc:pin=709:tin=709:p=2020:t={transfer}:m=2020_ncl:r=tv,format=yuv444p10le"
    options = (
        ["-c:v", "libvpx-vp9", "-lossless", "1"]
        if codec == "vp9"
        else ["-c:v", "libx265", "-x265-params", "lossless=1:log-level=none"]
    )
    if codec == "tags missing":
        filters += ",setparams=color_primaries=unknown:colorspace=unknown"
    path = coded(tmp_path / ("a.webm" if codec == "vp9" else "a.mov"), patches(), filters, *options)
    assert furthest(shown_patches(load_clip(path, resize="keep"))) <= 14


def test_hdr_whose_matrix_is_ictcp(tmp_path: Path) -> None:
    filters = "zscale=rin=pc:pin=709:tin=709:p=2020:t=smpte2084:m=ictcp:r=tv,format=yuv444p12le"
    path = coded(tmp_path / "a.mp4", patches(), filters, "-c:v", "libx265", "-x265-params", "lossless=1:log-level=none")
    assert furthest(shown_patches(load_clip(path, resize="keep"))) <= 14


def test_ictcp_of_hlg_as_bt2100_defines_it() -> None:
    """zscale applies HLG's gamma to L, M and S, which the standard does not: the forward way is written out here."""
    rgb = np.random.default_rng(0).uniform(0.05, 0.95, (4, 5, 3))
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    light = np.where(rgb <= 0.5, rgb**2 / 3, (np.exp((rgb - c) / a) + b) / 12)
    lms = light @ np.array([[1688, 2146, 262], [683, 2951, 462], [99, 309, 3688]]).T / 4096
    coded_lms = np.where(lms <= 1 / 12, np.sqrt(3 * lms), a * np.log(np.maximum(12 * lms - b, 1e-9)) + c)
    planes = coded_lms @ np.array([[2048, 2048, 0], [3625, -7465, 3840], [9500, -9212, -288]]).T / 4096
    assert np.abs(rgb_of_ictcp(*np.moveaxis(planes, -1, 0), hlg=True) - rgb).max() < 1e-4


def test_highlights_of_hdr_are_not_cut_off(tmp_path: Path) -> None:
    """A ramp up to 1000 nits rises everywhere; its darker half is as it would be without the highlights."""
    ramp = np.linspace(0, 255, 128).astype(np.uint8).reshape(1, -1, 1).repeat(64, 0).repeat(3, 2)
    filters = "zscale=rin=pc:pin=709:tin=709:p=2020:t=smpte2084:m=2020_ncl:r=tv:npl=1000,format=yuv444p10le"
    path = coded(tmp_path / "a.mov", ramp, filters, "-c:v", "libx265", "-x265-params", "lossless=1:log-level=none")
    shown = load_clip(path, resize="keep").images[0, 32].mean(-1)
    assert shown[-1] > 0.97
    assert (shown[4:-2:4].diff() > 0).all()


@pytest.mark.parametrize(
    ("primaries", "transfer"), [("2020", "2020_10"), ("smpte432", "709"), ("2020", "linear"), ("709", "linear")]
)
def test_wide_primaries_and_linear_light(tmp_path: Path, primaries: str, transfer: str) -> None:
    filters = f"zscale=rin=pc:pin=709:tin=709:p={primaries}:t={transfer}:m=2020_ncl:r=tv,format=yuv444p12le"
    path = coded(tmp_path / "a.mov", patches(), filters, "-c:v", "libx265", "-x265-params", "lossless=1:log-level=none")
    assert furthest(shown_patches(load_clip(path, resize="keep"))) <= (12 if transfer == "linear" else 8)


@pytest.mark.parametrize("tagged_range", ["tv", "pc"])
def test_grey(tmp_path: Path, tagged_range: str) -> None:
    greys = [(v, v, v) for v in (0, 60, 128, 255)]
    path = coded(
        tmp_path / "a.mkv",
        patches(greys),
        f"scale=out_range={tagged_range},format=yuv444p,extractplanes=y,setparams=range={tagged_range}",
        "-c:v",
        "libx264",
        "-qp",
        "1",
        "-color_range",
        tagged_range,
    )
    assert furthest(shown_patches(load_clip(path, resize="keep")), greys) <= 3


# --- geometry ------------------------------------------------------------------------------------


def corners(width: int, height: int) -> np.ndarray:
    """A frame with a red left upper, a green right upper, a blue left lower and a grey right lower quarter."""
    frame = np.full((height, width, 3), 128, np.uint8)
    frame[: height // 2, : width // 2] = (220, 30, 30)
    frame[: height // 2, width // 2 :] = (30, 220, 30)
    frame[height // 2 :, : width // 2] = (30, 30, 220)
    return frame


def quarters(image: Tensor) -> str:
    """Return the first letters of the colours of an image's four quarters [h, w, 3], row by row."""
    height, width = image.shape[:2]
    found = ""
    for y in (height // 4, 3 * height // 4):
        for x in (width // 4, 3 * width // 4):
            pixel = image[y, x]
            found += "x" if pixel.std() < 0.1 else "rgb"[int(pixel.argmax())]
    return found


ORIENTATIONS = {
    (): ("rgbx", (96, 64)),
    ("-display_rotation", "90"): ("gxrb", (64, 96)),
    ("-display_rotation", "180"): ("xbgr", (96, 64)),
    ("-display_rotation", "270"): ("brxg", (64, 96)),
    ("-display_hflip",): ("grxb", (96, 64)),
    ("-display_vflip",): ("bxrg", (96, 64)),
}


def by_player(path: Path, size: tuple[int, int]) -> Tensor:
    """The first frame as the ffmpeg program shows it, which turns, mirrors and crops by itself."""
    data = ffmpeg(
        "-i", path, "-vf", f"scale={size[0]}:{size[1]}", "-frames:v", "1", "-pix_fmt", "rgb24", "-f", "rawvideo", "-"
    )
    return torch.from_numpy(np.frombuffer(data, np.uint8).reshape(size[1], size[0], 3).copy()).float() / 255


@pytest.mark.parametrize(
    "options",
    [*ORIENTATIONS, ("-display_rotation", "90", "-display_hflip"), ("-display_rotation", "270", "-display_vflip")],
)
def test_turned_and_mirrored(tmp_path: Path, options: tuple[str, ...]) -> None:
    plain = coded(tmp_path / "a.mp4", corners(96, 64), "null", *X264)
    path = tmp_path / "b.mp4"
    ffmpeg(*options, "-i", plain, "-c", "copy", path)
    image = load_clip(path, resize="keep").images[0]
    size = image.shape[1], image.shape[0]
    if options in ORIENTATIONS:
        assert (quarters(image), size) == ORIENTATIONS[options]
    assert quarters(image) == quarters(by_player(path, size))


@pytest.mark.parametrize(
    ("size", "aspect", "shown"),
    [((72, 64), "16/9", (128, 64)), ((96, 64), "3/4", (72, 64)), ((64, 96), "2/1", (128, 96))],
)
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.avi"])
def test_oblong_pixels(tmp_path: Path, name: str, size: tuple[int, int], aspect: str, shown: tuple[int, int]) -> None:
    codec = ["-c:v", "mpeg4", "-q:v", "2"] if name == "a.avi" else X264
    path = coded(tmp_path / name, corners(*size), f"setsar={aspect}", *codec, count=10)
    image = load_clip(path, resize="keep").images[0]
    assert (image.shape[1], image.shape[0]) == shown and quarters(image) == "rgbx"
    fitted = load_clip(path, width=128, height=128, resize="fit").images
    assert fitted.shape[2] / fitted.shape[1] == pytest.approx(shown[0] / shown[1], rel=0.1)


def test_oblong_pixels_of_a_turned_clip(tmp_path: Path) -> None:
    plain = coded(tmp_path / "a.mp4", corners(64, 64), "setsar=2/1", *X264)
    ffmpeg("-display_rotation", "90", "-i", plain, "-c", "copy", tmp_path / "b.mp4")
    image = load_clip(tmp_path / "b.mp4", resize="keep").images[0]
    assert image.shape[:2] == (128, 64) and quarters(image) == "gxrb"


def test_what_the_codec_crops_is_not_shown(tmp_path: Path) -> None:
    frame = np.zeros((96, 128, 3), np.uint8)
    frame[16:80, 16:112] = corners(96, 64)
    plain = coded(tmp_path / "a.mp4", frame, "null", "-c:v", "libx264", "-qp", "4", "-pix_fmt", "yuv420p")
    path = tmp_path / "b.mp4"
    ffmpeg(
        "-i", plain, "-c", "copy", "-bsf:v", "h264_metadata=crop_left=16:crop_right=16:crop_top=16:crop_bottom=16", path
    )
    image = load_clip(path, resize="keep").images[0]
    assert image.shape[:2] == (64, 96) and quarters(image) == "rgbx"
    assert (image - by_player(path, (96, 64))).abs().mean() < 0.02


def with_aperture(plain: Path, path: Path, width: int, height: int, right: int, down: int) -> Path:
    """The mp4 with a clean aperture, which no option of ffmpeg sets; it lies off the centre by (right, down)."""
    data = plain.read_bytes()
    aperture = struct.pack(">I4s8i", 40, b"clap", width, 1, height, 1, right, 1, down, 1)
    ends = []
    at = 0
    for name, header in [
        *((each, 8) for each in (b"moov", b"trak", b"mdia", b"minf", b"stbl")),
        (b"stsd", 16),
        (b"avc1", 86),
    ]:
        at = data.index(name, at) - 4
        ends.append(at)
        at += header
    inner = ends[-1] + int.from_bytes(data[ends[-1] : ends[-1] + 4], "big")
    longer = bytearray(data[:inner] + aperture + data[inner:])
    for at in ends:
        longer[at : at + 4] = (int.from_bytes(longer[at : at + 4], "big") + len(aperture)).to_bytes(4, "big")
    path.write_bytes(longer)
    return path


@pytest.mark.parametrize("name", ["b.mp4", "b.mov", "b.mkv"])
@pytest.mark.parametrize("turn", ["0", "90"])
def test_what_the_container_cuts_off_is_not_shown(tmp_path: Path, name: str, turn: str) -> None:
    frame = np.zeros((96, 128, 3), np.uint8)
    frame[8:72, 24:120] = corners(96, 64)
    plain = coded(tmp_path / "a.mp4", frame, "null", *X264)
    cut = with_aperture(plain, tmp_path / "cut.mp4", 96, 64, 8, -8)
    path = tmp_path / name
    ffmpeg("-display_rotation", turn, "-i", cut, "-c", "copy", path)
    image = load_clip(path, resize="keep").images[0]
    size = (96, 64) if turn == "0" else (64, 96)
    assert (image.shape[1], image.shape[0]) == size and quarters(image) == ("rgbx" if turn == "0" else "gxrb")
    assert (image - by_player(path, size)).abs().mean() < 0.02


@pytest.mark.parametrize("name", ["a.mkv", "a.ts", "a.webm", "a.avi"])
@pytest.mark.parametrize("resize", ["crop to fill", "fit", "stretch", "keep"])
def test_a_size_that_changes_midway(tmp_path: Path, name: str, resize: str) -> None:
    codec = {"a.webm": ["-c:v", "libvpx-vp9", "-b:v", "1M"], "a.avi": ["-c:v", "mjpeg", "-q:v", "2"]}.get(
        name, [*X264, "-bsf:v", "h264_mp4toannexb"]
    )
    parts = []
    for number, size in enumerate([(128, 64), (64, 96)]):
        suffix = {"a.mkv": ".ts", "a.avi": ".mjpeg"}.get(name, Path(name).suffix)
        parts.append(
            coded(
                tmp_path / f"part{number}{suffix}",
                corners(*size),
                "null",
                *(codec if suffix != ".ts" else X264),
                count=6,
            )
        )
    path = tmp_path / name
    if name in ("a.ts", "a.avi", "a.mkv"):
        joined = tmp_path / f"joined{parts[0].suffix}"
        joined.write_bytes(b"".join(part.read_bytes() for part in parts))
        if name == "a.ts":
            joined.rename(path)
        else:
            ffmpeg(*(["-r", "5"] if name == "a.avi" else []), "-i", joined, "-c", "copy", path)
    else:
        listing = tmp_path / "list.txt"
        listing.write_text("".join(f"file {part.name}\n" for part in parts))
        ffmpeg("-f", "concat", "-i", listing, "-c", "copy", path)
    for start in (0, 7):
        images = load_clip(path, start, "frames", 0, 1, 96, 96, resize).images
        assert [quarters(image) for image in images] == ["rgbx"] * (12 - start)
        assert start == 0 or resize not in ("fit", "keep") or images.shape[1:3] == (96, 64)


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_a_shape_of_pixels_that_changes_midway(tmp_path: Path, codec: str) -> None:
    """As where a broadcast goes from 4:3 to 16:9."""
    parts = []
    for number, aspect in enumerate(["4/3", "16/9"]):
        options = ["-c:v", codec, "-pix_fmt", "yuv420p", "-qp" if codec == "libx264" else "-q:v", "2", "-bf", "0"]
        part = coded(tmp_path / f"{number}.ts", corners(96, 96), f"setdar={aspect}", *options, count=10)
        parts.append(part.read_bytes())
    path = tmp_path / "a.ts"
    path.write_bytes(b"".join(parts))
    images = load_clip(path, 0, "frames", 0, 1, 128, 96, "crop to fill").images
    # Four by three fills the whole; of sixteen by nine a quarter of the width is cut off.
    assert [quarters(image) for image in images] == ["rgbx"] * 20
    alone = [load_clip(tmp_path / f"{number}.ts", 0, "frames", 1, 1, 128, 96).images[0] for number in (0, 1)]
    assert (images[5] - alone[0]).abs().mean() < 0.01
    assert (images[15] - alone[1]).abs().mean() < 0.01


# --- time ----------------------------------------------------------------------------------------


def marked(count: int, width: int = 64, height: int = 48) -> np.ndarray:
    """Frames whose brightness is 4 a frame."""
    return np.broadcast_to(
        (np.arange(count) * 4).astype(np.uint8)[:, None, None, None], (count, height, width, 3)
    ).copy()


def marks(images: Tensor) -> list[int]:
    return [round(float(image.mean()) * 255 / 4) for image in images]


def test_the_rate_is_that_of_the_kept_part(tmp_path: Path) -> None:
    """Twenty frames at 10 a second, then twenty at 40."""
    path = tmp_path / "a.mp4"
    sound = ["-f", "lavfi", "-i", "sine=440:d=2.5:sample_rate=44100"]
    pace = "settb=1/1000,setpts='if(lt(N,20),N/10,2+(N-20)/40)/TB'"
    ffmpeg(
        *raw((64, 48), "40"),
        *sound,
        "-vf",
        pace,
        "-fps_mode",
        "passthrough",
        "-enc_time_base",
        "1/1000",
        *X264,
        "-shortest",
        path,
        stdin=marked(40).tobytes(),
    )
    for start, count, step, fps in [
        (0.0, 10, 1, 10),
        (2.0, 10, 1, 40),
        (1.0, 5, 2, 5),
        (2.0, 4, 4, 10),
        (1.5, 10, 1, 10 / 0.625),
    ]:
        clip = load_clip(path, start, "seconds", count, step, 64, 48)
        assert clip.fps == pytest.approx(fps, rel=0.01), (start, count, step)
        assert clip.audio is not None
        seconds = clip.audio["waveform"].shape[-1] / clip.audio["sample_rate"]
        assert seconds == pytest.approx(len(clip.images) / clip.fps, abs=1e-3)


@pytest.mark.shared
def test_real_varying_rate(shared_videos: list[Path]) -> None:
    path = shared_videos[0].parent.parent / "cases" / "varying-rate.mp4"
    clip = load_clip(path, 2.5, "seconds", 24, resize="keep")
    assert clip.audio is not None
    assert len(clip.images) / clip.fps == pytest.approx(0.8, abs=0.04)
    assert clip.audio["waveform"].shape[-1] / clip.audio["sample_rate"] == pytest.approx(
        len(clip.images) / clip.fps, abs=1e-3
    )


@pytest.mark.parametrize("rate", ["30000/1001", "24000/1001", "25", "12.5", "60000/1001"])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.ts", "a.mov", "a.flv"])
def test_a_steady_rate_is_exact_in_any_part(tmp_path: Path, rate: str, name: str) -> None:
    codec = {"a.webm": ["-c:v", "libvpx-vp9"], "a.flv": ["-c:v", "libx264", "-pix_fmt", "yuv420p"]}.get(name, X264)
    path = tmp_path / name
    ffmpeg(*raw((64, 48), rate), *codec, path, stdin=marked(40).tobytes())
    for start, count, step in [(0, 0, 1), (7, 5, 1), (11, 4, 3), (38, 0, 1), (39, 1, 1)]:
        clip = load_clip(path, start, "frames", count, step, 64, 48)
        tolerance = 0.003 if name == "a.flv" else 1e-4
        assert clip.fps == pytest.approx(float(Fraction(rate)) / step, rel=tolerance), (start, count, step)


def test_a_rate_that_the_header_states_wrong(tmp_path: Path) -> None:
    """Matroska's default duration says 25 a second, the time stamps 10."""
    path = tmp_path / "a.mkv"
    ffmpeg(*raw((64, 48), "25"), *X264, path, stdin=marked(20).tobytes())
    slow = tmp_path / "b.mkv"
    ffmpeg("-i", path, "-c", "copy", "-bsf:v", "setts=ts=N*100:duration=40", slow)
    clip = load_clip(slow, 0, "frames", 10, 1, 64, 48)
    assert clip.fps == pytest.approx(10, rel=0.01)


@pytest.mark.parametrize("offset", ["-1.0", "1.5"])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_clips_that_do_not_start_at_zero(tmp_path: Path, name: str, offset: str) -> None:
    source = tmp_path / "a.mov"
    tone = r"aevalsrc='if(between(t\,1\,1.2)\,0.5*sin(880*PI*t)\,0)':s=48000:d=2"
    ffmpeg(
        *raw((64, 48), "20"),
        "-f",
        "lavfi",
        "-i",
        tone,
        *X264,
        "-bf",
        "2",
        "-c:a",
        "pcm_s16le",
        source,
        stdin=marked(40).tobytes(),
    )
    path = tmp_path / f"b{Path(name).suffix}"
    late = ["-itsoffset", offset, "-i", source, "-c:v", "copy", "-c:a", "aac"]
    ffmpeg(*late, "-avoid_negative_ts", "disabled", path)
    clip = load_clip(path, 0.2 if offset == "-1.0" else 1.0, "seconds", 10, 1, 64, 48)
    first = marks(clip.images)[0]
    assert marks(clip.images) == list(range(first, first + 10))
    if offset == "1.5":
        assert first == 20 and clip.audio is not None
        loud = clip.audio["waveform"][0, 0].reshape(25, -1).abs().amax(-1) > 0.1
        assert loud.nonzero().flatten().tolist()[0] <= 1 and 9 <= int(loud.sum()) <= 12


def test_sound_and_pictures_stay_together_where_pictures_start_late(tmp_path: Path) -> None:
    tone = r"aevalsrc='if(between(t\,1\,1.1)\,0.5*sin(880*PI*t)\,0)':s=48000:d=3"
    pictures, path = tmp_path / "a.mp4", tmp_path / "a.mkv"
    ffmpeg(*raw((64, 48), "20"), *X264, pictures, stdin=marked(40).tobytes())
    late = ["-itsoffset", "0.5", "-i", pictures, "-f", "lavfi", "-i", tone]
    ffmpeg(*late, "-map", "0:v", "-map", "1:a", "-c:v", "copy", "-c:a", "pcm_s16le", path)
    clip = load_clip(path, 0, "frames", 20, 1, 64, 48)  # from 0.5 s on
    assert clip.audio is not None
    loud = (clip.audio["waveform"][0, 0].reshape(20, -1).abs().amax(-1) > 0.1).nonzero().flatten()
    assert loud.min() in (9, 10) and loud.max() in (11, 12)


def joined(parts: list[Path], path: Path) -> Path:
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


@pytest.mark.parametrize("name", ["a.ts", "a.mpg"])
def test_recordings_put_one_after_the_other_play_so(tmp_path: Path, name: str) -> None:
    """The second one's times restart, and between those of the first one's frames."""
    codec = X264 if name == "a.ts" else ["-c:v", "mpeg2video", "-q:v", "2", "-bf", "2"]
    parts = []
    for number, (rate, beep) in enumerate([("25", 0.5), ("50", 0.3)]):
        tone = rf"aevalsrc='if(between(t\,{beep}\,{beep}+0.1)\,0.5*sin(880*PI*t)\,0)':s=48000:d=1"
        pictures = (marked(25, 96, 96) + 100 * number).tobytes()
        parts.append(tmp_path / f"{number}{name}")
        sound = ["-f", "lavfi", "-i", tone, "-shortest", "-c:a", "mp2"]
        ffmpeg(*raw((96, 96), rate), *sound, *codec, parts[-1], stdin=pictures)
    path = joined(parts, tmp_path / name)
    whole = load_clip(path, 0, "frames", 0, 1, 96, 96)
    found = (whole.images.mean((1, 2, 3)) * 255).tolist()
    assert found == pytest.approx([*(4.0 * n for n in range(25)), *(100 + 4.0 * n for n in range(25))], abs=3)
    assert len(whole.images) / whole.fps == pytest.approx(1.5, abs=0.05)
    assert whole.audio is not None
    loud = (whole.audio["waveform"][0, 0].abs() > 0.1).nonzero().flatten() / whole.audio["sample_rate"]
    first, second = loud[loud < 1], loud[loud > 1]
    assert (float(first.min()), float(second.max())) == pytest.approx((0.5, 1.4), abs=0.06)
    part = load_clip(path, 20, "frames", 10, 1, 96, 96)
    assert torch.equal(part.images, whole.images[20:30])
    late = load_clip(path, 30, "frames", 20, 1, 96, 96)
    assert torch.equal(late.images, whole.images[30:]) and late.audio is not None
    loud = (late.audio["waveform"][0, 0].abs() > 0.1).nonzero().flatten() / late.audio["sample_rate"]
    assert float(loud.min()) == pytest.approx(0.2, abs=0.06)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_frames_of_avi_that_are_stored_in_another_order(tmp_path: Path, codec: str) -> None:
    """AVI stores no times of display, and a pyramid of B-frames is not to be guessed."""
    path = tmp_path / "a.avi"
    ffmpeg(*raw((64, 48), "20"), "-c:v", codec, "-bf", "3", "-q:v", "2", path, stdin=marked(40).tobytes())
    for start, count, step in [(25, 5, 1), (3, 4, 3), (0, 40, 1)]:
        clip = load_clip(path, start, "frames", count, step, 64, 48)
        assert marks(clip.images) == list(range(start, start + count * step, step))
        assert clip.fps == pytest.approx(20 / step)


PICTURE_DELAYS = (100, 200, 50, 40, 10, 10, 20, 300)  # milliseconds


@pytest.mark.parametrize("name", ["a.gif", "a.apng"])
def test_animated_pictures_play_as_in_a_browser(tmp_path: Path, name: str) -> None:
    """Which shows pictures that are to last 10 ms or less for 100 ms."""
    path = tmp_path / name
    frames = [Image.fromarray(np.full((48, 64, 3), 20 * number, np.uint8)) for number in range(8)]
    frames[0].save(
        path,
        "GIF" if name == "a.gif" else "PNG",
        save_all=True,
        append_images=frames[1:],
        duration=list(PICTURE_DELAYS),
    )
    shown = [0.1 if delay <= 10 else delay / 1000 for delay in PICTURE_DELAYS]
    for first, count in [(0, 8), (0, 2), (2, 2), (4, 2), (6, 2)]:
        clip = load_clip(path, first, "frames", count, 1, 64, 48)
        assert len(clip.images) / clip.fps == pytest.approx(sum(shown[first : first + count]), abs=2e-3)
        greys = (clip.images.mean((1, 2, 3)) * 255).tolist()
        assert greys == pytest.approx([20 * number for number in range(first, first + count)], abs=3)


def test_webp_is_told_how_to_be_read(tmp_path: Path) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "a.webp")
    with pytest.raises(Refusal, match=r"^file: 'a.webp' is a WebP picture.*Convert it to mp4"):
        load_clip(tmp_path / "a.webp")


# --- tracks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["b.mkv", "b.mp4"])
def test_of_several_tracks_the_default_ones_are_taken(tmp_path: Path, name: str) -> None:
    pictures = [
        coded(tmp_path / f"{number}.mp4", np.full((48, 64, 3), grey, np.uint8), "null", *X264, count=10)
        for number, grey in enumerate((60, 200))
    ]
    tones = [["-f", "lavfi", "-i", f"aevalsrc='{volume}*sin(880*PI*t)':d=2"] for volume in (0.1, 0.5)]
    path = tmp_path / name
    for default in (0, 1):
        marks_of = [
            option
            for kind in "va"
            for number in (0, 1)
            for option in (f"-disposition:{kind}:{number}", "default" if number == default else "0")
        ]
        maps = ["-map", "0:v", "-map", "1:v", "-map", "2:a", "-map", "3:a"]
        ffmpeg("-i", pictures[0], "-i", pictures[1], *tones[0], *tones[1], *maps, "-c:v", "copy", *marks_of, path)
        clip = load_clip(path, 0, "frames", 0, 1, 64, 48)
        assert float(clip.images.mean()) * 255 == pytest.approx((60, 200)[default], abs=3)
        assert clip.audio is not None
        volume = float(clip.audio["waveform"].square().mean().sqrt()) * 2**0.5
        assert volume == pytest.approx((0.1, 0.5)[default], abs=0.05)


# --- sound ---------------------------------------------------------------------------------------

SOUNDS = {
    "a.wav.mov": ["-c:a", "pcm_u8"],
    "b.mov": ["-c:a", "pcm_s24le"],
    "c.mov": ["-c:a", "pcm_f64le"],
    "d.mkv": ["-c:a", "flac"],
    "e.mkv": ["-c:a", "ac3"],
    "f.mkv": ["-c:a", "libvorbis"],
    "g.mp4": ["-c:a", "alac"],
    "h.ts": ["-c:a", "mp2"],
}


def with_tone(path: Path, channels: int, *options: str) -> Path:
    """A clip of 2 seconds with a tone from 0.5 s to 1.5 s, softer from channel to channel."""
    tones = "|".join(
        rf"if(between(t\,0.5\,1.5)\,{0.5 / (channel + 1):.4f}*sin(880*PI*t)\,0)" for channel in range(channels)
    )
    source = ["-f", "lavfi", "-i", f"aevalsrc='{tones}':s=48000:d=2"]
    ffmpeg(*raw((64, 48), "20"), *source, *X264, *options, path, stdin=marked(40).tobytes())
    return path


@pytest.mark.parametrize("name", SOUNDS)
def test_sample_formats(tmp_path: Path, name: str) -> None:
    clip = load_clip(with_tone(tmp_path / name, 2, *SOUNDS[name]), 0.25, "seconds", 30, 1, 64, 48)
    assert clip.audio is not None
    waveform = clip.audio["waveform"]
    assert waveform.shape == (1, 2, round(1.5 * clip.audio["sample_rate"])) and waveform.dtype == torch.float32
    loud = waveform[0].reshape(2, 30, -1).square().mean(-1).sqrt()
    for channel, volume in enumerate((0.5, 0.25)):
        assert loud[channel, 6:24].sub(volume / 2**0.5).abs().max() < 0.03
        assert loud[channel, :4].max() < 0.03 and loud[channel, 26:].max() < 0.03


@pytest.mark.parametrize(
    ("codec", "channels"),
    [
        ("pcm_s16le", 3),
        ("pcm_s16le", 10),
        ("pcm_s16le", 16),
        ("flac", 5),
        ("flac", 8),
        ("aac", 1),
        ("aac", 6),
        ("aac", 8),
    ],
)
def test_layouts(tmp_path: Path, codec: str, channels: int) -> None:
    clip = load_clip(with_tone(tmp_path / "a.mkv", channels, "-c:a", codec), 0, "seconds", 0, 1, 64, 48)
    assert clip.audio is not None
    waveform = clip.audio["waveform"]
    assert waveform.shape == (1, channels, 96000)
    volumes = waveform[0, :, 36000:60000].square().mean(-1).sqrt() * 2**0.5
    order = sorted((0.5 / (channel + 1) for channel in range(channels)), reverse=True)
    if codec != "aac":  # which reorders them, and cuts the low-frequency one
        assert volumes.tolist() == pytest.approx(order, abs=0.02)


# --- and back ------------------------------------------------------------------------------------


class Lazy(Mapping):
    """Sound as VideoHelperSuite hands it on: read when it is asked for, if there is any."""

    def __init__(self, audio: dict | None) -> None:
        self.audio = audio

    def __getitem__(self, key: str) -> object:
        if self.audio is None:
            raise Exception("failed to extract audio")
        return self.audio[key]

    def __iter__(self) -> Iterator[str]:
        return iter(("waveform", "sample_rate"))

    def __len__(self) -> int:
        return 2


def tone(channels: int = 2, rate: int = 44100, seconds: float = 2.0) -> dict:
    times = torch.arange(int(rate * seconds)) / rate
    heard = 0.4 * torch.sin(2 * torch.pi * 440 * times) * ((times > 0.5) & (times < 1.0))
    return {"waveform": heard.repeat(1, channels, 1), "sample_rate": rate}


@pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
@pytest.mark.parametrize(
    ("channels", "rate"), [*((count, 44100) for count in (1, 2, 3, 4, 5, 6, 7, 8, 12)), (1, 11111), (1, 192000)]
)
def test_any_sound_is_saved_and_comes_back_in_time(tmp_path: Path, name: str, channels: int, rate: int) -> None:
    save_clip(torch.rand(16, 64, 64, 3), 8, tmp_path / name, audio=Lazy(tone(channels, rate)))
    audio = load_clip(tmp_path / name, frame_count=0, width=64, height=64).audio
    assert audio is not None and audio["waveform"].shape[1] == (channels if channels <= 8 else 1)
    assert audio["waveform"].shape[-1] / audio["sample_rate"] == pytest.approx(2.0, abs=1e-3)
    loud = (audio["waveform"][0, 0].abs() > 0.1).nonzero().flatten() / audio["sample_rate"]
    assert (float(loud.min()), float(loud.max())) == pytest.approx((0.5, 1.0), abs=0.02)


@pytest.mark.parametrize(
    "audio",
    [
        Lazy(None),
        {"waveform": torch.zeros(1, 2, 0), "sample_rate": 44100},
        {"waveform": torch.zeros(0, 2, 9), "sample_rate": 8},
        {"waveform": None, "sample_rate": None},
    ],
    ids=["lazy, without sound", "no samples", "no batch", "nothing in it"],
)
def test_sound_that_is_none_is_left_out(tmp_path: Path, audio: dict) -> None:
    save_clip(torch.rand(4, 64, 64, 3), 8, tmp_path / "a.mp4", audio=audio)
    clip = load_clip(tmp_path / "a.mp4", frame_count=0, width=64, height=64)
    assert len(clip.images) == 4 and clip.audio is None


@pytest.mark.parametrize("kind", ["numpy", "text and numbers", "integers", "unsigned bytes"])
def test_sound_in_other_packs_types_is_saved_as_loud_as_it_is(tmp_path: Path, kind: str) -> None:
    sound = tone(2, 48000)
    heard, rate = sound["waveform"], sound["sample_rate"]
    given = {
        "numpy": {"waveform": heard.numpy(), "sample_rate": np.int64(rate)},
        "text and numbers": {"waveform": heard, "sample_rate": torch.tensor(rate)},
        "integers": {"waveform": (heard * 32767).short(), "sample_rate": str(rate)},
        "unsigned bytes": {"waveform": (heard * 127 + 128).byte(), "sample_rate": rate},
    }[kind]
    save_clip(torch.rand(16, 64, 64, 3), 8, tmp_path / "a.webm", audio=given)
    audio = load_clip(tmp_path / "a.webm", frame_count=0, width=64, height=64).audio
    assert audio is not None and audio["waveform"].shape[1] == 2
    middle = audio["waveform"][..., int(0.6 * audio["sample_rate"]) : int(0.9 * audio["sample_rate"])]
    assert float(middle.square().mean().sqrt()) == pytest.approx(0.4 / 2**0.5, abs=0.02)


@pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
@pytest.mark.parametrize("fps", [8.0, 16.15, 24000 / 1001, 59.94])
def test_colours_and_times_come_back(tmp_path: Path, name: str, fps: float) -> None:
    frame = torch.from_numpy(patches()).float() / 255
    images = frame.expand(40, -1, -1, -1).clone()
    images[:, :4, :4] = (torch.arange(40) / 50).reshape(-1, 1, 1, 1)
    save_clip(images, fps, tmp_path / name)
    clip = load_clip(tmp_path / name, frame_count=0, resize="keep")
    assert len(clip.images) == 40 and furthest(shown_patches(clip)) <= 4
    assert len(clip.images) / clip.fps == pytest.approx(40 / fps, abs=0.02)
    look = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-i", tmp_path / name]
    assert "tv, bt709" in subprocess.run(look, capture_output=True, text=True, stdin=subprocess.DEVNULL).stderr


@pytest.mark.parametrize("program", ["not there", "no program"])
def test_no_ffmpeg_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    path = tmp_path / "ffmpeg"
    if program == "no program":
        path.write_text("hello")
        path.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(path))
    with pytest.raises(RuntimeError, match=r"^No ffmpeg can be started.*Install imageio-ffmpeg again"):
        save_clip(torch.rand(2, 16, 16, 3), 8, tmp_path / "a.mp4")

    def missing() -> str:
        raise RuntimeError("No ffmpeg exe could be found. Install ffmpeg on your system")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", missing)
    with pytest.raises(RuntimeError, match=r"^No ffmpeg can be started.*Install imageio-ffmpeg again"):
        save_clip(torch.rand(2, 16, 16, 3), 8, tmp_path / "a.mp4")
    assert [each.name for each in tmp_path.iterdir() if each.suffix] == []
