"""Keep converted weights, for a model that stores its weights in another dtype than it computes in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import host


class CastWeightCache:
    """Lends layers' weights like ``host.lent``, and keeps the converted ones while ``keep`` is set.

    Converting them in every step takes about a tenth of its time; keeping them takes memory. Weights that the host
    keeps elsewhere (offloaded) are not kept here either.
    """

    def __init__(self, unet: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self.keep = False
        self._unet, self._device, self._dtype = unet, device, dtype
        self._kept: dict[torch.nn.Module, host.WeightAndBias] = {}

    def _is_converted(self, layer: torch.nn.Module) -> bool:
        stored = host.resident_dtype(layer, self._device)
        return stored is not None and stored != self._dtype

    @property
    def bytes(self) -> int:
        """Return the bytes that all converted weights take, kept or not."""
        layers = ((m, host.weight_shape(m)) for m in self._unet.modules())
        return sum(math.prod(shape) * self._dtype.itemsize for m, shape in layers if shape and self._is_converted(m))

    @contextmanager
    def lent(self, layer: torch.nn.Module, x: Tensor) -> Iterator[host.WeightAndBias]:
        """Lend weight and bias of a layer for use with x; see ``host.lent``."""
        if layer in self._kept:
            yield self._kept[layer]
            return
        with host.lent(layer, x) as (weight, bias):
            if self.keep and x.dtype == self._dtype and self._is_converted(layer):
                # A clone, since the host may lend its own buffer, and fill it with something else afterwards.
                weight, bias = weight.clone(), None if bias is None else bias.clone()
                self._kept[layer] = weight, bias
            yield weight, bias

    def drop(self) -> None:
        """Give up what is kept, and keep nothing any longer."""
        self.keep = False
        self._kept.clear()
