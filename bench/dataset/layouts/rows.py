"""One edit of one clip, as a list has it and as the study takes it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .clips import BadRow, find_clip, find_mask

# Names become folders of the results.
_NAME = re.compile(r"[\w()+,-][\w ().+,-]{0,99}")


class Place(NamedTuple):
    """A line of a file, counted from 1."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Row:
    """One edit of one clip.

    ``split``/``video``/``name`` is its folder in the results; ``frames`` a folder of pictures or a video file, ``mask``
    the same for the edited region; ``kind`` groups edits in tables; ``words``: what the edit should show. ``count``,
    ``first`` and ``step`` choose frames; count 0: as many as the study asks for.
    """

    split: str
    video: str
    name: str
    kind: str
    frames: Path
    source: str
    edit: str
    mask: Path | None = None
    words: tuple[str, ...] = ()
    first: int = 0
    step: int = 1
    count: int = 0
    place: str = field(default="", compare=False)


class Reading(NamedTuple):
    """The rows of a data set, and one line for each row that was left out."""

    rows: list[Row]
    broken: list[str]


@dataclass
class Draft:
    """A row as a file has it, unchecked. ``clip`` and ``mask`` are names or paths; ``near``: the file that names them.

    ``found_mask``: the mask lies under the video's name in a folder of masks, if there is one.
    """

    near: Path
    video: Any
    name: Any
    kind: Any
    clip: Any
    source: Any
    edit: Any
    split: Any = ""
    mask: Any = None
    found_mask: bool = False
    words: tuple[str, ...] = ()
    numbers: dict[str, Any] = field(default_factory=dict)


# A reader yields a draft, or why an entry is none, with its place.
Entries = Iterator[tuple[Place, Draft | BadRow]]


def finished(draft: Draft, place: Place, roots: Sequence[Path]) -> Row:
    """Check a draft and find its files. Raises BadRow."""
    source, edit = (_sentence(draft.source, "source sentence"), _sentence(draft.edit, "sentence for the edit"))
    names = [_name(value, what) for value, what in ((draft.video, "video"), (draft.name, "edit"), (draft.kind, "kind"))]
    split = _name(draft.split, "split") if draft.split else "videos"
    frames = find_clip(draft.clip, draft.near, roots, draft.split)
    mask = find_mask(draft.mask, names[0] if draft.found_mask else "", draft.near, roots)
    numbers = {key: _number(value, key) for key, value in draft.numbers.items() if value is not None}
    words = draft.words or _new_words(source, edit)
    return Row(split, *names, frames, source, edit, mask, words, place=str(place), **numbers)


def _sentence(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"no {what}")
    return " ".join(value.split())


def _name(value: Any, what: str) -> str:
    text = str(value).strip() if isinstance(value, (str, int)) else ""
    if not _NAME.fullmatch(text) or text.endswith((".", " ")):
        raise BadRow(f"the {what} has no usable name: {str(value)[:60]!r}")
    return text


def _number(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < (1 if what == "step" else 0):
        raise BadRow(f"{what} is {str(value)[:40]!r}, not a number of frames")
    return value


def _new_words(source: str, edit: str) -> tuple[str, ...]:
    """Return the words of a sentence that another one does not have, longer than two letters."""
    known = {"the", "and", "with", "into", "from", *re.findall(r"\w+", source.lower())}
    return tuple(dict.fromkeys(word for word in re.findall(r"\w{3,}", edit.lower()) if word not in known))
