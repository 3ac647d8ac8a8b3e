"""Activation checkpointing of a UNet's blocks, as a plan says."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..inflate import Swap
from ..unet import transformer_blocks
from .memory_plan import Plan

try:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
except ImportError:  # PyTorch 2.4: blocks are kept or recomputed as a whole
    CheckpointPolicy = None  # type: ignore[assignment,misc]

ATTENTION_KERNELS = {
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
    if hasattr(torch.ops.aten, name)
}


def checkpointable_blocks(unet: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return residual blocks and transformer blocks by path, in the order they run."""
    blocks = transformer_blocks(unet)
    return {
        path: module
        for path, module in unet.named_modules()
        if path in blocks or (hasattr(module, "in_layers") and hasattr(module, "out_layers"))
    }


def _keep_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in ATTENTION_KERNELS else CheckpointPolicy.PREFER_RECOMPUTE


def planned_forwards(unet: torch.nn.Module, plan: Plan) -> list[Swap]:
    """Return forwards for the units that ``plan`` does not keep, around the forwards they have now."""
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    ways = {"recompute": again}
    if CheckpointPolicy is not None:
        ways["selective"] = partial(again, context_fn=partial(create_selective_checkpoint_contexts, _keep_attention))
    return [
        (module, partial(ways[plan.levels[path]], module.forward))
        for path, module in checkpointable_blocks(unet).items()
        if plan.levels.get(path, "keep") != "keep"
    ]


def can_keep_attention() -> bool:
    """Say whether this PyTorch can keep the results of attention alone."""
    return CheckpointPolicy is not None
