"""Lists in csv: EditBoard's, and one's own with the columns video, source, edit.

Optional columns of one's own are split, name, kind, mask and words.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from .clips import BadRow, plain_name
from .rows import Draft, Entries, Place
from .table import Cells, read_table

_EDITBOARD = {"original_video_path", "edited_video_path", "source_prompt", "target_prompt"}
_OWN = {"video", "source", "edit"}


def read(file: Path, text: str) -> Entries:
    """Read a table by the layout that its head tells. Raises BadRow."""
    table = read_table(text)
    if not (table.columns >= _EDITBOARD or table.columns >= _OWN):
        raise BadRow("no known layout")
    # Edits of one clip that have no names of their own are named by their kind, and counted.
    counts: Counter[tuple[str, str, str]] = Counter()
    for line, cells in table.rows:
        if isinstance(cells, BadRow):
            yield Place(file, line), cells
            continue
        draft = _editboard(file, cells) if table.columns >= _EDITBOARD else _own(file, cells)
        if not draft.name:
            key = (str(draft.split), str(draft.video), str(draft.kind))
            counts[key] += 1
            draft.name = draft.kind if counts[key] == 1 else f"{draft.kind}-{counts[key]}"
        yield Place(file, line), draft


def _editboard(file: Path, cells: Cells) -> Draft:
    clip = cells["original_video_path"]
    name = plain_name(cells["edited_video_path"])
    sentences = (cells["source_prompt"], cells["target_prompt"])
    return Draft(file, plain_name(clip), name, "edit", clip, *sentences, mask=cells.get("semantic_mask_path"))


def _own(file: Path, cells: Cells) -> Draft:
    kind = cells.get("kind") or "edit"
    words = tuple(word.strip() for word in cells.get("words", "").split(";") if word.strip())
    sentences = (cells["source"], cells["edit"])
    return Draft(
        file,
        plain_name(cells["video"]),
        cells.get("name"),
        kind,
        cells["video"],
        *sentences,
        split=cells.get("split"),
        mask=cells.get("mask"),
        words=words,
    )
