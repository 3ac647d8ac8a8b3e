"""Find the parts of a 2-D LDM UNet that the method changes: transformer blocks, pooled norms, query projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


class Tree:
    """The modules under a root as they are now, to be compared with them later: another pack may exchange one.

    It keeps the modules alive, but not the root.
    """

    def __init__(self, root: torch.nn.Module) -> None:
        self._children = [(m._modules, tuple(m._modules.values())) for m in root.modules() if m._modules]

    def is_unchanged(self) -> bool:
        """Say whether every module still has the children that it had."""
        return all(tuple(now.values()) == before for now, before in self._children)


@dataclass(frozen=True)
class Parts:
    """The parts of a UNet that the method changes, see ``transformer_blocks`` and ``pooled_norms``."""

    blocks: dict[str, Any]
    norms: dict[torch.nn.GroupNorm, torch.nn.Module | None]


def parts_of(unet: torch.nn.Module) -> Parts:
    """Find the parts of a UNet. It walks over all modules, which takes milliseconds: not for every evaluation."""
    return Parts(transformer_blocks(unet), pooled_norms(unet))


def transformer_blocks(unet: torch.nn.Module) -> dict[str, Any]:
    """Return the UNet's transformer blocks by LDM path; empty for anything that is not such a UNet."""
    return {
        path: module
        for path, module in unet.named_modules()
        if ".transformer_blocks." in path and hasattr(module, "attn1") and hasattr(module, "attn2")
    }


def pooled_norms(unet: torch.nn.Module) -> dict[torch.nn.GroupNorm, torch.nn.Module | None]:
    """Return the GroupNorms of residual blocks and of the output head; not those of the spatial transformers.

    Each comes with the activation that follows it directly, or None where something stands between the two (a
    block that modulates the norm's output by the timestep).
    """
    found: dict[torch.nn.GroupNorm, torch.nn.Module | None] = {}
    for path, module in unet.named_modules():
        for name in ("in_layers", "out_layers", "out"):
            layers = getattr(module, name, None)
            if (name == "out") != (path == "") or not isinstance(layers, torch.nn.Sequential):
                continue
            norm, activation = layers[0], layers[1]
            if not isinstance(norm, torch.nn.GroupNorm):
                continue
            modulated = name == "out_layers" and module.use_scale_shift_norm
            found[norm] = activation if isinstance(activation, torch.nn.SiLU) and not modulated else None
    return found


def query_shapes(unet: torch.nn.Module) -> dict[str, torch.Size]:
    """Return the shape of every query projection's weight by its path: the places a motion's deltas go to."""
    return {
        f"{path}.{name}.to_q.weight": torch.Size((attn.heads * attn.dim_head, attn.to_q.in_features))
        for path, block in transformer_blocks(unet).items()
        for name, attn in (("attn1", block.attn1), ("attn2", block.attn2))
    }
