"""Read what a MODEL's weights are stored as: for fingerprints, and to tell which are quantised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .model import ModelPatcher, unet_of

UNET_PREFIX = "diffusion_model."


def stored_tensors(model: ModelPatcher) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor that decides the UNet's weights, by name: first as stored, then the patches (LoRAs).

    The patched weights themselves differ from one loading to the next: hosts round them at random where they are
    stored in 8 bits, and not at all where they are applied as a layer is used.
    """
    for path, module in unet_of(model).named_modules():
        own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        for name, value in own.items():
            key = f"{UNET_PREFIX}{path}.{name}"
            backup = model.backup.get(key)
            yield from _tensors(key, value if backup is None else getattr(backup, "weight", backup))
            if (dtype := _model_dtype(module, name, value)) != value.dtype:
                yield from _tensors(f"dtype of {key}", str(dtype))
    for key, patches in sorted(model.patches.items()):
        if key.startswith(UNET_PREFIX):
            yield from _tensors(f"patches of {key}", patches)


def weight_shape(layer: Any) -> tuple[int, ...] | None:
    """Return the shape of a linear layer's or 2-D convolution's weight as it is used, None for other modules.

    Quantised layers need not be subclasses of torch's, nor their weights have this shape.
    """
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return layer.out_features, layer.in_features
    kernel = getattr(layer, "kernel_size", None)
    if hasattr(layer, "in_channels") and isinstance(kernel, tuple) and len(kernel) == 2:
        return layer.out_channels, layer.in_channels // layer.groups, *kernel
    return None


def is_coarse(layer: Any) -> bool:
    """Say whether a layer's weight is stored in 8 bits or fewer: a small change of it would be rounded away.

    With dynamic VRAM the file's weight stays in RAM. Its copy on the device, with all patches, has the model's dtype.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        return False
    dtypes = weight.dtype, _model_dtype(layer, "weight", weight)
    return is_traceable_wrapper_subclass(weight) or min(dtype.itemsize for dtype in dtypes) < 2


def _model_dtype(layer: Any, name: str, value: Tensor) -> torch.dtype:
    """Return the dtype in which the host uses a parameter or buffer of the model."""
    dtype = getattr(value, "_model_dtype", None) or getattr(layer, f"{name}_comfy_model_dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else value.dtype


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors, numbers and texts in a value of whatever kind the host keeps patches in."""
    if isinstance(value, Tensor):
        if is_traceable_wrapper_subclass(value):
            for part in value.__tensor_flatten__()[0]:
                yield from _tensors(f"{name}.{part}", getattr(value, part))
        elif not value.is_meta:
            yield name, value.detach().as_subclass(Tensor)
    elif isinstance(value, bool | int | float):
        yield name, torch.tensor(value, dtype=torch.float64)
    elif isinstance(value, str):
        yield name, torch.tensor(list(value.encode()), dtype=torch.uint8)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _tensors(f"{name}.{key}", value[key])
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _tensors(f"{name}.{number}", part)
    elif hasattr(value, "weights"):
        yield from _tensors(f"{name}.{type(value).__name__}", value.weights)
