"""Lists in json: FiVE, a list of entries, and DAVIS-Edit, an object of videos. Both have masks in folders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .clips import BadRow
from .lined_json import elements, members
from .rows import Draft, Entries, Place


def read(file: Path, text: str) -> Entries:
    """Read a document by the layout that its outermost value tells. Raises BadRow or JSONDecodeError."""
    match text.lstrip()[:1]:
        case "[":
            yield from _five(file, text)
        case "{":
            yield from _davis_edit(file, text)
        case _:
            raise BadRow("no known layout")


def _five(file: Path, text: str) -> Entries:
    for number, (value, line) in enumerate(elements(text)):
        if isinstance(value, dict) and "video_name" in value:
            yield Place(file, line), _five_entry(file, value, number)
        else:
            yield Place(file, line), BadRow("the entry has no video_name")


def _five_entry(file: Path, value: dict[str, Any], number: int) -> Draft:
    """Brackets mark the words that change."""
    source, target = (str(value.get(key) or "") for key in ("source_prompt", "target_prompt"))
    kind = value.get("editing_type_id", "edit")
    return Draft(
        file,
        value["video_name"],
        f"{kind}-{number}",
        kind,
        value["video_name"],
        source.replace("[", "").replace("]", ""),
        target.replace("[", "").replace("]", ""),
        found_mask=True,
        words=tuple(re.findall(r"\[([^\]]+)\]", target)),
    )


def _davis_edit(file: Path, text: str) -> Entries:
    for (video, value), line in members(text):
        kinds = [kind for kind in ("similar", "changing") if isinstance(value, dict) and kind in value]
        if not kinds or "original" not in value:
            yield Place(file, line), BadRow("the entry is not original with similar or changing")
            continue
        for kind in kinds:
            draft = Draft(file, video, kind, kind, video, value["original"], value[kind], found_mask=True)
            yield Place(file, line), draft
