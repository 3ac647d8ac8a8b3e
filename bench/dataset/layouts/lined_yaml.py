"""YAML whose mappings and lists know the lines of their values. It builds plain values only."""

from __future__ import annotations

from typing import Any

import yaml

from .clips import BadRow


class Lined(dict[Any, Any]):
    """A mapping that knows the lines of its keys' values."""

    lines: dict[Any, int]

    def part(self, key: str) -> Lined:
        """Return the mapping under a key. Raises BadRow if there is none."""
        value = self.get(key)
        if not isinstance(value, Lined):
            raise BadRow(f"{key} is not a mapping")
        return value


class LinedList(list[Any]):
    """A list that knows the lines of its values."""

    lines: list[int]


class _Loader(yaml.SafeLoader):
    """SafeLoader that builds the two."""


def load(text: str) -> Any:
    """Read a document. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader that keeps lines


def _mapping(loader: _Loader, node: yaml.MappingNode) -> Lined:
    loader.flatten_mapping(node)
    made = Lined()
    made.lines = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, (str, int, float, bool, type(None))):
            raise yaml.constructor.ConstructorError(None, None, "a key is no text", key_node.start_mark)
        made[key] = loader.construct_object(value_node, deep=True)
        made.lines[key] = value_node.start_mark.line + 1
    return made


def _sequence(loader: _Loader, node: yaml.SequenceNode) -> LinedList:
    made = LinedList(loader.construct_object(child, deep=True) for child in node.value)
    made.lines = [child.start_mark.line + 1 for child in node.value]
    return made


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:seq", _sequence)
