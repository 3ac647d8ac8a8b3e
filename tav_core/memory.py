"""What a tuning step keeps of its forward pass and what it computes again, from a memory budget.

A unit is a residual block or a transformer block. Kept, it holds on to all that its backward pass needs;
recomputed, only to its input, and runs forward a second time in the backward pass. What a unit would keep is
measured, not guessed: on two small probes, from which it grows linearly with frames and pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .inflate import Forward, transformer_blocks

# What a running unit allocates beside what it saves, in shares of the latter: outputs in flight, and their
# gradients on the way back.
_IN_FLIGHT = 0.5


@dataclass(frozen=True)
class UnitCost:
    """Bytes a unit saves for its backward pass when kept, and of its input alone."""

    saved: float
    input: float


@dataclass(frozen=True)
class Plan:
    """Which units are recomputed, and what that is predicted to take, in bytes beside weights and optimiser."""

    recomputed: frozenset[str]
    kept: frozenset[str]
    bytes: float

    def __str__(self) -> str:
        total = len(self.recomputed) + len(self.kept)
        return f"{len(self.kept)} of {total} blocks kept, {self.bytes / 2**30:.2f} GiB for activations"


def units(unet: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Residual blocks and transformer blocks by path, in the order they run."""
    blocks = transformer_blocks(unet)
    return {
        path: module
        for path, module in unet.named_modules()
        if path in blocks or (hasattr(module, "in_layers") and hasattr(module, "out_layers"))
    }


def total_bytes(costs: Mapping[str, UnitCost], recomputed: frozenset[str]) -> float:
    """Peak of activations: what is kept, the inputs of the rest, and the largest unit while it runs."""
    held = sum(cost.input if path in recomputed else cost.saved for path, cost in costs.items())
    largest = max((cost.saved for cost in costs.values()), default=0.0)
    again = max((costs[path].saved for path in recomputed), default=0.0)
    return held + again + _IN_FLIGHT * largest


def make_plan(costs: Mapping[str, UnitCost], budget: float) -> Plan:
    """Keep as much as fits into ``budget`` bytes; the last to be given up is what saves least.

    The units' recomputation costs about what they save (both grow with channels x positions), so the largest
    go first: fewer units to run again for the same memory.
    """
    by_size = sorted(costs, key=lambda path: costs[path].saved - costs[path].input, reverse=True)
    recomputed: frozenset[str] = frozenset()
    for path in by_size:
        if total_bytes(costs, recomputed) <= budget:
            break
        recomputed |= {path}
    return Plan(recomputed, frozenset(costs) - recomputed, total_bytes(costs, recomputed))


def recomputing_forwards(unet: torch.nn.Module, plan: Plan) -> list[tuple[torch.nn.Module, Forward]]:
    """Forwards of the units that ``plan`` recomputes, around those the units have now."""
    return [
        (module, partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False))
        for path, module in units(unet).items()
        if path in plan.recomputed
    ]


@contextmanager
def _counting(unet: torch.nn.Module) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    """Count what each unit saves (each storage once, where it is first saved) and the size of its input."""
    saved: dict[str, int] = {}
    inputs: dict[str, int] = {}
    running: list[str] = []
    # Tensors are held on to while counting, so that no two of them share an address one after the other.
    seen: dict[int, Tensor] = {}

    def enter(path: str, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        running.append(path)
        inputs[path] = args[0].nbytes
        saved.setdefault(path, 0)

    def leave(path: str, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        running.pop()

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if running and address not in seen:
            seen[address] = tensor
            saved[running[-1]] += tensor.untyped_storage().nbytes()
        return tensor

    handles = []
    for path, module in units(unet).items():
        handles.append(module.register_forward_pre_hook(partial(enter, path)))
        handles.append(module.register_forward_hook(partial(leave, path)))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield saved, inputs
    finally:
        for handle in handles:
            handle.remove()


def measure(
    unet: torch.nn.Module, run: Callable[[int, int, int], Tensor], frames: int, height: int, width: int
) -> dict[str, UnitCost]:
    """What each unit would keep for a clip of ``frames`` x ``height`` x ``width`` latent pixels.

    ``run(frames, height, width)`` evaluates the UNet on a clip of that size, as prepared for training. Two
    small probes tell what grows with the clip from what does not (weights that autograd saves).
    """
    side = 8  # the least that survives the UNet's halvings
    probes = []
    for count in (2, 3):
        with _counting(unet) as (saved, inputs):
            run(count, side, side)
        probes.append((saved, inputs))
    factor = frames * height * width / side**2
    (two, _), (three, inputs) = probes
    return {
        path: UnitCost(saved=(three[path] - two[path]) * factor, input=inputs[path] / 3 * factor)
        for path in two
        if three[path] > two[path]
    }
