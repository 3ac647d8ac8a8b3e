"""Read public data sets of video edits into one kind of row.

Known layouts: LOVEU-TGVE 2023 and Tune-A-Video yaml, FateZero yaml, Video-P2P yaml, V2VBench yaml, EditBoard csv, FiVE
and DAVIS-Edit json, and a csv of one's own with the columns video, source, edit and optionally split, name, kind, mask,
words. A row that cannot be used is left out and named with its file and line. Nothing is read outside the given
folders, whatever a file or a link says.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import yaml

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
VIDEOS = {".mp4", ".webm", ".gif", ".mkv", ".mov", ".avi"}
LISTS = {".yaml", ".yml", ".csv", ".json"}
# Lists of edits are small; a larger file is something else.
_MOST_BYTES = 32 * 2**20
_MOST_FILES = 20_000
# Names become folders of the results.
_NAME = re.compile(r"[\w()+,-][\w ().+,-]{0,99}")
# Folders in which data sets keep their frames and masks.
_FRAME_FOLDERS = ("", "images", "JPEGImages", "JPEGImages/480p", "videos", "frames", "data", "480p_frames")
_MASK_FOLDERS = ("bmasks", "Annotations", "Annotations/480p", "masks")


class BadRow(ValueError):
    """A row that cannot be used; the text says why."""


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


def read_dataset(path: Path, folders: Sequence[Path] = ()) -> Reading:
    """Read every list of edits in a folder, or one file. ``folders``: where clips may lie beside the list's own.

    Raises FileNotFoundError if ``path`` is not there.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    home = path if path.is_dir() else path.parent
    roots = [each.resolve() for each in (home, *folders)]
    reading = Reading([], [])
    seen: set[tuple[str, str, str]] = set()
    for file in _lists(path):
        if not _is_inside(file, roots):
            reading.broken.append(f"{file}:1: it links to a file outside the given folders")
            continue
        for place, made in _rows_of(file, roots):
            key = (made.split, made.video, made.name) if isinstance(made, Row) else None
            if isinstance(made, BadRow):
                reading.broken.append(f"{place}: {made}")
            elif key in seen:
                reading.broken.append(f"{place}: a second edit {'/'.join(key or ())}")
            else:
                seen.add(key)  # type: ignore[arg-type]
                reading.rows.append(made)
    return reading


def _lists(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = []
    for number, file in enumerate(path.rglob("*")):
        if number > _MOST_FILES * 50:
            break
        if file.suffix.lower() in LISTS and file.is_file():
            found.append(file)
    return sorted(found)[:_MOST_FILES]


def _rows_of(file: Path, roots: Sequence[Path]) -> Iterator[tuple[Place, Row | BadRow]]:
    """Yield each row of a file or why it is none. A file of no known layout gives one that is none."""
    top = Place(file, 1)
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise BadRow(f"the file is larger than {_MOST_BYTES // 2**20} MiB")
        text = file.read_text(encoding="utf-8-sig")
        entries = _READERS[file.suffix.lower()](file, text)
        for place, draft in entries:
            try:
                yield place, _finished(draft(), place, roots)
            except BadRow as error:
                yield place, error
    except BadRow as error:
        yield top, error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        yield Place(file, mark.line + 1 if mark else 1), BadRow(f"not yaml: {error.problem}")
    except json.JSONDecodeError as error:
        yield Place(file, error.lineno), BadRow(f"not json: {error.msg}")
    except (yaml.YAMLError, UnicodeDecodeError, csv.Error, OSError, RecursionError) as error:
        yield top, BadRow(f"it cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}")


@dataclass
class _Draft:
    """A row as a file has it. ``clip`` and ``mask`` are names or paths; ``near``: the file that names them."""

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


_Entry = tuple[Place, Callable[[], _Draft]]


def _finished(draft: _Draft, place: Place, roots: Sequence[Path]) -> Row:
    """Check a draft and find its files. Raises BadRow."""
    source, edit = (_sentence(draft.source, "source sentence"), _sentence(draft.edit, "sentence for the edit"))
    names = [_name(value, what) for value, what in ((draft.video, "video"), (draft.name, "edit"), (draft.kind, "kind"))]
    split = _name(draft.split, "split") if draft.split else "videos"
    folders = ("", draft.split, f"{draft.split}/480p_frames") if draft.split else ()
    frames = find_clip(draft.clip, draft.near, roots, tuple(dict.fromkeys((*folders, *_FRAME_FOLDERS))))
    mask = None
    if draft.mask not in (None, ""):
        mask = find_clip(draft.mask, draft.near, roots, ("",))
    elif draft.found_mask:
        for folder in _MASK_FOLDERS:
            try:
                mask = find_clip(names[0], draft.near, roots, (folder,), "mask")
                break
            except BadRow:
                continue
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


def _is_inside(path: Path, roots: Sequence[Path]) -> bool:
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):
        return False
    return any(real.is_relative_to(root) for root in roots)


