"""Recognise failed allocations of every library, and report them by the name of an input."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# As PyTorch, CUDA and HIP, Metal ("Invalid buffer size: 12.00 GiB"), DirectML ("There is not enough GPU video memory
# available!") and Intel's Level Zero ("UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY") write it. cuDNN without memory for the
# workspace of any algorithm is "unable to find an engine", and cuBLAS fails in cublasCreate.
_SIGNS = (
    "out of memory",
    "outofmemory",
    "allocate memory",
    "allocate tensor",
    "unable to allocate",
    "alloc_failed",
    "allocation_failed",
    "unable to find an engine",
    "cublascreate",
    "bad_alloc",
    "invalid buffer size",
    "not enough gpu video memory",
    "out_of_device_memory",
    "out_of_host_memory",
    "out_of_resources",
)


class OutOfMemoryError(RuntimeError):
    """An input that is too large, by its name, with what to do about it."""


def mentions_oom(text: str) -> bool:
    """Say whether the text of an error, or a program's last output, reports a failed allocation."""
    return any(sign in text.lower() for sign in _SIGNS)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error is a failed allocation.

    PyTorch has a class of error for accelerators alone. On the CPU it raises RuntimeError ("DefaultCPUAllocator:
    can't allocate memory"), so do cuBLAS and Apple's backend; NumPy and Python raise MemoryError, the system ENOMEM.
    """
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError) and not isinstance(error, torch.cuda.OutOfMemoryError):  # of any device
        return isinstance(error, OutOfMemoryError) or mentions_oom(str(error))
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))


@contextmanager
def naming_input(name: str, remedy: str) -> Iterator[None]:
    """Turn an allocation that fails inside into an OutOfMemoryError with an input's name and a remedy."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise OutOfMemoryError(f"{name}: out of memory. {remedy} ({reason})") from error
