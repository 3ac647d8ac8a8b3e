"""Answer an allocation that failed: give up memory, the cheapest first, and try again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from .. import host
from ..out_of_memory import OutOfMemoryError, is_out_of_memory

_Result = TypeVar("_Result")

# Gives up some memory and says what, for the log; "" where it has nothing to give.
Relief = Callable[[], str]


def retry_on_oom(work: Callable[[], _Result], reliefs: Sequence[Relief], during: str) -> _Result:
    """Return what ``work`` returns; while it runs out of memory, apply the first relief that has something to give.

    ``during``: names the work in the log, e.g. "in step 3". Raises the allocation's own error when no relief is left.
    An OutOfMemoryError, which names an input, is final.
    """
    while True:
        try:
            return work()
        except Exception as error:
            if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
                raise
            given_up = next((said for relief in reliefs if (said := relief())), "")
            if not given_up:
                raise
        # Outside the handler, where the error no longer holds on to the failed work's tensors.
        host.release_cached_memory()
        logging.warning("Tune-A-Video: out of memory %s; repeated with %s", during, given_up)
