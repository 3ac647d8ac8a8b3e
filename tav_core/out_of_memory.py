"""Allocations that failed, whoever failed them: to be known as such, and to be told of in words."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_SIGNS = ("out of memory", "allocate memory", "unable to allocate", "alloc_failed", "bad_alloc")


class OutOfMemoryError(RuntimeError):
    """What is too large, by the name of the input, and what to do about it."""


def told_of(text: str) -> bool:
    """Whether a program's last words, or an error's, are of memory that ran out."""
    return any(sign in text.lower() for sign in _SIGNS)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed.

    PyTorch has a class of error for accelerators alone. On the CPU it raises RuntimeError ("DefaultCPUAllocator:
    can't allocate memory"), so do cuBLAS and Apple's backend; NumPy and Python raise MemoryError, the system ENOMEM.
    """
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError) and not isinstance(error, torch.cuda.OutOfMemoryError):  # of any device
        return isinstance(error, OutOfMemoryError) or told_of(str(error))
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))


@contextmanager
def explained(name: str, remedy: str) -> Iterator[None]:
    """Within: a failed allocation becomes an OutOfMemoryError that names an input and says what to do."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise OutOfMemoryError(f"{name}: out of memory. {remedy} ({reason})") from error
