"""Errors of nodes that run out of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...tav_core import host
from ...tav_core.out_of_memory import OutOfMemoryError, naming_input


@contextmanager
def memory_explained(name: str, remedy: str) -> Iterator[None]:
    """Decorate a node's ``execute``: name the input that is too large and the remedy when memory runs out.

    The host unloads its models only for errors of the accelerator's allocator, and the named error hides those from
    it. So the models are unloaded here.
    """
    try:
        with naming_input(name, remedy):
            yield
    except OutOfMemoryError:
        host.put_models_aside()
        raise
