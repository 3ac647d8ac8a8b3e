"""Where a file may be written: below one folder, under a name that every system takes."""

from __future__ import annotations

import os
import re
from pathlib import Path

import folder_paths

# A file system's limit is 255 bytes; a counter, an extension and a temporary name's mark are added.
LONGEST_NAME = 200
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def next_name(prefix: str, root: str, example: str, width: int = 0, height: int = 0) -> tuple[str, str, str]:
    """(folder, file name without extension, subfolder) for the next file with this prefix below ``root``.

    ``example``: a prefix for the message; ``width``, ``height``: for the host's placeholders. The folder is
    there afterwards. Raises ValueError for a prefix that leaves ``root``, also by a link, or is no name.
    """
    remedy = f"give a name such as {example}."
    if "\0" in prefix:
        raise ValueError("filename_prefix: a file name cannot hold NUL characters; type it again.")
    parts = re.split(r"[/\\]", prefix)
    if any(len(part.encode(errors="replace")) > LONGEST_NAME for part in parts) or len(prefix) > 4 * LONGEST_NAME:
        raise ValueError(f"filename_prefix: it is longer than {LONGEST_NAME} bytes; {remedy}")
    if any(map(_RESERVED.fullmatch, parts[:-1])) or any("\ud800" <= c <= "\udfff" for c in prefix):
        raise ValueError(f"filename_prefix: {prefix!r} is not a name that every system takes; {remedy}")
    leaves = ValueError(f"filename_prefix: '{prefix}' leaves the folder that files are saved in; {remedy}")
    inside = os.path.realpath(root)
    if not Path(os.path.realpath(os.path.join(inside, os.path.dirname(os.path.normpath(prefix))))).is_relative_to(
        inside
    ):
        raise leaves
    try:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, root, width, height)
    except OSError:
        raise
    except Exception as error:  # what the host raises for a path that leaves the folder
        raise leaves from error
    return folder, f"{name}_{counter:05}_", subfolder
