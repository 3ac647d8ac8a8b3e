"""Reading the graph that is being run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def source_text(prompt: Mapping[str, Any] | None, node_id: str | None, input_name: str) -> str:
    """The text of the first prompt node upstream of an input; "" if there is none to be found.

    ``prompt``: the running graph in API format. Only a record of what was tuned on, so a graph that hides
    its text (behind a linked string, say) is no error.
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
