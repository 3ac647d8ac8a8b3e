"""Read how much memory a container's limit leaves, which the system's own figures of free memory ignore."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

# Limit, use, and the name in memory.stat of cached file pages, which the kernel gives up under pressure.
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def memory_left(membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the bytes that this process may still allocate under its control groups' limits; infinity for no limit.

    ``membership``: the process's groups, a line ``number:controllers:path`` each. ``root``: where the file systems of
    version 2, or version 1's ``memory``, are mounted.
    """
    return min((_left(folder, names) for folder, names in _groups(membership, root)), default=math.inf)


def _groups(membership: Path, root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Yield the folder of each group that the process is in, up to the root; a container may see the root alone."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = root, _V2
        elif "memory" in controllers.split(","):
            top, names = root / "memory", _V1
        else:
            continue
        inside = Path(path.lstrip("/"))
        yield from ((top / each, names) for each in (inside, *inside.parents))


def _left(folder: Path, names: tuple[str, str, str]) -> float:
    limit, used, reclaimable = names
    try:
        largest = (folder / limit).read_text().strip()
        if largest == "max":
            return math.inf
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        taken = int((folder / used).read_text()) - int(stat.get(reclaimable, 0))
        return max(float(int(largest) - taken), 0.0)
    except (OSError, ValueError):
        return math.inf
