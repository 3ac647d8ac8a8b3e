"""Copy between RAM and a device without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(value: Tensor, like: Tensor) -> Tensor:
    """Copy ``value`` to the dtype and device of ``like``.

    To a CUDA device the copy goes through pinned memory: an ordinary copy would wait for all work before it.
    """
    if like.is_cuda and not value.is_cuda:
        return value.to(like.dtype).pin_memory().to(like.device, non_blocking=True)
    return value.to(like, copy=True)


class AsyncCopy:
    """A copy of a tensor in RAM that is started now; ``read`` waits for it."""

    def __init__(self, value: Tensor) -> None:
        self._ready: torch.cuda.Event | None = None
        if value.is_cuda:
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(value.device))
        else:
            self._value = value.detach().clone().cpu()

    def read(self) -> Tensor:
        """Return the values, on the CPU, as they were when the copy was started."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._value
