"""Check values against the node's own schema. The host checks widgets only, and a link can bring any value."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

from comfy_api.latest import io

from ...tav_core.errors import Refusal


def within_limits(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
    """Decorate a node's ``execute``, below ``@classmethod``: check its arguments before it runs.

    Raises Refusal for a number, a choice or a boolean that the node's own widget would refuse.
    """
    signature = inspect.signature(execute)

    @functools.wraps(execute)
    def checked(node: type[io.ComfyNode], *args: Any, **kwargs: Any) -> io.NodeOutput:
        check_limits(node, **signature.bind(node, *args, **kwargs).arguments)
        return execute(node, *args, **kwargs)

    return checked


def check_limits(node: type[io.ComfyNode], /, **values: Any) -> None:
    """Raise Refusal for a value that the node's own widget would refuse; names without a widget are ignored."""
    for widget in node.define_schema().inputs:
        if widget.id not in values:
            continue
        value = values[widget.id]
        if isinstance(widget, io.Combo.Input):
            _check_choice(widget, value)
        elif isinstance(widget, (io.Int.Input, io.Float.Input)):
            _check_number(widget, value)
        elif isinstance(widget, io.Boolean.Input) and not isinstance(value, bool):
            raise Refusal(widget.id, f"{_shown(value)} is neither true nor false", "Connect a boolean.")


def _check_choice(widget: Any, value: Any) -> None:
    # Files are listed when the page loads, and one that was added since can be loaded. Their nodes look for them.
    if widget.upload is None and not (isinstance(value, str) and value in widget.options):
        options = ", ".join(widget.options)
        raise Refusal(widget.id, f"{_shown(value)} is not one of {options}", "Choose one of those.")


def _check_number(widget: Any, value: Any) -> None:
    whole = isinstance(widget, io.Int.Input)
    if not isinstance(value, Integral if whole else Real):
        raise Refusal(widget.id, f"{_shown(value)} is not a {'whole ' if whole else ''}number", "Connect a number.")
    # NaN compares with nothing, so it is outside too.
    if not widget.min <= value <= widget.max:
        raise Refusal(widget.id, f"{value} is outside {widget.min} to {widget.max}", "Give a value between those.")


def _shown(value: Any) -> str:
    return repr(str(value)[:100])
