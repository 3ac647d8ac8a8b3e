"""What a node does when memory runs out: it says so, and has the host put its models aside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...tav_core import host
from ...tav_core.out_of_memory import OutOfMemoryError, naming_input


@contextmanager
def memory_explained(name: str, remedy: str) -> Iterator[None]:
    """For a node's ``execute``: ``name``, of the input that is too large; ``remedy``, a sentence on what to do.

    The host itself puts models aside for errors of the accelerator's allocator, which a node's own words hide from it.
    """
    try:
        with naming_input(name, remedy):
            yield
    except OutOfMemoryError:
        host.put_models_aside()
        raise
