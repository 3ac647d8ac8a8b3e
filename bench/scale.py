"""Plot how steps grow with the number of frames and with the size."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
from steps import Step, add_model_arguments, measure

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import LogLocator  # noqa: E402

KINDS = ("tune-step", "invert-step", "sample-step")
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "scale.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the shapes to sweep."""
    add_model_arguments(parser)
    parser.add_argument("--frames", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256], help="pixels, square")
    parser.add_argument("--picture", type=Path, default=PICTURE)


def run(frames: list[int], sizes: list[int], picture: Path, **model: Any) -> dict[str, Any]:
    """Sweep frames at the smallest size and sizes at the fewest frames, and write the picture.

    A point is the median step time divided by the frames. A flat curve means that a frame costs the same in a long
    clip as in a short one.
    """
    rows = []
    for kind in KINDS:
        for count, size in dict.fromkeys([(n, min(sizes)) for n in frames] + [(min(frames), s) for s in sizes]):
            rows.append(measure(Step(kind, frames=count, height=size, width=size, **model)))
            print(f"{kind:>12} {count:>4} frames of {size}x{size}: {rows[-1]['s_per_frame']:.3f} s a frame", flush=True)
    figure, (by_frames, by_size) = plt.subplots(1, 2, figsize=(12.8, 4.2), layout="constrained")
    for kind in KINDS:
        mine = [row for row in rows if row["kind"] == kind]
        _curve(by_frames, kind, "frames", [row for row in mine if row["height"] == min(sizes)])
        _curve(by_size, kind, "height", [row for row in mine if row["frames"] == min(frames)])
    by_frames.set(title=f"{min(sizes)} x {min(sizes)} pixels", xlabel="frames", ylabel="seconds per frame")
    by_size.set(title=f"{min(frames)} frames", xlabel="pixels, square", ylabel="seconds per frame")
    for axes in (by_frames, by_size):
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        # At least one decade, so that flat curves look flat.
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, high / 10), high)
        axes.grid(axis="y", alpha=0.3)
        axes.legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=100)
    print(f"Curves: {picture}")
    return {"rows": rows}


def _curve(axes: Any, name: str, axis: str, rows: list[dict[str, Any]]) -> None:
    points = sorted((row[axis], row["s_per_frame"]) for row in rows)
    axes.loglog(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xticks([x for x, _ in points], [str(x) for x, _ in points])