def find_clip(
    name: Any, near: Path, roots: Sequence[Path], folders: Sequence[str] = ("",), what: str = "video"
) -> Path:
    """Find a folder of pictures or a video file below the roots by the path that a list gives.

    The path may be relative to the list or to a root, or begin with folders that only its author has. Raises BadRow
    for a clip that is not there, that is empty, or that lies outside the roots.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise BadRow(f"no {what}")
    text = PurePosixPath(name.strip().replace("\\", "/"))
    if ".." in text.parts:
        given = [near.parent / text]
    elif text.is_absolute():
        given = [Path(text)]
    else:
        tails = [PurePosixPath(*text.parts[start:]) for start in range(len(text.parts))]
        bases = [near.parent, *(root / folder for root in roots for folder in folders)]
        given = [base / tail for tail in tails for base in bases]
    outside = False
    for candidate in given:
        for path in (candidate, *(candidate.with_name(candidate.name + suffix) for suffix in sorted(VIDEOS))):
            try:
                present = path.exists()
            except OSError:  # a name that no file system takes
                continue
            if not present:
                continue
            if not _is_inside(path, roots):
                outside = True
            elif path.is_dir() and pictures_of(path, roots):
                return path.resolve()
            elif path.is_file() and path.suffix.lower() in VIDEOS:
                return path.resolve()
    if outside or ".." in text.parts or text.is_absolute():
        raise BadRow(f"the {what} {name[:80]} lies outside the given folders, or is not there")
    raise BadRow(f"the {what} {name[:80]} is not there")


def pictures_of(folder: Path, roots: Sequence[Path] | None = None) -> list[Path]:
    """Return the pictures of a folder in the order of their numbers. Raises BadRow for a link out of the roots."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in PICTURES and path.is_file()]
    if roots is not None and any(path.is_symlink() and not _is_inside(path, roots) for path in found):
        raise BadRow(f"a picture of {folder.name} links to a file outside the given folders")

    return sorted(found, key=lambda path: re.sub(r"\d+", lambda digits: digits[0].zfill(20), path.stem))


class _Lined(dict[Any, Any]):
    """A mapping that knows the lines of its keys' values."""

    lines: dict[Any, int]


class _Loader(yaml.SafeLoader):
    """SafeLoader whose mappings and lists know their lines. It builds plain values only."""


class _LinedList(list[Any]):
    lines: list[int]


def _mapping(loader: _Loader, node: yaml.MappingNode) -> _Lined:
    loader.flatten_mapping(node)
    made = _Lined()
    made.lines = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, (str, int, float, bool, type(None))):
            raise yaml.constructor.ConstructorError(None, None, "a key is no text", key_node.start_mark)
        made[key] = loader.construct_object(value_node, deep=True)
        made.lines[key] = value_node.start_mark.line + 1
    return made


def _sequence(loader: _Loader, node: yaml.SequenceNode) -> _LinedList:
    made = _LinedList(loader.construct_object(child, deep=True) for child in node.value)
    made.lines = [child.start_mark.line + 1 for child in node.value]
    return made


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:seq", _sequence)


def _yaml(file: Path, text: str) -> Iterator[_Entry]:
    document = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader that keeps lines
    if isinstance(document, list):
        document = _wrapped(document)
    if not isinstance(document, _Lined):
        raise BadRow("no known layout")
    if "train_data" in document:
        yield from _tune_a_video(file, document)
    elif "dataset_config" in document:
        yield from _fatezero(file, document)
    elif "image_path" in document:
        yield from _video_p2p(file, document)
    elif isinstance(document.get("data"), list):
        yield from _v2vbench(file, document["data"])
    else:
        raise BadRow("no known layout")


