"""Damage a file or a value. Every function takes a `random.Random` first, so that a seed repeats a case."""

from __future__ import annotations

import json
import math
import struct
from random import Random
from typing import Any

INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
TEXTS = (
    "",
    " ",
    ".",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "C:\\Windows\\win.ini",
    "\\\\server\\share\\x",
    "CON",
    "nul.txt",
    "a\0b",
    "x" * 300,
    "a/" * 200 + "b",
    "사람이 스키를 탄다",
    "\u202egpj.exe",
    "%year%%date:yyyy%",
    "file:///etc/passwd",
    "concat:a|b",
    "-i",
    "$(id)",
    "clip.mp4 [output]",
    "a\nb",
    "\ud800",
)


def _place(rng: Random, size: int) -> int:
    """Draw an offset, mostly near the ends, where headers and indices are."""
    near = min(size, 2048)
    return rng.choice((rng.randrange(near), size - 1 - rng.randrange(near), rng.randrange(size)))


def spoil_bytes(rng: Random, data: bytes, other: bytes) -> bytes:
    """Make one to four changes to a file's bytes. ``other``: a file to take pieces from."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not out:
            break
        place, length = _place(rng, len(out)), min(rng.choice((1, 2, 4, 16, 256, 4096)), len(out))
        match rng.randrange(8):
            case 0:
                for _ in range(rng.randint(1, 64)):
                    out[_place(rng, len(out))] ^= 1 << rng.randrange(8)
            case 1:
                out[place : place + length] = rng.randbytes(length)
            case 2:
                del out[place:]
            case 3:
                del out[place : place + length]
            case 4:
                out[place:place] = out[place : place + length] * rng.randint(1, 8)
            case 5:
                value = struct.pack(rng.choice((">I", "<I")), rng.choice(INTERESTING))
                out[place : place + 4] = value
            case 6:
                start = rng.randrange(max(len(other) - length, 1))
                out[place : place + length] = other[start : start + length]
            case 7:
                out[place : place + length] = bytes([rng.choice((0, 0xFF))]) * length
    return bytes(out)


def spoil_mp4_sizes(rng: Random, data: bytes) -> bytes:
    """Replace a picture's size, a count or a length in an mp4's tables by an extreme one."""
    tables = {b"avc1": (28, ">H"), b"tkhd": (80, ">H"), b"stsz": (8, ">I"), b"stco": (8, ">I"), b"stts": (12, ">I")}
    name, (offset, code) = rng.choice(list(tables.items()))
    found = data.find(name)
    if found < 0:
        return spoil_bytes(rng, data, data)
    place = found + offset + rng.choice((0, 2, 4))
    value = struct.pack(code, rng.choice(INTERESTING) & (0xFFFF if code == ">H" else 0xFFFFFFFF))
    return data[:place] + value + data[place + len(value) :]


def spoil_safetensors(rng: Random, data: bytes) -> bytes:
    """Change the header of a safetensors file and keep it valid JSON."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    key = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[key]
    match rng.randrange(9):
        case 0:
            entry["dtype"] = rng.choice(("F64", "I8", "U8", "BOOL", "BF16", "F16", "F8_E4M3", "I64", "X"))
        case 1:
            entry["shape"] = rng.choice(([], [0], [1] * 70, [2**40, 2**40], [-1], entry["shape"][::-1], ["a"], [1.5]))
        case 2:
            entry["data_offsets"] = rng.choice(([0, 0], [0, 2**62], [5, 1], [-1, 3], entry["data_offsets"][::-1]))
        case 3:
            del header[key]
        case 4:
            header[rng.choice(("x", key + ".diff", key.replace("attn", "attm"), "a" * 1000, ""))] = header.pop(key)
        case 5:
            versions = ("", "0", "-1", "2", "²", "٣", "9" * 5000, "1.0", "null")
            metadata["format_version"] = rng.choice(versions)
        case 6:
            metadata[rng.choice((*metadata, "new"))] = rng.choice(TEXTS[:22])
        case 7:
            metadata.pop(rng.choice(list(metadata)), None)
        case 8:
            changed = rng.choice((None, [], {}, {"format": 1}, {"format": None}))
            header["__metadata__"] = changed
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def odd_number(rng: Random, usual: float) -> float:
    """Draw a number that a link can bring past the widget's limits; an int if ``usual`` is one."""
    if isinstance(usual, int):
        return rng.choice((usual, 0, 1, -1, 2, 7, 2**31, -(2**63), 2**64))
    return rng.choice((usual, 0.0, -1.0, 1e-320, 1e30, math.nan, math.inf, -math.inf))


def odd_choice(rng: Random, options: Any) -> Any:
    """Draw one of a combo's options, or rarely a text that is not among them."""
    return rng.choice(TEXTS[:22]) if rng.random() < 0.15 else rng.choice(list(options))
