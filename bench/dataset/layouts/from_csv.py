"""Lists in csv: EditBoard's, and one's own with the columns video, source, edit.

Optional columns of one's own are split, name, kind, mask and words.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

from .clips import BadRow
from .rows import Draft, Entries, Place

_EDITBOARD = {"original_video_path", "edited_video_path", "source_prompt", "target_prompt"}
_OWN = {"video", "source", "edit"}


def read(file: Path, text: str) -> Entries:
    """Read a table by the layout that its head tells. Raises BadRow or csv.Error."""
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    columns = {str(name).strip() for name in reader.fieldnames or ()}
    if columns >= _EDITBOARD:
        make: Callable[[Path, dict[str, str], int], Draft] = _editboard
    elif columns >= _OWN:
        make = _own
    else:
        raise BadRow("no known layout")
    for number, record in enumerate(reader):
        place = Place(file, reader.line_num)
        if None in record or any(value is None for value in record.values()):
            yield place, BadRow("it has more or fewer cells than the head of the table")
        else:
            yield place, make(file, {str(key).strip(): value for key, value in record.items()}, number)


def _editboard(file: Path, cells: dict[str, str], number: int) -> Draft:
    clip = cells["original_video_path"]
    name = Path(cells["edited_video_path"].replace("\\", "/")).name or str(number)
    return Draft(
        file,
        Path(clip.replace("\\", "/")).name,
        name,
        "edit",
        clip,
        cells["source_prompt"],
        cells["target_prompt"],
        mask=cells.get("semantic_mask_path"),
    )


def _own(file: Path, cells: dict[str, str], number: int) -> Draft:
    return Draft(
        file,
        Path(cells["video"].replace("\\", "/")).stem,
        cells.get("name") or cells.get("kind") or str(number),
        cells.get("kind") or "edit",
        cells["video"],
        cells["source"],
        cells["edit"],
        split=cells.get("split") or "",
        mask=cells.get("mask"),
        words=tuple(word.strip() for word in (cells.get("words") or "").split(";") if word.strip()),
    )