def _wrapped(entries: Any) -> _Lined:
    made = _Lined(data=entries)
    made.lines = {"data": 1}
    return made


def _part(document: _Lined, key: str) -> _Lined:
    value = document.get(key)
    if not isinstance(value, _Lined):
        raise BadRow(f"{key} is not a mapping")
    return value


def _prompts(holder: _Lined, key: str) -> list[tuple[str, str, Any, int]]:
    """Return name, kind, sentence and line of each prompt of a mapping or a list."""
    prompts = holder.get(key)
    if isinstance(prompts, _Lined):
        return [(str(name), str(name), text, prompts.lines[name]) for name, text in prompts.items()]
    if isinstance(prompts, _LinedList):
        return [(str(i), "edit", text, line) for i, (text, line) in enumerate(zip(prompts, prompts.lines, strict=True))]
    raise BadRow(f"{key} is neither a mapping nor a list of sentences")


def _tune_a_video(file: Path, document: _Lined) -> Iterator[_Entry]:
    """Tune-A-Video (prompts in a list), and LOVEU-TGVE 2023, whose prompts have names and whose folder is a split."""
    train, validation = _part(document, "train_data"), _part(document, "validation_data")
    prompts = _prompts(validation, "prompts")
    named = isinstance(validation["prompts"], _Lined)
    for name, kind, text, line in prompts:
        yield (
            Place(file, line),
            lambda name=name, kind=kind, text=text: _Draft(
                file,
                file.stem,
                name,
                kind,
                train.get("video_path"),
                train.get("prompt"),
                text,
                split=file.parent.name if named else "",
                numbers={
                    "count": train.get("n_sample_frames", train.get("num_frames")),
                    "first": train.get("sample_start_idx"),
                    "step": train.get("sample_frame_rate", train.get("frame_rate")),
                },
            ),
        )


def _fatezero(file: Path, document: _Lined) -> Iterator[_Entry]:
    data = _part(document, "dataset_config")
    editing = _part(document, "editing_config")
    source = data.get("prompt")
    for name, kind, text, line in _edits_only(_prompts(editing, "editing_prompts"), source):
        yield (
            Place(file, line),
            lambda name=name, kind=kind, text=text: _Draft(
                file,
                file.stem,
                name,
                kind,
                data.get("path"),
                source,
                text,
                split=file.parent.name,
                numbers={
                    "count": data.get("n_sample_frame"),
                    "first": data.get("start_sample_frame"),
                    "step": data.get("sampling_rate"),
                },
            ),
        )


def _video_p2p(file: Path, document: _Lined) -> Iterator[_Entry]:
    source = document.get("prompt")
    for name, kind, text, line in _edits_only(_prompts(document, "prompts"), source):
        yield (
            Place(file, line),
            lambda name=name, kind=kind, text=text: _Draft(
                file, file.stem, name, kind, document.get("image_path"), source, text
            ),
        )


def _edits_only(prompts: list[tuple[str, str, Any, int]], source: Any) -> list[tuple[str, str, Any, int]]:
    """Leave out the source sentence, which FateZero and Video-P2P list first."""

    def plain(text: Any) -> str:
        return " ".join(re.findall(r"\w+", str(text).lower()))

    return [prompt for prompt in prompts if plain(prompt[2]) != plain(source)]


def _v2vbench(file: Path, entries: Any) -> Iterator[_Entry]:
    for entry, line in zip(entries, getattr(entries, "lines", [1] * len(entries)), strict=True):
        if not isinstance(entry, _Lined) or not isinstance(entry.get("edit"), _LinedList):
            yield Place(file, line), _refused("the entry has no video_id and list of edits")
            continue
        for number, (edit, edit_line) in enumerate(zip(entry["edit"], entry["edit"].lines, strict=True)):
            yield (
                Place(file, edit_line),
                lambda entry=entry, edit=edit, number=number: _Draft(
                    file,
                    entry.get("video_id"),
                    number,
                    edit.get("type", edit.get("kind", "edit")) if isinstance(edit, dict) else "edit",
                    entry.get("video_id"),
                    entry.get("prompt", entry.get("source_prompt")),
                    edit.get("prompt") if isinstance(edit, dict) else edit,
                ),
            )


