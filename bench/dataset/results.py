"""The folder of a study: where sources, tunings, edits and scores lie, and how files get there whole.

source/CLIP/00000.png                  the frames as they are edited, and mask/ the same
work/CLIP/                             motion, inverted noise, state of a tuning
results/METHOD/SPLIT/VIDEO/NAME/00000.jpg   LOVEU-TGVE 2023's submission layout
editboard-METHOD.csv                   EditBoard's list of the same edits
scores/METHOD/SPLIT/VIDEO/NAME.json
edits.json                             what each edit was made from
table.md, table.csv, summary.csv, table.json, index.html, pages/*.mp4
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .layouts import VIDEOS, BadRow, Row, pictures_of, with_video_ending

# Names of unfinished files and folders begin with this; a later run removes them.
_UNFINISHED = ".unfinished-"
JPEG_QUALITY = 95

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def clip_id(row: Row) -> str:
    """Return a name for a row's clip: rows of one name share frames, source sentence and tuning, also across lists."""
    return f"{_plain(row.frames.stem)}-{_short_hash(str(row.frames), row.source, row.first, row.step, row.count)}"


def mask_folder(output: Path, row: Row) -> Path | None:
    """Return the folder of a row's mask, None for a row without one; edits of one clip may have different ones."""
    return None if row.mask is None else output / "mask" / f"{clip_id(row)}-{_short_hash(str(row.mask))}"


def _plain(name: str) -> str:
    return re.sub(r"[^\w-]+", "_", name)[:60]


def _short_hash(*values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]


def edit_folder(output: Path, method: str, row: Row) -> Path:
    """Return the folder of an edit's frames."""
    return output / "results" / method / row.split / row.video / row.name


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """Give a new folder that takes the place of ``target`` when the block has ended without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.parent / f"{_UNFINISHED}{target.name}-{uuid.uuid4().hex[:8]}"
    unfinished.mkdir()
    try:
        yield unfinished
        with suppress(OSError):  # another worker may have finished the same
            unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file that appears when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.parent / f"{_UNFINISHED}{path.name}-{uuid.uuid4().hex[:8]}"
    try:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(output: Path) -> None:
    """Remove what an earlier run that was cut off has left half done."""
    for path in sorted(output.rglob(f"{_UNFINISHED}*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_frames(folder: Path, frames: Pixels, suffix: str = ".jpg") -> None:
    """Write frames [n, h, w, 3 or none] as numbered pictures, whole or not at all."""
    options: dict[str, Any] = {"quality": JPEG_QUALITY, "subsampling": 0} if suffix == ".jpg" else {}
    with _whole_folder(folder) as unfinished:
        for number, frame in enumerate(frames):
            Image.fromarray(frame).save(unfinished / f"{number:05d}{suffix}", **options)


def read_frames(folder: Path, mode: str = "RGB") -> Pixels:
    """Read a folder of pictures as [n, h, w, 3], or [n, h, w] with ``mode`` L."""
    found = []
    for path in pictures_of(folder):
        with Image.open(path) as picture:
            found.append(np.asarray(picture.convert(mode)))
    return np.stack(found)


def find_edit(folder: Path, row: Row) -> Path | None:
    """Return an edit of a system's results in submission layout: its folder of pictures or its video file.

    What links to a place outside the system's folder is not there.
    """
    place, root = folder / row.split / row.video / row.name, folder.resolve()
    for found in (place, *with_video_ending(place)):
        if not found.resolve().is_relative_to(root):
            continue
        if found.suffix.lower() in VIDEOS and found.is_file():
            return found
        with suppress(BadRow):
            if found.is_dir() and pictures_of(found, [root]):
                return found
    return None


def write_editboard(output: Path, method: str, rows: Iterable[Row]) -> None:
    """Write EditBoard's csv of the edits that are there; its paths are relative to the study's folder."""
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(["original_video_path", "edited_video_path", "semantic_mask_path", "source_prompt", "target_prompt"])
    for row in rows:
        folder, mask = edit_folder(output, method, row), mask_folder(output, row)
        if folder.is_dir():
            paths = [output / "source" / clip_id(row), folder, *([mask] if mask is not None and mask.is_dir() else [])]
            cells = [f"./{path.relative_to(output).as_posix()}" for path in paths] + [""] * (3 - len(paths))
            table.writerow([*cells, row.source, row.edit])
    write_whole(output / f"editboard-{method}.csv", text.getvalue())


def digest(folders: Sequence[Path]) -> str:
    """Return the SHA-256 over the names and bytes of all pictures in folders."""
    total = hashlib.sha256()
    for folder in folders:
        for path in pictures_of(folder) if folder.is_dir() else ():
            total.update(f"{folder.name}/{path.name}\n".encode())
            total.update(path.read_bytes())
    return total.hexdigest()
