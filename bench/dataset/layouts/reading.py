"""Find the lists of edits below a folder, and read each by its layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import yaml

from . import from_csv, from_json, from_yaml
from .clips import BadRow, is_inside
from .rows import Entries, Place, Reading, Row, finished

# A study's own file, and what else lies in its folder: it is no data set.
STUDY = "study.json"
STUDY_PARTS = {
    *("source", "mask", "work", "results", "scores", "pages", "logs", "votes"),
    *(STUDY, "edits.json", "table.csv", "table.json", "summary.csv"),
}
# Lists of edits are small; a larger file is something else.
_MOST_BYTES = 32 * 2**20
_MOST_FILES = 20_000
_READERS: dict[str, Callable[[Path, str], Entries]] = {
    ".yaml": from_yaml.read,
    ".yml": from_yaml.read,
    ".csv": from_csv.read,
    ".tsv": from_csv.read,
    ".json": from_json.read,
}


def read_dataset(path: Path, folders: Sequence[Path] = ()) -> Reading:
    """Read every list of edits in a folder, or one file. ``folders``: where clips may lie beside the list's own.

    A row that cannot be used is left out and named with its file and line. Raises FileNotFoundError if ``path`` is not
    there.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    home = path if path.is_dir() else path.parent
    roots = [each.resolve() for each in (home, *folders)]
    reading = Reading([], [])
    seen: set[tuple[str, str, str]] = set()
    for file in _lists(path):
        if not is_inside(file, roots):
            reading.broken.append(f"{file}:1: it links to a file outside the given folders")
            continue
        for place, made in _rows_of(file, roots):
            if isinstance(made, BadRow):
                reading.broken.append(f"{place}: {made}")
                continue
            key = (made.split, made.video, made.name)
            if key in seen:
                reading.broken.append(f"{place}: a second edit {'/'.join(key)}; give it another name or split")
            else:
                seen.add(key)
                reading.rows.append(made)
    # Names of files may have bytes that no terminal takes.
    return Reading(reading.rows, [line.encode(errors="replace").decode() for line in reading.broken])


def _lists(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = []
    for number, file in enumerate(path.rglob("*")):
        if number > _MOST_FILES * 50:
            break
        hidden = file.name.startswith(".")
        if file.suffix.lower() in _READERS and not hidden and file.is_file() and not _is_of_a_study(file, path):
            found.append(file)
    return sorted(found)[:_MOST_FILES]


def _is_of_a_study(file: Path, top: Path) -> bool:
    """Return whether a file below ``top`` was written by a study whose folder lies there, too."""
    folders = [folder for folder in file.parents if folder == top or folder.is_relative_to(top)]
    studies = [folder for folder in folders if (folder / STUDY).is_file()]
    return any(
        (part := file.relative_to(folder).parts[0]) in STUDY_PARTS or part.startswith("editboard-")
        for folder in studies
    )


def _rows_of(file: Path, roots: Sequence[Path]) -> Iterator[tuple[Place, Row | BadRow]]:
    """Yield each row of a file or why it is none. A file of no known layout gives one that is none."""
    top = Place(file, 1)
    try:
        read = _READERS.get(file.suffix.lower())
        if read is None:
            raise BadRow(f"a list of edits is {', '.join(_READERS)}")
        if file.stat().st_size > _MOST_BYTES:
            raise BadRow(f"the file is larger than {_MOST_BYTES // 2**20} MiB")
        content = file.read_bytes()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            yield Place(file, line), BadRow("it cannot be read: it is not UTF-8; save it as UTF-8")
            return
        for place, draft in read(file, text.replace("\r\n", "\n").replace("\r", "\n")):
            try:
                yield place, draft if isinstance(draft, BadRow) else finished(draft, place, roots)
            except BadRow as error:
                yield place, error
    except BadRow as error:
        yield top, error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        yield Place(file, mark.line + 1 if mark else 1), BadRow(f"not yaml: {error.problem}")
    except json.JSONDecodeError as error:
        yield Place(file, error.lineno), BadRow(f"not json: {error.msg}")
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        yield top, BadRow(f"it cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
