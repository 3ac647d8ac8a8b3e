"""Reads which part of a picture a container shows: MP4's clean aperture, Matroska's PixelCrop. PyAV tells neither."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from fractions import Fraction
from io import BytesIO
from typing import BinaryIO

Crop = tuple[int, int, int, int]  # pixels off the left, the top, the right and the bottom

_MOST_HEADER = 2**27  # bytes; the headers of a million frames take a quarter of it
_SAMPLE_ENTRY = 78  # bytes of a video's sample entry before the boxes in it
_SEGMENT, _TRACKS, _CLUSTER, _TYPE, _VIDEO = 0x18538067, 0x1654AE6B, 0x1F43B675, 0x83, 0xE0
_MATROSKA_CROP = 0x54CC, 0x54BB, 0x54DD, 0x54AA


def container_crop(path: str, container: str, track: int, number: int, size: tuple[int, int]) -> Crop | None:
    """Return what a container cuts off a video track's pictures of ``size`` (width, height); None for nothing.

    ``container``: FFmpeg's name; ``track``: the track's id; ``number``: how many video tracks come before it.
    """
    try:
        with open(path, "rb") as file:
            if container.startswith("mov"):
                crop = _clean_aperture(file, track, size)
            elif container.startswith("matroska"):
                crop = _pixel_crop(file, number)
            else:
                return None
    except (struct.error, ValueError, IndexError, ZeroDivisionError):  # a damaged header
        return None
    left, top, right, bottom = crop or (0, 0, 0, 0)
    if min(left, top, right, bottom) < 0 or left + right >= size[0] or top + bottom >= size[1] or not any(crop or ()):
        return None
    return crop


def _clean_aperture(file: BinaryIO, track: int, size: tuple[int, int]) -> Crop | None:
    for kind, length in _top_boxes(file):
        if kind != b"moov":
            file.seek(length, 1)
            continue
        for entry in _boxes(file.read(min(length, _MOST_HEADER)), b"trak"):
            header = next(_boxes(entry, b"tkhd"))
            if struct.unpack_from(">I", header, 20 if header[0] else 12)[0] != track:
                continue
            part = entry
            for name in (b"mdia", b"minf", b"stbl", b"stsd"):
                part = next(_boxes(part, name), b"")
            for aperture in _boxes(part[16 + _SAMPLE_ENTRY :], b"clap"):
                return _around_centre(struct.unpack_from(">4I4i", aperture), size)
        return None
    return None


def _around_centre(numbers: tuple[int, ...], size: tuple[int, int]) -> Crop:
    width, height, x, y = (Fraction(numbers[i], numbers[i + 1]) for i in (0, 2, 4, 6))
    left, top = (size[0] - width) / 2 + x, (size[1] - height) / 2 + y
    # As FFmpeg rounds: the corner down, the size to whole pixels.
    return int(left), int(top), size[0] - int(left) - int(width), size[1] - int(top) - int(height)


def _top_boxes(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Yield kind and length of each box of a file, with the file at its content; the caller reads or skips it."""
    while len(head := file.read(8)) == 8:
        length, kind, taken = int.from_bytes(head[:4], "big"), head[4:], 8
        if length == 1:
            length, taken = int.from_bytes(file.read(8), "big"), 16
        if length < taken:
            return
        yield kind, length - taken


def _boxes(data: bytes, wanted: bytes) -> Iterator[bytes]:
    """Yield the content of the boxes of one kind that lie in ``data`` directly."""
    at = 0
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if length < 8:
            return
        if data[at + 4 : at + 8] == wanted:
            yield data[at + 8 : at + length]
        at += length


def _pixel_crop(file: BinaryIO, number: int) -> Crop | None:
    while (element := _element(file)) is not None:
        name, length = element
        if name == _TRACKS:
            entries = [dict(_elements(content)) for kind, content in _elements(file.read(min(length, _MOST_HEADER)))]
            videos = [entry[_VIDEO] for entry in entries if entry.get(_TYPE) == b"\1" and _VIDEO in entry]
            found = dict(_elements(videos[number]))
            left, top, right, bottom = (int.from_bytes(found.get(key, b""), "big") for key in _MATROSKA_CROP)
            return left, top, right, bottom
        if name == _CLUSTER:
            return None
        if name != _SEGMENT:  # which holds the others
            file.seek(length, 1)
    return None


def _element(file: BinaryIO) -> tuple[int, int] | None:
    """Return the id and the length of the EBML element that begins here, None at the file's end."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    name = int.from_bytes(first + file.read(8 - first[0].bit_length()), "big")
    first = file.read(1)
    if not first or not first[0]:
        return None
    more = 8 - first[0].bit_length()
    return name, int.from_bytes(bytes([first[0] & (0x7F >> more)]) + file.read(more), "big")


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the id and the content of the EBML elements that lie in ``data`` directly."""
    file = BytesIO(data)
    while (element := _element(file)) is not None:
        yield element[0], file.read(element[1])
