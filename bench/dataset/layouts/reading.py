"""Find the lists of edits below a folder, and read each by its layout."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import yaml

from . import from_csv, from_json, from_yaml
from .clips import BadRow, is_inside
from .rows import Entries, Place, Reading, Row, finished

# Lists of edits are small; a larger file is something else.
_MOST_BYTES = 32 * 2**20
_MOST_FILES = 20_000
_READERS: dict[str, Callable[[Path, str], Entries]] = {
    ".yaml": from_yaml.read,
    ".yml": from_yaml.read,
    ".csv": from_csv.read,
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
                reading.broken.append(f"{place}: a second edit {'/'.join(key)}")
            else:
                seen.add(key)
                reading.rows.append(made)
    return reading


def _lists(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = []
    for number, file in enumerate(path.rglob("*")):
        if number > _MOST_FILES * 50:
            break
        if file.suffix.lower() in _READERS and file.is_file():
            found.append(file)
    return sorted(found)[:_MOST_FILES]


def _rows_of(file: Path, roots: Sequence[Path]) -> Iterator[tuple[Place, Row | BadRow]]:
    """Yield each row of a file or why it is none. A file of no known layout gives one that is none."""
    top = Place(file, 1)
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise BadRow(f"the file is larger than {_MOST_BYTES // 2**20} MiB")
        text = file.read_text(encoding="utf-8-sig")
        for place, draft in _READERS[file.suffix.lower()](file, text):
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
    except (yaml.YAMLError, UnicodeDecodeError, csv.Error, OSError, RecursionError) as error:
        yield top, BadRow(f"it cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
