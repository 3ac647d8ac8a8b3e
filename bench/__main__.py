"""Times one kind of step at any UNet size, on random weights: `python bench tune-step --help`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import engine  # noqa: E402


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python bench", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    for name in ("tune-step", "invert-step", "sample-step"):
        command = commands.add_parser(name)
        command.add_argument("--unet", default="sd15", choices=["sd15", "sd21", "sdxl", "tiny"])
        command.add_argument("--frames", type=int, default=8)
        command.add_argument("--height", type=int, default=64, help="pixels")
        command.add_argument("--width", type=int, default=64, help="pixels")
        command.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
        command.add_argument("--threads", type=int, default=2)
        command.add_argument("--steps", type=int, default=7, help="timed steps")
        command.add_argument("--warmup", type=int, default=2, help="steps before those")
        command.add_argument("--json", type=Path, help="write the figures to this file")
        command.add_argument("--comfyui", type=Path, help="a ComfyUI checkout")
        if name == "tune-step":
            command.add_argument("--train-scope", default="all", choices=["all", "middle-up"])
            command.add_argument("--plan", default="auto", choices=["auto", "keep", "recompute"])
    return top


def main() -> None:
    """Run one benchmark, print its figures, write them as JSON if asked."""
    arguments = parser().parse_args()
    host = engine.load_engine(engine.find_comfyui(arguments.comfyui))
    engine.load_pack()
    import steps

    figures = {"engine": host, **steps.run(arguments)}
    for key, value in figures.items():
        print(f"{key:>18}  {value:.4g}" if isinstance(value, float) and math.isfinite(value) else f"{key:>18}  {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
