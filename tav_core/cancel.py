"""Let the user's cancel end work that no progress bar accompanies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_check: ContextVar[Callable[[], None] | None] = ContextVar("tune-a-video-cancel", default=None)


@contextmanager
def cancellable(check: Callable[[], None]) -> Iterator[None]:
    """Have long work inside call ``check`` now and then, which raises once the user has cancelled."""
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


def raise_if_cancelled() -> None:
    """Raise what the ``check`` of ``cancellable`` raises. Without one, nothing can be cancelled."""
    check = _check.get()
    if check is not None:
        check()
