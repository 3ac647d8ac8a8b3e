"""Plan what a tuning step keeps of its forward pass and what it computes again, from a memory budget.

A unit is a residual block or a transformer block. It runs at one of three levels:

- keep: it holds on to everything that its backward pass needs;
- selective: a transformer block holds on to its input and to the results of its attentions, by far the dearest to
  compute again; norms, projections and the feed-forward run a second time in the backward pass;
- recompute: it holds on to its input alone, and all of it runs a second time.

Pure arithmetic on costs that ``memory_probe`` measures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

Level = Literal["keep", "selective", "recompute"]
LEVELS: tuple[Level, ...] = get_args(Level)

# A running unit allocates this share of what it saves beside it: outputs in flight, and their gradients on the way
# back. Fitted to measured peaks (docs/performance.md).
_IN_FLIGHT = 0.5


@dataclass(frozen=True)
class UnitCost:
    """Bytes of one unit.

    ``saved``: for its backward pass, when it is kept. ``input``: its input alone. ``attended``: the results of its
    attentions. ``gradients``: the gradients that its backward pass leaves behind.
    """

    saved: float
    input: float
    attended: float = 0.0
    gradients: float = 0.0

    def held(self, level: Level) -> float:
        """Return the bytes held from the forward to the backward pass."""
        if level == "keep":
            return self.saved
        return self.input + (self.attended if level == "selective" else 0.0)

    def running(self, level: Level) -> float:
        """Return the bytes that the backward pass takes for a moment beside the held ones."""
        again = 0.0 if level == "keep" else max(self.saved - self.held(level), 0.0)
        return again + _IN_FLIGHT * self.saved


@dataclass(frozen=True)
class Plan:
    """The level of each unit, in the order they run, and the predicted peak in bytes beside weights and moments.

    ``gradients``: the share of those bytes that are gradients. ``offload``: whether the optimiser's moments have to
    leave the device. ``budget``: the bytes that the plan was made for.
    """

    levels: Mapping[str, Level]
    bytes: float
    gradients: float
    offload: bool = False
    budget: float = math.inf

    @staticmethod
    def all_at(costs: Mapping[str, UnitCost], level: Level) -> Plan:
        """Plan every unit at one level; a residual block, which has no attention, is kept at the selective one."""
        return _plan(
            costs,
            {path: "keep" if level == "selective" and not cost.attended else level for path, cost in costs.items()},
        )

    def count(self, level: Level) -> int:
        """Count the units that run at a level."""
        return sum(each == level for each in self.levels.values())

    @property
    def smallest(self) -> bool:
        """Say whether no unit has anything left to give up."""
        return self.count("recompute") == len(self.levels)

    @property
    def fits(self) -> bool:
        """Say whether the predicted peak is within the budget."""
        return self.bytes <= self.budget

    def __str__(self) -> str:
        counted = ", ".join(f"{level} {self.count(level)}" for level in LEVELS)
        moments = ", the optimiser's moments in RAM" if self.offload else ""
        return f"blocks: {counted}; {self.bytes / 2**30:.2f} GiB for activations and gradients{moments}"


def peak(costs: Mapping[str, UnitCost], levels: Mapping[str, Level]) -> float:
    """Return the bytes at the worst moment of a step: some unit's backward pass.

    By then the units behind it have given up what they held and left their gradients.
    """
    # Tensors between the units and behind the last of them: at most about the largest input of one.
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


def make_plan(costs: Mapping[str, UnitCost], budget: float, moments: float = 0.0) -> Plan:
    """Plan units so that they fit into ``budget`` bytes, giving up first what is cheapest to compute again.

    ``moments``: bytes of the optimiser's moments, which share the budget. They leave the device where not even the
    smallest plan fits beside them.

    First the transformer blocks become selective: that costs the fewest operations per byte (some hundred; residual
    blocks some thousand). Then blocks are recomputed. Within each of the two the largest go first: fewer units to run
    again for the same memory.
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
