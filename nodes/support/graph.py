"""Read the graph that is running."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def find_prompt_text(prompt: Mapping[str, Any] | None, node_id: str | None, input_name: str) -> str:
    """Return the text of the nearest prompt node upstream of an input, "" if none is found.

    ``prompt``: the running graph in API format. The text is only a record of the tuning, so a graph that hides it
    (behind a linked string, for example) is no error.
    """
    seen: set[str] = set()
    queue = [(prompt or {}).get(str(node_id), {}).get("inputs", {}).get(input_name)]
    while queue:
        link = queue.pop(0)
        if not isinstance(link, list) or str(link[0]) in seen:
            continue
        seen.add(str(link[0]))
        inputs = (prompt or {}).get(str(link[0]), {}).get("inputs", {})
        if isinstance(inputs.get("text"), str):
            return inputs["text"]
        queue.extend(inputs.values())
    return ""
