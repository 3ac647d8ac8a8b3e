"""The limits that a node's schema states, held against what comes over links: the host checks widgets alone."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io


def check_limits(node: type[io.ComfyNode], **values: Any) -> None:
    """Raise ValueError, naming the input and what it takes, for a value that the node's own widgets would refuse."""
    inputs = {each.id: each for each in node.define_schema().inputs}
    for name, value in values.items():
        each: Any = inputs[name]
        options = getattr(each, "options", None)
        if options is not None and value not in options:
            raise ValueError(f"{name}: {str(value)[:100]!r} is not one of {', '.join(options)}. Choose one of those.")
        # Written so that NaN, which compares with nothing, is outside.
        if options is None and not each.min <= value <= each.max:
            raise ValueError(f"{name}: {value} is outside {each.min} to {each.max}. Give a value between those.")
