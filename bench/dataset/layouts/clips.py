"""Clips and masks below the given folders. Nothing outside them is read, whatever a file or a link says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
VIDEOS = {".mp4", ".webm", ".gif", ".mkv", ".mov", ".avi"}
# Folders in which data sets keep their frames and masks.
_FRAME_FOLDERS = ("", "images", "JPEGImages", "JPEGImages/480p", "videos", "frames", "data", "480p_frames")
_MASK_FOLDERS = ("bmasks", "Annotations", "Annotations/480p", "masks")


class BadRow(ValueError):
    """A row that cannot be used; the text says why."""


def is_inside(path: Path, roots: Sequence[Path]) -> bool:
    """Return whether a path that is there lies below a root, its links followed."""
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):
        return False
    return any(real.is_relative_to(root) for root in roots)


def find_clip(name: Any, near: Path, roots: Sequence[Path], split: str = "") -> Path:
    """Find a folder of pictures or a video file below the roots by the path that a list gives.

    The path may be relative to the list ``near`` or to a root, or begin with folders that only its author has. Raises
    BadRow for a clip that is not there, that is empty, or that lies outside the roots.
    """
    folders = dict.fromkeys(("", split, f"{split}/480p_frames", *_FRAME_FOLDERS) if split else _FRAME_FOLDERS)
    return _find(name, [near.parent, *(root / folder for root in roots for folder in folders)], near, roots, "video")


def find_mask(name: Any, video: str, near: Path, roots: Sequence[Path]) -> Path | None:
    """Find the mask that a list names, else the one under the video's name in a folder of masks; None for none.

    Raises BadRow for a named mask as ``find_clip`` does.
    """
    if name not in (None, ""):
        return _find(name, [near.parent, *roots], near, roots, "video")
    for folder in _MASK_FOLDERS if video else ():
        try:
            return _find(video, [near.parent, *(root / folder for root in roots)], near, roots, "mask")
        except BadRow:
            continue
    return None


def _find(name: Any, bases: Sequence[Path], near: Path, roots: Sequence[Path], what: str) -> Path:
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise BadRow(f"no {what}")
    text = PurePosixPath(name.strip().replace("\\", "/"))
    outside = False
    for path in _candidates(text, bases, near):
        try:
            present = path.exists()
        except OSError:  # a name that no file system takes
            continue
        if not present:
            continue
        if not is_inside(path, roots):
            outside = True
        elif path.is_dir() and pictures_of(path, roots):
            return path.resolve()
        elif path.is_file() and path.suffix.lower() in VIDEOS:
            return path.resolve()
    if outside or ".." in text.parts or text.is_absolute():
        raise BadRow(f"the {what} {name[:80]} lies outside the given folders, or is not there")
    raise BadRow(f"the {what} {name[:80]} is not there")


def _candidates(text: PurePosixPath, bases: Sequence[Path], near: Path) -> Iterator[Path]:
    if ".." in text.parts:
        given = [near.parent / text]
    elif text.is_absolute():
        given = [Path(text)]
    else:
        tails = [PurePosixPath(*text.parts[start:]) for start in range(len(text.parts))]
        given = [base / tail for tail in tails for base in bases]
    for candidate in given:
        yield candidate
        for suffix in sorted(VIDEOS):
            yield candidate.with_name(candidate.name + suffix)


def pictures_of(folder: Path, roots: Sequence[Path] | None = None) -> list[Path]:
    """Return the pictures of a folder in the order of their numbers. Raises BadRow for a link out of the roots."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in PICTURES and path.is_file()]
    if roots is not None and any(path.is_symlink() and not is_inside(path, roots) for path in found):
        raise BadRow(f"a picture of {folder.name} links to a file outside the given folders")

    return sorted(found, key=lambda path: re.sub(r"\d+", lambda digits: digits[0].zfill(20), path.stem))
