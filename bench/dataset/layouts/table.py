"""Tables as people's programs write them: commas, semicolons or tabs, quoted cells, heads in any order and case."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from .clips import BadRow

Cells = Mapping[str, str]


class Table(NamedTuple):
    """``columns``: the head, in small letters; ``rows``: line -> cells by column, or why a row has none."""

    columns: frozenset[str]
    rows: Iterator[tuple[int, Cells | BadRow]]


def read_table(text: str) -> Table:
    """Read a table. Lines are counted from 1; a row of several lines has its first. Empty rows are left out."""
    top = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=top.count)
    lines = _records(text, delimiter)
    head: list[str] = []
    for _, first in lines:
        if not isinstance(first, BadRow):
            head = [name.strip().lower() for name in first]
        break
    return Table(frozenset(head), _rows(head, lines))


def _records(text: str, delimiter: str) -> Iterator[tuple[int, list[str] | BadRow]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, BadRow(f"it cannot be read: {error}")
            continue
        if any(cell.strip() for cell in record):
            yield line, record


def _rows(head: list[str], lines: Iterator[tuple[int, list[str] | BadRow]]) -> Iterator[tuple[int, Cells | BadRow]]:
    for line, record in lines:
        if isinstance(record, BadRow):
            yield line, record
        elif len(record) < len(head) or any(cell.strip() for cell in record[len(head) :]):
            yield line, BadRow("it has more or fewer cells than the head of the table")
        else:
            yield line, {name: cell.strip() for name, cell in zip(head, record, strict=False)}
