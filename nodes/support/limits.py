"""Check values against the node's own schema.

The host checks widgets, and the types of links by their names. Through a switch or another pack's node for any type a
link can bring any value, or None.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ...tav_core.control.settings import Control
from ...tav_core.errors import Refusal
from ...tav_core.motion.file import Motion
from .types import ControlType, MotionType

# Sockets and text: what their values are, and what to connect. MODEL, CLIP, LATENT and CONDITIONING are looked into
# where they are used.
_KINDS: tuple[tuple[Any, type, str], ...] = (
    (io.Image.Input, Tensor, "an IMAGE"),
    (io.Mask.Input, Tensor, "a MASK"),
    (io.String.Input, str, "a text"),
    (MotionType.Input, Motion, "a motion, from One-Shot Tune or Load Motion"),
    (ControlType.Input, Control, "an Edit Control node"),
)


def within_limits(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
    """Decorate a node's ``execute``, below ``@classmethod``: check its arguments before it runs.

    Raises Refusal for what the node's own widget or socket would refuse.
    """
    signature = inspect.signature(execute)

    @functools.wraps(execute)
    def checked(node: type[io.ComfyNode], *args: Any, **kwargs: Any) -> io.NodeOutput:
        check_limits(node, **signature.bind(node, *args, **kwargs).arguments)
        return execute(node, *args, **kwargs)

    return checked


def check_limits(node: type[io.ComfyNode], /, **values: Any) -> None:
    """Raise Refusal for a value that the node's own widget or socket would refuse; other names are ignored."""
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
        elif not (value is None and widget.optional):
            _check_kind(widget, value)


def _check_kind(widget: Any, value: Any) -> None:
    for socket, kind, wanted in _KINDS:
        if isinstance(widget, socket) and not isinstance(value, kind):
            found = "nothing arrives at this input" if value is None else f"a {type(value).__name__} is connected"
            raise Refusal(widget.id, found, f"Connect {wanted}.")


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
