"""Copies between RAM and a device that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(value: Tensor, like: Tensor) -> Tensor:
    """A copy of ``value`` in the dtype and on the device of ``like``.

    To a CUDA device it goes through memory that the device reads by itself: an ordinary copy would wait for all work
    before it.
    """
    if like.is_cuda and not value.is_cuda:
        return value.to(like.dtype).pin_memory().to(like.device, non_blocking=True)
    return value.to(like, copy=True)


class Later:
    """What a tensor holds by now, to be read later without waiting for what is done to it in between."""

    def __init__(self, value: Tensor) -> None:
        self._ready: torch.cuda.Event | None = None
        if value.is_cuda:
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(value.device))
        else:
            self._value = value.detach().cpu()

    def read(self) -> Tensor:
        """The values, on the CPU; waits only if they are not there yet."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._value
