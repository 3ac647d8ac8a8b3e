"""What a tuning step keeps of its forward pass and what it computes again, from a memory budget.

A unit is a residual block or a transformer block. It runs at one of three levels:

- keep: it holds on to all that its backward pass needs;
- selective: of a transformer block, to its input and what its attentions gave, by far the dearest to compute again;
  norms, projections and the feed-forward run a second time in the backward pass;
- recompute: to its input alone; all of it runs a second time.

What a unit would keep is measured, not guessed: on three small probes, from which it grows linearly with frames
and pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ..inflate import Forward, transformer_blocks

try:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
except ImportError:  # PyTorch 2.4: units are kept or recomputed as a whole
    CheckpointPolicy = None  # type: ignore[assignment,misc]

Level = Literal["keep", "selective", "recompute"]
LEVELS: tuple[Level, ...] = get_args(Level)

# What a running unit allocates beside what it saves, in shares of the latter: outputs in flight, and their
# gradients on the way back. Fitted to measured peaks (docs/performance.md).
_IN_FLIGHT = 0.5

_ATTENTION = {
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
    if hasattr(torch.ops.aten, name)
}


@dataclass(frozen=True)
class UnitCost:
    """Bytes that a unit saves for its backward pass when kept, of its input alone, and of its attentions' results.

    ``gradients``: of the parameters in it that learn, which its backward pass leaves behind.
    """

    saved: float
    input: float
    attended: float = 0.0
    gradients: float = 0.0

    def held(self, level: Level) -> float:
        """Bytes held from its forward to its backward pass."""
        if level == "keep":
            return self.saved
        return self.input + (self.attended if level == "selective" else 0.0)

    def running(self, level: Level) -> float:
        """Bytes that its backward pass takes for a moment beside those."""
        again = 0.0 if level == "keep" else max(self.saved - self.held(level), 0.0)
        return again + _IN_FLIGHT * self.saved


@dataclass(frozen=True)
class Plan:
    """The level of each unit, in the order they run, and the peak that is predicted: bytes beside weights and moments.

    ``gradients``: how many of them are gradients of what learns. ``offload``: whether the optimiser's moments have to
    leave the device. ``budget``: bytes that it was made for.
    """

    levels: Mapping[str, Level]
    bytes: float
    gradients: float
    offload: bool = False
    budget: float = math.inf

    def count(self, level: Level) -> int:
        """How many units run at a level."""
        return sum(each == level for each in self.levels.values())

    @property
    def smallest(self) -> bool:
        """Whether no unit has anything left to give up."""
        return self.count("recompute") == len(self.levels)

    @property
    def fits(self) -> bool:
        """Whether the predicted peak is within the budget."""
        return self.bytes <= self.budget

    def __str__(self) -> str:
        counted = ", ".join(f"{level} {self.count(level)}" for level in LEVELS)
        moments = ", the optimiser's moments in RAM" if self.offload else ""
        return f"blocks: {counted}; {self.bytes / 2**30:.2f} GiB for activations and gradients{moments}"


def units(unet: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Residual blocks and transformer blocks by path, in the order they run."""
    blocks = transformer_blocks(unet)
    return {
        path: module
        for path, module in unet.named_modules()
        if path in blocks or (hasattr(module, "in_layers") and hasattr(module, "out_layers"))
    }


def peak(costs: Mapping[str, UnitCost], levels: Mapping[str, Level]) -> float:
    """Bytes at the worst moment of a step: some unit's backward pass.

    By then the units behind it have given up what they held and left their gradients.
    """
    # What lies between the units and behind the last of them: at most about the largest that goes into one.
    held = max((cost.input for cost in costs.values()), default=0.0)
    gradients = sum(cost.gradients for cost in costs.values())
    worst = held + gradients
    for path, cost in costs.items():
        held += cost.held(levels[path])
        worst = max(worst, held + cost.running(levels[path]) + gradients)
        gradients -= cost.gradients
    return worst


def _plan(costs: Mapping[str, UnitCost], levels: Mapping[str, Level]) -> Plan:
    return Plan(levels, peak(costs, levels), sum(cost.gradients for cost in costs.values()))


