"""Clips and masks below the given folders. Nothing outside them is read, whatever a file or a link says."""

from __future__ import annotations

import re
import unicodedata
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


def plain_name(path: str) -> str:
    """Return the last part of a path as lists have it, without the extension of a video."""
    name = PurePosixPath(path.strip().replace("\\", "/")).name
    stem, dot, ending = name.rpartition(".")
    return stem if stem and f"{dot}{ending}".lower() in VIDEOS else name


def find_mask(name: Any, video: str, near: Path, roots: Sequence[Path]) -> Path | None:
    """Find the mask that a list names, else the one under the video's name in a folder of masks; None for none.

    Raises BadRow for a named mask as ``find_clip`` does.
    """
    if name not in (None, ""):
        return _find(name, [near.parent, *roots], near, roots, "mask")
    for folder in _MASK_FOLDERS if video else ():
        try:
            # Not beside the list itself: what lies there under the video's name may be the frames.
            return _find(video, [base / folder for base in (near.parent, *roots)], near, roots, "mask")
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
        elif is_video(path):
            return path.resolve()
    if outside or ".." in text.parts or text.is_absolute():
        raise BadRow(f"the {what} {name[:80]} lies outside the given folders, or is not there")
    raise BadRow(f"the {what} {name[:80]} is not there")


def _candidates(given: PurePosixPath, bases: Sequence[Path], near: Path) -> Iterator[Path]:
    # Accents are one character or two, depending on the system that wrote the name.
    forms = dict.fromkeys([str(given), *(unicodedata.normalize(form, str(given)) for form in ("NFC", "NFD"))])
    for text in map(PurePosixPath, forms):
        if ".." in text.parts:
            paths = [near.parent / text]
        elif text.is_absolute():
            paths = [Path(text)]
        else:
            tails = [PurePosixPath(*text.parts[start:]) for start in range(len(text.parts))]
            paths = [base / tail for tail in tails for base in bases]
        for path in paths:
            yield path
            yield from with_video_ending(path)


def with_video_ending(path: Path) -> list[Path]:
    """Return the video files of a path's name: with an extension after it, or with its own in other letters."""
    if not path.name:
        return []
    stem = path.stem if path.suffix.lower() in VIDEOS else path.name
    endings = {path.suffix.lower()} if path.suffix.lower() in VIDEOS else VIDEOS
    try:
        near = [other for other in path.parent.iterdir() if other.name.startswith(f"{stem}.")]
    except OSError:
        return []
    return sorted(other for other in near if other.name[len(stem) :].lower() in endings and other.is_file())


def is_video(path: Path) -> bool:
    """Return whether a path is a file with the extension of a video."""
    return path.suffix.lower() in VIDEOS and path.is_file()


def pictures_of(folder: Path, roots: Sequence[Path] | None = None) -> list[Path]:
    """Return the pictures of a folder in the order of their numbers; hidden files are none.

    Raises BadRow for a link out of the roots, and where one frame is there in two formats.
    """
    found = [path for path in folder.iterdir() if path.suffix.lower() in PICTURES and path.is_file()]
    # Archives made on macOS bring a hidden file beside each picture.
    found = [path for path in found if not path.name.startswith(".")]
    if roots is not None and any(path.is_symlink() and not is_inside(path, roots) for path in found):
        raise BadRow(f"a picture of {folder.name} links to a file outside the given folders")
    by_stem = {path.stem: path for path in found}
    if len(by_stem) < len(found):
        twice = next(path for path in found if by_stem[path.stem] != path)
        raise BadRow(f"{folder.name} has {twice.name} and {by_stem[twice.stem].name}: one of them is no frame")
    return sorted(found, key=lambda path: (re.sub(r"\d+", lambda digits: digits[0].zfill(20), path.stem), path.name))
