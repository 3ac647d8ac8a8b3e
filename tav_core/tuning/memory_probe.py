"""Measure what each block of a UNet would keep for its backward pass, on three small probes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..cancel import raise_if_cancelled
from .memory_plan import UnitCost
from .recompute import ATTENTION_KERNELS, can_keep_attention, checkpointable_blocks


class _AttentionResults(TorchDispatchMode):
    """Report the bytes that each attention kernel returns."""

    def __init__(self, report: Callable[[int], None]) -> None:
        super().__init__()
        self.report = report

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in ATTENTION_KERNELS:
            self.report(sum(part.nbytes for part in out if isinstance(part, Tensor)))
        return out


@dataclass
class _Counted:
    saved: int = 0
    input: int = 0
    attended: int = 0


@contextmanager
def _counting(unet: torch.nn.Module) -> Iterator[dict[str, _Counted]]:
    """Count the bytes of what each unit saves (each storage once, where first saved), of its input and attentions."""
    found: dict[str, _Counted] = {}
    running: list[str] = []
    # Tensors are held on to while counting, so that no two of them share an address one after the other.
    seen: dict[int, Tensor] = {}

    def enter(path: str, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        running.append(path)
        found.setdefault(path, _Counted()).input = args[0].nbytes

    def leave(path: str, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        running.pop()

    def pack(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        address = tensor.untyped_storage().data_ptr()
        # Without its history: the graph would hold itself, where no garbage collector looks.
        alone = tensor.detach()
        # A parameter that is saved as it is takes no memory of its own.
        if running and address not in seen and not (base.is_leaf and base.requires_grad):
            seen[address] = alone
            found[running[-1]].saved += tensor.untyped_storage().nbytes()
        return alone

    def attended(size: int) -> None:
        # Where results cannot be kept alone, no plan may count on it.
        if running and can_keep_attention():
            found[running[-1]].attended += size

    handles = []
    for path, module in checkpointable_blocks(unet).items():
        handles.append(module.register_forward_pre_hook(partial(enter, path)))
        handles.append(module.register_forward_hook(partial(leave, path)))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _AttentionResults(attended):
            yield found
    finally:
        for handle in handles:
            handle.remove()


def measure(
    unet: torch.nn.Module,
    run: Callable[[int, int, int], Tensor],
    frames: int,
    height: int,
    width: int,
    gradients: Mapping[str, int],
) -> dict[str, UnitCost]:
    """Measure the cost of each unit for a clip of ``frames`` x ``height`` x ``width`` latent pixels.

    ``run(frames, height, width)`` evaluates the UNet on a clip of that size, ready for training. Three small probes
    tell the part that grows with the clip's pixels, the part that grows with its frames alone (text that each frame
    sees), and the part that grows with neither (converted weights that autograd saves). ``gradients``: their bytes
    by the path of a transformer block.
    """
    side = 8  # the smallest side that survives the UNet's halvings
    probes = []
    for shape in ((2, side, side), (3, side, side), (2, side, 2 * side)):
        raise_if_cancelled()
        with _counting(unet) as found:
            run(*shape)
        probes.append(found)
    factor = frames * height * width / side**2

    def grown(probed: Iterable[int]) -> float:
        """Extrapolate the three counts to the clip."""
        small, longer, wider = probed
        by_area = (wider - small) / 2  # per frame of the probes' area
        by_frame = longer - small - by_area
        return by_area * factor + by_frame * frames + small - 2 * (by_area + by_frame)

    small, _, wider = probes
    return {
        path: UnitCost(
            saved=grown(probe[path].saved for probe in probes),
            input=small[path].input / 2 * factor,
            attended=grown(probe[path].attended for probe in probes),
            gradients=gradients.get(path, 0),
        )
        for path in small
        if wider[path].saved > small[path].saved
    }


@contextmanager
def measured_peak(device: torch.device) -> Iterator[list[float]]:
    """Measure the largest number of bytes allocated on a CUDA device inside, beside those before.

    Yields a list that holds the one number afterwards; it stays empty on other devices. PyTorch's allocator answers
    without waiting for the device.
    """
    found: list[float] = []
    if device.type != "cuda":
        yield found
        return
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield found
    found.append(float(torch.cuda.max_memory_allocated(device) - before))