def uniform_plan(costs: Mapping[str, UnitCost], level: Level) -> Plan:
    """Every unit at one level; a residual block, which has no attention, is kept at the selective one."""
    levels: dict[str, Level] = {
        path: "keep" if level == "selective" and not cost.attended else level for path, cost in costs.items()
    }
    return _plan(costs, levels)


def make_plan(costs: Mapping[str, UnitCost], budget: float, moments: float = 0.0) -> Plan:
    """Give up as little as fits into ``budget`` bytes, the cheapest to compute again first.

    ``moments``: bytes of the optimiser's, for which the budget is, too. They leave the device where not even the least
    that blocks can keep fits beside them.

    First the transformer blocks become selective: what they give up then costs the fewest operations per byte
    (some hundred; residual blocks some thousand). Then blocks are recomputed. Within each of the two the largest
    go first: fewer units to run again for the same memory.
    """

    def largest_first(paths: list[str]) -> list[str]:
        return sorted(paths, key=lambda path: costs[path].saved, reverse=True)

    levels: dict[str, Level] = dict.fromkeys(costs, "keep")
    attending = [path for path, cost in costs.items() if cost.attended and cost.held("selective") < cost.saved]
    steps: list[tuple[str, Level]] = [(path, "selective") for path in largest_first(attending)]
    steps += [(path, "recompute") for path in largest_first(list(costs))]
    for path, level in steps:
        if peak(costs, levels) <= budget - moments:
            break
        levels[path] = level
    plan = replace(_plan(costs, levels), budget=budget - moments)
    if moments and not plan.fits:
        return replace(make_plan(costs, budget), offload=True)
    return plan


def _keep_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


def planned_forwards(unet: torch.nn.Module, plan: Plan) -> list[tuple[torch.nn.Module, Forward]]:
    """Forwards of the units that ``plan`` does not keep, around those the units have now."""
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    ways = {"recompute": again}
    if CheckpointPolicy is not None:
        ways["selective"] = partial(again, context_fn=partial(create_selective_checkpoint_contexts, _keep_attention))
    return [
        (module, partial(ways[plan.levels[path]], module.forward))
        for path, module in units(unet).items()
        if plan.levels.get(path, "keep") != "keep"
    ]


class _AttentionResults(TorchDispatchMode):
    """Tells of the size of whatever an attention kernel returns."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        super().__init__()
        self.tell = tell

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _ATTENTION:
            self.tell(sum(part.nbytes for part in out if isinstance(part, Tensor)))
        return out


@dataclass
class _Counted:
    saved: int = 0
    input: int = 0
    attended: int = 0


@contextmanager
def _counting(unet: torch.nn.Module) -> Iterator[dict[str, _Counted]]:
    """Count what each unit saves (each storage once, where it is first saved), its input, its attentions' results."""
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
        # Without results that could be kept alone, nothing is planned to be.
        if running and CheckpointPolicy is not None:
            found[running[-1]].attended += size

    handles = []
    for path, module in units(unet).items():
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
    """What each unit would keep for a clip of ``frames`` x ``height`` x ``width`` latent pixels.

    ``run(frames, height, width)`` evaluates the UNet on a clip of that size, as prepared for training. Three
    small probes tell what grows with the clip's pixels, what with its frames alone (text that is seen by each), and
    what with neither (converted weights that autograd saves). ``gradients``: their bytes by the path of a
    transformer block.
    """
    side = 8  # the least that survives the UNet's halvings
    probes = []
    for shape in ((2, side, side), (3, side, side), (2, side, 2 * side)):
        with _counting(unet) as found:
            run(*shape)
        probes.append(found)
    factor = frames * height * width / side**2

    def grown(probed: Iterable[int]) -> float:
        """Of the clip, from what was counted in the three."""
        small, longer, wider = probed
        by_area = (wider - small) / 2  # a frame's, of the probes' area
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
    """The most bytes that were allocated on a CUDA device inside, beside what was before: one number, none elsewhere.

    Asks PyTorch's allocator, which knows without waiting for the device.
    """
    found: list[float] = []
    if device.type != "cuda":
        yield found
        return
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield found
    found.append(float(torch.cuda.max_memory_allocated(device) - before))
