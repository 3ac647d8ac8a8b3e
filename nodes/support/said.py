"""A line of text in the node that runs: what a long work takes, before it takes it."""

from __future__ import annotations

import logging
import sys
from typing import Any

from comfy_execution.utils import get_executing_context


def say(text: str) -> None:
    """Show a line in the running node, and write it to the log. Outside of a server it goes to the log alone."""
    logging.info("Tune-A-Video: %s", text)
    context = get_executing_context()
    host: Any = sys.modules.get("server")
    instance = getattr(getattr(host, "PromptServer", None), "instance", None)
    if context is not None and instance is not None:
        instance.send_progress_text(text, context.node_id)
