"""Where a file may be written: below one folder, under a name that every system takes, and if there is room for it."""

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

# A file system's limit is 255 bytes; a counter, an extension and a temporary name's mark are added.
LONGEST_NAME = 200
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[\d¹²³])(\..*)?", re.IGNORECASE)
_CONTROL = re.compile(r"[\x01-\x1f\x7f\ud800-\udfff]")
# There, a colon does not even end up in the name: it opens another stream of a file, or another drive.
_NOT_ON_WINDOWS = re.compile(r'[<>:"|?*]')
_WINDOWS = os.name == "nt"
# Less than this is a full disk: a few seconds of video take as much.
LEAST_ROOM = 32 * 2**20
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def check_prefix(prefix: str, root: str, example: str) -> None:
    """Raise ValueError for a prefix that leaves ``root``, also by a link, or is no name; its text has ``example``."""
    remedy = f"give a name such as {example}."
    if "\0" in prefix:
        raise ValueError("filename_prefix: a file name cannot hold NUL characters; type it again.")
    parts = re.split(r"[/\\]", prefix)
    if any(len(part.encode(errors="replace")) > LONGEST_NAME for part in parts) or len(prefix) > 4 * LONGEST_NAME:
        raise ValueError(f"filename_prefix: it is longer than {LONGEST_NAME} bytes; {remedy}")
    # A dot or a space at the end of a folder's name is dropped by Windows: what is left may be another folder.
    folders = [part for part in parts[:-1] if part not in (".", "..")]
    odd = any(_RESERVED.fullmatch(part) or part.endswith((".", " ")) for part in folders)
    if odd or _CONTROL.search(prefix) or (_WINDOWS and _NOT_ON_WINDOWS.search(prefix)):
        raise ValueError(f"filename_prefix: {prefix!r} is not a name that every system takes; {remedy}")
    inside = os.path.realpath(root)
    if not _is_inside(os.path.join(inside, os.path.dirname(os.path.normpath(prefix))), inside):
        raise ValueError(f"filename_prefix: '{prefix}' leaves the folder that files are saved in; {remedy}")


def _is_inside(path: str, folder: str) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def next_name(prefix: str, root: str, example: str, width: int = 0, height: int = 0) -> tuple[str, str, str]:
    """(folder, file name without extension, subfolder) for the next file with this prefix below ``root``.

    ``example``: a prefix for the message; ``width``, ``height``: for the host's placeholders. The folder is
    there afterwards. Raises ValueError for a prefix that ``check_prefix`` refuses.
    """
    check_prefix(prefix, root, example)
    try:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, root, width, height)
    except OSError:
        raise
    except Exception as error:  # what the host raises for a path that leaves the folder
        raise ValueError(
            f"filename_prefix: '{prefix}' leaves the folder that files are saved in; give a name such as {example}."
        ) from error
    return folder, f"{name}_{counter:05}_", subfolder


def check_target(prefix: str | None, root: str, example: str, option: str) -> bool | str:
    """What a saving node's ``validate_inputs`` answers, before anything has run: True, or what is wrong.

    ``prefix``: None if it is linked, so that only the folder can be looked at. ``option``: ComfyUI's, that sets
    another folder.
    """
    try:
        if prefix is not None:
            check_prefix(prefix, root, example)
        subfolder = os.path.dirname(os.path.normpath(prefix)) if prefix else ""
        check_room(os.path.join(root, subfolder), LEAST_ROOM, option)
    except ValueError as error:
        return str(error).removeprefix("filename_prefix: ")  # the host names the input itself
    return True


def check_room(folder: str, needed: int, option: str) -> None:
    """Raise ValueError for a folder that cannot be written to or has no room for ``needed`` bytes.

    For a folder that is not there yet, the one that it would be made in is looked at.
    """
    there = Path(folder)
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"filename_prefix: {there} cannot be written to. Allow it to the account that runs ComfyUI, or start "
            f"ComfyUI with another folder ({option})."
        )
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ValueError(
            f"filename_prefix: the disk of {there} is full: {_size(free)} are left, and {_size(needed)} are needed. "
            f"Make room, or start ComfyUI with another folder ({option})."
        )


def _size(count: int) -> str:
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"


@contextmanager
def disk_explained(option: str) -> Iterator[None]:
    """Within: a disk that turns out to be full or not to be written to becomes a RuntimeError with the remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        # safetensors has no other way of telling than its message.
        if code in _FULL or os.strerror(errno.ENOSPC) in str(error):
            trouble = "the disk is full, and no file was written. Make room"
        elif code in _FORBIDDEN:
            trouble = "the folder cannot be written to. Allow it to the account that runs ComfyUI"
        else:
            raise
        raise RuntimeError(
            f"filename_prefix: {trouble} and queue again (what is done need not be computed again), or start ComfyUI "
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