def _refused(reason: str) -> Callable[[], _Draft]:
    def draft() -> _Draft:
        raise BadRow(reason)

    return draft


_EDITBOARD = {"original_video_path", "edited_video_path", "source_prompt", "target_prompt"}
_OWN = {"video", "source", "edit"}


def _csv(file: Path, text: str) -> Iterator[_Entry]:
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    columns = {str(name).strip() for name in reader.fieldnames or ()}
    if _EDITBOARD <= columns:
        make: Callable[[Path, dict[str, Any], int], _Draft] = _editboard
    elif columns >= _OWN:
        make = _own
    else:
        raise BadRow("no known layout")
    for number, record in enumerate(reader):
        cells = {str(key).strip(): value for key, value in record.items()}
        place = Place(file, reader.line_num)
        if None in record or any(value is None for value in record.values()):
            yield place, _refused("it has more or fewer cells than the head of the table")
        else:
            yield place, lambda cells=cells, number=number: make(file, cells, number)


def _editboard(file: Path, cells: dict[str, Any], number: int) -> _Draft:
    video = Path(cells["original_video_path"].replace("\\", "/")).name
    name = Path(cells["edited_video_path"].replace("\\", "/")).name or str(number)
    return _Draft(
        file,
        video,
        name,
        "edit",
        cells["original_video_path"],
        cells["source_prompt"],
        cells["target_prompt"],
        mask=cells.get("semantic_mask_path"),
    )


def _own(file: Path, cells: dict[str, Any], number: int) -> _Draft:
    return _Draft(
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


def _json(file: Path, text: str) -> Iterator[_Entry]:
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] == "[":
        for number, (value, line) in enumerate(_elements(text, start)):
            if isinstance(value, dict) and "video_name" in value:
                yield Place(file, line), lambda value=value, number=number: _five(file, value, number)
            else:
                yield Place(file, line), _refused("the entry has no video_name")
    elif text[start : start + 1] == "{":
        for (key, value), line in _members(text, start):
            kinds = ("similar", "changing")
            if isinstance(value, dict) and "original" in value and any(kind in value for kind in kinds):
                for kind in (kind for kind in kinds if kind in value):
                    yield (
                        Place(file, line),
                        lambda key=key, value=value, kind=kind: _Draft(
                            file, key, kind, kind, key, value["original"], value[kind], found_mask=True
                        ),
                    )
            else:
                yield Place(file, line), _refused("the entry is not original with similar or changing")
    else:
        raise BadRow("no known layout")


def _five(file: Path, value: dict[str, Any], number: int) -> _Draft:
    source, target = (str(value.get(key) or "") for key in ("source_prompt", "target_prompt"))
    kind = value.get("editing_type_id", "edit")
    return _Draft(
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


def _elements(text: str, start: int) -> Iterator[tuple[Any, int]]:
    """Yield the elements of a JSON list and their lines. Raises JSONDecodeError where it is damaged."""
    position = _skip(text, start + 1)
    while text[position : position + 1] != "]":
        line = text.count("\n", 0, position) + 1
        value, position = json.JSONDecoder().raw_decode(text, position)
        yield value, line
        position = _next(text, position, "]")


def _members(text: str, start: int) -> Iterator[tuple[tuple[str, Any], int]]:
    """Yield the members of a JSON object and their lines. Raises JSONDecodeError where it is damaged."""
    position = _skip(text, start + 1)
    while text[position : position + 1] != "}":
        line = text.count("\n", 0, position) + 1
        key, position = json.JSONDecoder().raw_decode(text, position)
        position = _skip(text, position)
        if not isinstance(key, str) or text[position : position + 1] != ":":
            raise json.JSONDecodeError("a name and a colon are expected", text, position)
        value, position = json.JSONDecoder().raw_decode(text, _skip(text, position + 1))
        yield (key, value), line
        position = _next(text, position, "}")


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _next(text: str, position: int, end: str) -> int:
    position = _skip(text, position)
    if text[position : position + 1] == ",":
        return _skip(text, position + 1)
    if text[position : position + 1] != end:
        raise json.JSONDecodeError(f"a comma or {end} is expected", text, position)
    return position


_READERS: dict[str, Callable[[Path, str], Iterator[_Entry]]] = {
    ".yaml": _yaml,
    ".yml": _yaml,
    ".csv": _csv,
    ".json": _json,
}
