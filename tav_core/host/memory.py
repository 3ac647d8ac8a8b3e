"""Ask the host for memory on a device, and have it make room."""

from __future__ import annotations

import comfy.model_management
import torch

from . import cgroup
from .model import ModelPatcher


def free_memory(device: torch.device) -> float:
    """Return the bytes that can still be allocated on a device, within a container's limit where it is RAM."""
    free = float(comfy.model_management.get_free_memory(device))
    return min(free, cgroup.memory_left()) if is_ram(device) else free


def is_ram(device: torch.device) -> bool:
    """Say whether a device's memory is the system's, where the kernel kills a process that takes too much."""
    if device.type == "cuda":
        return bool(getattr(torch.cuda.get_device_properties(device), "is_integrated", False))
    return device.type in ("cpu", "mps")


def computes_bfloat16(device: torch.device) -> bool:
    """Say whether the host computes in bfloat16 on a device."""
    return bool(comfy.model_management.should_use_bf16(device))


def offload_weights(model: ModelPatcher, size: float) -> float:
    """Have the host move about ``size`` bytes of a loaded MODEL's weights off its device; return how many went.

    The layers then fetch them one by one, as they do where the host loads a model in part.
    """
    if model.load_device == model.offload_device:
        return 0.0
    return float(model.partially_unload(model.offload_device, int(size)) or 0)


def weights_on_device(model: ModelPatcher) -> float:
    """Return the bytes of a MODEL's weights that are on its device."""
    return float(model.loaded_size())


def evictable_memory(model: ModelPatcher) -> float:
    """Return the bytes of weights that an allocation on a MODEL's device evicts, on hosts with dynamic VRAM.

    The model's own weights do not count: every step needs them.
    """
    if not hasattr(model, "get_free_memory"):
        return 0.0
    evictable = model.get_free_memory(model.load_device) - free_memory(model.load_device)
    return max(0.0, evictable - (model.loaded_size() if model.is_dynamic() else 0))


def release_cached_memory() -> None:
    """Give back the memory that PyTorch's allocator holds in reserve."""
    comfy.model_management.soft_empty_cache()


def put_models_aside() -> None:
    """Unload all models, as the host does when it runs out of memory; it loads them again when it needs them."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
