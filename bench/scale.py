"""How steps grow with frames and with size, as curves."""

from __future__ import annotations

import argparse
from typing import Any

import steps
from curves import Curve, plot

_COMMANDS = ("tune-step", "invert-step", "sample-step")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Sweeps frames at the smallest size, then sizes at the fewest frames; writes the picture.

    A point is the median of its timed steps over the frames: flat curves mean that a frame costs the same in a
    long clip as in a short one.
    """
    rows: list[dict[str, Any]] = []
    for command in _COMMANDS:
        shapes = [(frames, min(arguments.sizes)) for frames in arguments.frames]
        shapes += [(min(arguments.frames), size) for size in arguments.sizes[1:]]
        for frames, size in shapes:
            step = argparse.Namespace(
                **{
                    **vars(arguments),
                    "command": command,
                    "frames": frames,
                    "height": size,
                    "width": size,
                    "train_scope": "all",
                    "plan": "auto",
                    "budget": None,
                }
            )
            rows.append(steps.run(step))
            print(
                f"{command:>12} {frames:>4} frames of {size}x{size}: {rows[-1]['s_per_frame']:.3f} s a frame",
                flush=True,
            )
    plot(
        arguments.picture,
        [
            (
                f"seconds a frame over frames, {min(arguments.sizes)} px square",
                [_curve(command, "frames", _where(rows, command, size=min(arguments.sizes))) for command in _COMMANDS],
            ),
            (
                f"seconds a frame over size, {min(arguments.frames)} frames",
                [
                    _curve(command, "pixels", _where(rows, command, frames=min(arguments.frames)))
                    for command in _COMMANDS
                ],
            ),
        ],
    )
    print(f"Curves: {arguments.picture}")
    return {"rows": rows}


def _where(
    rows: list[dict[str, Any]], command: str, size: int | None = None, frames: int | None = None
) -> list[dict[str, Any]]:
    return [
        row
        for row in rows
        if row["command"] == command
        and (size is None or row["size"] == f"{size}x{size}")
        and (frames is None or row["frames"] == frames)
    ]


def _curve(command: str, axis: str, rows: list[dict[str, Any]]) -> Curve:
    xs = [float(row["frames"] if axis == "frames" else row["size"].partition("x")[0]) for row in rows]
    return Curve(command, xs, [row["s_per_frame"] for row in rows])
