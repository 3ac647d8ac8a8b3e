"""Act on ComfyUI's page as a person does."""

from __future__ import annotations

import re
from typing import Any

SECONDS = 600


def set_widgets(page: Any, values: dict[str, Any], node_type: str = "") -> None:
    page.evaluate(
        "([values, type]) => { for (const node of app.graph.nodes) for (const widget of node.widgets ?? [])"
        "if (widget.name in values && (!type || node.type === type)) widget.value = values[widget.name]; }",
        [values, node_type],
    )


def wait_until(page: Any, condition: str, argument: Any = None) -> None:
    page.wait_for_function(condition, arg=argument, timeout=SECONDS * 1000, polling=500)


def run(page: Any) -> None:
    page.locator("[data-testid=queue-button]").first.click()


def node_id(page: Any, node_type: str) -> str:
    return str(page.evaluate("type => app.graph.nodes.find(n => n.type === type).id", node_type))


def cancel(page: Any) -> None:
    """The button beside Run."""
    page.get_by_role("button", name=re.compile("cancel current run|interrupt", re.I)).first.click()
