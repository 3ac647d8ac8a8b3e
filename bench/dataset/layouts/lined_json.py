"""JSON whose outermost values are read one by one, with their lines, so that damage costs only what follows it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


def elements(text: str) -> Iterator[tuple[Any, int]]:
    """Yield the elements of a list and their lines. Raises JSONDecodeError where it is damaged."""
    position = _skip(text, text.index("[") + 1)
    while text[position : position + 1] != "]":
        line = _line(text, position)
        value, position = json.JSONDecoder().raw_decode(text, position)
        yield value, line
        position = _next(text, position, "]")


def members(text: str) -> Iterator[tuple[tuple[str, Any], int]]:
    """Yield the members of an object and their lines. Raises JSONDecodeError where it is damaged."""
    position = _skip(text, text.index("{") + 1)
    while text[position : position + 1] != "}":
        line = _line(text, position)
        key, position = json.JSONDecoder().raw_decode(text, position)
        position = _skip(text, position)
        if not isinstance(key, str) or text[position : position + 1] != ":":
            raise json.JSONDecodeError("a name and a colon are expected", text, position)
        value, position = json.JSONDecoder().raw_decode(text, _skip(text, position + 1))
        yield (key, value), line
        position = _next(text, position, "}")


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


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
