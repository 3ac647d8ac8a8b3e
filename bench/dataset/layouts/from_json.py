"""Lists in json: FiVE, a list of entries, and DAVIS-Edit, an object of videos. Both have masks in folders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .clips import BadRow, plain_name
from .lined_json import elements, members
from .rows import Draft, Entries, Place


def read(file: Path, text: str) -> Entries:
    """Read a document by the layout that its outermost value tells. Raises BadRow or JSONDecodeError."""
    match text.lstrip()[:1]:
        case "[":
            yield from _known(_five(file, text))
        case "{":
            yield from _known(_davis_edit(file, text))
        case _:
            raise BadRow("no known layout")


def _known(entries: Entries) -> Entries:
    """Pass entries on. Raises BadRow for a file none of whose entries is one: its layout is another."""
    held: list[tuple[Place, Draft | BadRow]] | None = []
    for entry in entries:
        if held is None:
            yield entry
        else:
            held.append(entry)
            if isinstance(entry[1], Draft):
                yield from held
                held = None
    if held is not None:
        raise BadRow("no known layout")


def _five(file: Path, text: str) -> Entries:
    for number, (value, line) in enumerate(elements(text)):
        if isinstance(value, dict) and "video_name" in value:
            yield Place(file, line), _five_entry(file, value, number)
        else:
            yield Place(file, line), BadRow("the entry has no video_name")


def _five_entry(file: Path, value: dict[str, Any], number: int) -> Draft:
    """Brackets mark the words that change."""
    source, target = value.get("source_prompt"), value.get("target_prompt")
    kind, clip = value.get("editing_type_id", "edit"), value["video_name"]
    words = tuple(re.findall(r"\[([^\]]+)\]", target)) if isinstance(target, str) else ()
    name = plain_name(clip) if isinstance(clip, str) else clip
    sentences = (_without_brackets(source), _without_brackets(target))
    return Draft(file, name, f"{kind}-{number}", kind, clip, *sentences, found_mask=True, words=words)


def _without_brackets(text: Any) -> Any:
    return re.sub(r"[\[\]]", "", text) if isinstance(text, str) else text


def _davis_edit(file: Path, text: str) -> Entries:
    for (video, value), line in members(text):
        kinds = [kind for kind in ("similar", "changing") if isinstance(value, dict) and kind in value]
        if not kinds or "original" not in value:
            yield Place(file, line), BadRow("the entry is not original with similar or changing")
            continue
        for kind in kinds:
            draft = Draft(file, video, kind, kind, video, value["original"], value[kind], found_mask=True)
            yield Place(file, line), draft
