"""One edit of one clip, as a list has it and as the study takes it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .clips import BadRow, find_clip, find_mask

# Names become folders of the results. Some scripts write vowels as marks, which \w does not take.
_SIGNS = "()+,'&!@=~-"
_MOST_LETTERS = 100


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
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"no {what}")
    if _has_broken_characters(value):
        raise BadRow(f"the {what} has characters that are none")
    return " ".join(value.split())


def _name(value: Any, what: str) -> str:
    text = str(value) if isinstance(value, (str, int)) else ""
    text = unicodedata.normalize("NFC", text.strip())
    letters = all(each.isalnum() or each in "_ ." + _SIGNS or unicodedata.category(each)[0] == "M" for each in text)
    if not text or not letters or len(text) > _MOST_LETTERS or text[0] == "." or text[-1] == ".":
        shown = repr(value[:60]) if isinstance(value, str) else f"{type(value).__name__} {text[:60]}".strip()
        raise BadRow(f"the {what} has no usable name: {shown}")
    return text


def _number(value: Any, what: str) -> int:
    given = value
    if isinstance(given, str) and re.fullmatch(r"\s*[0-9]{1,9}\s*", given):
        given = int(given)
    elif isinstance(given, float) and given.is_integer():
        given = int(given)
    if isinstance(given, bool) or not isinstance(given, int) or not (what == "step") <= given < 10**9:
        shown = str(value)[:40] if isinstance(value, (str, int, float)) else type(value).__name__
        raise BadRow(f"{what} is {shown!r}, not a number of frames")
    return given


def _has_broken_characters(text: str) -> bool:
    """Return whether a text cannot be written: JSON can name half of a character."""
    return any("\ud800" <= each <= "\udfff" for each in text)


def _new_words(source: str, edit: str) -> tuple[str, ...]:
    """Return the words of a sentence that another one does not have, longer than two letters."""
    known = {"the", "and", "with", "into", "from", *re.findall(r"\w+", source.lower())}
    return tuple(dict.fromkeys(word for word in re.findall(r"\w{3,}", edit.lower()) if word not in known))
