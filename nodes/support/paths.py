"""Check and choose where files are written: inside one folder, under portable names, on a disk with room."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import folder_paths
from safetensors import SafetensorError

from ...tav_core.errors import Refusal

# A file system's limit is 255 bytes; a counter, an extension and a temporary file's mark are added.
LONGEST_NAME = 200
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[\d¹²³])(\..*)?", re.IGNORECASE)
_CONTROL = re.compile(r"[\x01-\x1f\x7f\ud800-\udfff]")
# On Windows a colon opens another stream of a file, or another drive.
_NOT_ON_WINDOWS = re.compile(r'[<>:"|?*]')
_WINDOWS = os.name == "nt"
# A few seconds of video need this much; a disk with less counts as full.
LEAST_ROOM = 32 * 2**20
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def check_prefix(prefix: str, root: str, example: str) -> None:
    """Raise Refusal for a prefix that leaves ``root``, also by a link, or is not a name on every system.

    ``example``: a good prefix, for the message.
    """
    remedy = f"Give a name such as {example}."
    if "\0" in prefix:
        raise Refusal("filename_prefix", "a file name cannot hold NUL characters", "Type it again.")
    parts = re.split(r"[/\\]", prefix)
    if any(len(part.encode(errors="replace")) > LONGEST_NAME for part in parts) or len(prefix) > 4 * LONGEST_NAME:
        raise Refusal("filename_prefix", f"it is longer than {LONGEST_NAME} bytes", remedy)
    # Windows drops a dot or a space at the end of a folder's name, which may then name another folder.
    folders = [part for part in parts[:-1] if part not in (".", "..")]
    odd = any(_RESERVED.fullmatch(part) or part.endswith((".", " ")) for part in folders)
    if odd or _CONTROL.search(prefix) or (_WINDOWS and _NOT_ON_WINDOWS.search(prefix)):
        raise Refusal("filename_prefix", f"{prefix!r} is not a name that every system takes", remedy)
    inside = os.path.realpath(root)
    if not _is_inside(os.path.join(inside, os.path.dirname(os.path.normpath(prefix))), inside):
        raise _leaves_folder(prefix, example)


def _leaves_folder(prefix: str, example: str) -> Refusal:
    return Refusal(
        "filename_prefix", f"'{prefix}' leaves the folder that files are saved in", f"Give a name such as {example}."
    )


def _is_inside(path: str, folder: str) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def next_name(prefix: str, root: str, example: str, width: int = 0, height: int = 0) -> tuple[str, str, str]:
    """Make the folder of the next file with this prefix below ``root``.

    Returns the folder, the file's name without extension, and the subfolder below ``root``. ``example``: a good
    prefix, for the message; ``width``, ``height``: for the host's placeholders. Raises Refusal as ``check_prefix``.
    """
    check_prefix(prefix, root, example)
    try:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, root, width, height)
    except OSError:
        raise
    except Exception as error:  # the host raises Exception itself for a path that leaves the folder
        raise _leaves_folder(prefix, example) from error
    return folder, f"{name}_{counter:05}_", subfolder


def check_target(prefix: str | None, root: str, example: str, option: str) -> bool | str:
    """Answer for a saving node's ``validate_inputs``, before anything runs: True, or what is wrong.

    ``prefix``: None if it is linked; then only the folder is checked. ``option``: ComfyUI's option for another folder.
    """
    try:
        if prefix is not None:
            check_prefix(prefix, root, example)
        subfolder = os.path.dirname(os.path.normpath(prefix)) if prefix else ""
        check_room(os.path.join(root, subfolder), LEAST_ROOM, option)
    except Refusal as refusal:
        return refusal.without_input
    return True


def check_room(folder: str, needed: int, option: str) -> None:
    """Raise Refusal for a folder that cannot be written to or has less than ``needed`` bytes of room.

    A missing folder is judged by the nearest one above it. ``option``: ComfyUI's option for another folder.
    """
    there = Path(folder)
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise Refusal(
            "filename_prefix",
            f"{there} cannot be written to",
            f"Allow it to the account that runs ComfyUI, or start ComfyUI with another folder ({option}).",
        )
    free = shutil.disk_usage(there).free
    if free < needed:
        raise Refusal(
            "filename_prefix",
            f"the disk of {there} is full: {_size(free)} are left, and {_size(needed)} are needed",
            f"Make room, or start ComfyUI with another folder ({option}).",
        )


def _size(count: int) -> str:
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"


@contextmanager
def disk_explained(option: str) -> Iterator[None]:
    """Turn the error of a full or write-protected disk into a RuntimeError with the remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        # A SafetensorError has no error number, only a message.
        if code in _FULL or os.strerror(errno.ENOSPC) in str(error):
            trouble = "the disk is full, and no file was written. Make room"
        elif code in _FORBIDDEN:
            trouble = "the folder cannot be written to. Allow it to the account that runs ComfyUI"
        else:
            raise
        raise RuntimeError(
            f"filename_prefix: {trouble} and queue again (finished nodes need not run again), or start ComfyUI "
            f"with another folder ({option}). {error}"
        ) from error


def state_folder(warn: Callable[[str], None]) -> Path | None:
    """Return the folder of unfinished runs: below the output folder, because the host empties its temp folder at start.

    None, with a warning, if a link leads out of the output folder: old files are deleted there.
    """
    output = folder_paths.get_output_directory()
    folder = Path(output, ".tune-a-video")
    if _is_inside(str(folder), output):
        return folder
    logging.warning("Tune-A-Video: .tune-a-video leads out of the output folder; no state of this run is kept")
    warn("its folder leads out of the output folder")
    return None
