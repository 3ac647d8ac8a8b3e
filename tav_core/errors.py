"""Tell the person at the graph why an input cannot be used, and what to do."""

from __future__ import annotations


class Refusal(ValueError):
    """An input that cannot be used: which one, why, and what to do about it.

    ``input``: the name that the node's socket or widget has. ``reason``: one sentence without its full stop.
    ``remedy``: one sentence or more, complete. ``str()`` gives ``input: reason. remedy``.
    """

    def __init__(self, input: str, reason: str, remedy: str) -> None:
        super().__init__(f"{input}: {reason}. {remedy}")
        self.input, self.reason, self.remedy = input, reason, remedy

    @property
    def without_input(self) -> str:
        """The text for places where the host names the input itself (``validate_inputs``)."""
        return f"{self.reason}. {self.remedy}"
