"""Measures this project: single steps, how they scale, what each part of the method is worth, one edited video.

python bench tune-step | invert-step | sample-step    one kind of step at any UNet size, on random weights
python bench scale                                    steps over frames and sizes, with curves
python bench ablation                                 the paper's ablations on drawn clips
python bench peak                                     predicted against measured memory of a tuning step
python bench windows                                  long clips, whole and in context windows
python bench cards                                    what the planner would do on graphics cards
python bench ranks                                    what motions lose when they are saved at a rank
python bench evaluate                                 the figures of the EvaluateVideo node for two files
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import engine  # noqa: E402


def parser() -> argparse.ArgumentParser:
    """The command line."""
    lines = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="python bench", description=__doc__, formatter_class=lines)
    commands = top.add_subparsers(dest="command", required=True)
    for name in ("tune-step", "invert-step", "sample-step"):
        command = commands.add_parser(name, help="time one kind of step")
        _step_arguments(command)
        command.add_argument("--frames", type=int, default=8)
        command.add_argument("--height", type=int, default=64, help="pixels")
        command.add_argument("--width", type=int, default=64, help="pixels")
        if name == "tune-step":
            command.add_argument("--train-scope", default="all", choices=["all", "middle-up"])
            command.add_argument("--plan", default="auto", choices=["auto", "keep", "selective", "recompute"])
            command.add_argument("--budget", type=float, help="GiB, as the node's memory_budget")
    scale = commands.add_parser("scale", help="steps over frames and sizes, with curves")
    _step_arguments(scale)
    scale.add_argument("--frames", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    scale.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256], help="pixels, square")
    scale.add_argument("--picture", type=Path, default=ROOT / "docs" / "scale.png")
    peak = commands.add_parser("peak", help="the planner's prediction against the measured peak of a tuning step")
    peak.add_argument("--unet", nargs="+", default=["tiny", "sd15"], choices=["sd15", "sd21", "sdxl", "tiny"])
    peak.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16", "fp16"])
    peak.add_argument("--frames", type=int, nargs="+", default=[4, 8])
    peak.add_argument("--sizes", type=int, nargs="+", default=[64, 128], help="pixels, square")
    cards = commands.add_parser("cards", help="the planner's choices and predictions for graphics cards, on paper")
    cards.add_argument("--unet", default="sd15", choices=["sd15", "sd21", "sdxl", "tiny"])
    cards.add_argument("--frames", type=int, default=24)
    cards.add_argument("--size", type=int, default=512, help="pixels, square")
    cards.add_argument("--gib", type=float, nargs="+", default=[8, 12, 16, 24, 80])
    windows = commands.add_parser("windows", help="memory and time of long clips, whole and in context windows")
    windows.add_argument("--unet", default="tiny", choices=["sd15", "sd21", "sdxl", "tiny"])
    windows.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    windows.add_argument("--frames", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    windows.add_argument("--size", type=int, default=64, help="pixels, square")
    windows.add_argument("--window", type=int, default=8, help="frames")
    ablation = commands.add_parser("ablation", help="the paper's ablations on drawn clips")
    ablation.add_argument("--quick", action="store_true", help="one clip, one edit, one seed")
    ablation.add_argument("--clips", type=int, default=8)
    ablation.add_argument("--edits", type=int, default=4)
    ablation.add_argument("--seeds", type=int, default=3)
    ablation.add_argument("--workers", type=int, default=1, help="processes that share the clips; Linux and macOS")
    ablation.add_argument(
        "--output", type=Path, default=ROOT / "ablation-output", help="folder for results as they come"
    )
    ranks = commands.add_parser("ranks", help="what motions lose when they are saved at a rank, with the demo's model")
    ranks.add_argument("--clips", type=int, default=3)
    ranks.add_argument("--edits", type=int, default=4)
    ranks.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    evaluate = commands.add_parser("evaluate", help="figures of an edited video")
    evaluate.add_argument("source", type=Path, help="the clip that was edited")
    evaluate.add_argument("edited", type=Path, help="the edit; its frames are compared one by one with the source's")
    evaluate.add_argument("--prompt", default="", help="what the edit should show")
    evaluate.add_argument("--clip-vision", type=Path, help="a CLIP Vision file")
    evaluate.add_argument("--clip", type=Path, help="the text half of the same CLIP, with its projection")
    for command in (*commands.choices.values(),):
        command.add_argument("--threads", type=int, default=2)
        command.add_argument("--json", type=Path, help="write the figures to this file")
        command.add_argument("--comfyui", type=Path, help="a ComfyUI checkout")
        command.add_argument("--engine", choices=["auto", "pypi"], default="auto", help="pypi: ignore any ComfyUI")
    return top


def _step_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--unet", default="sd15", choices=["sd15", "sd21", "sdxl", "tiny"])
    command.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    command.add_argument("--steps", type=int, default=7, help="timed steps")
    command.add_argument("--warmup", type=int, default=2, help="steps before those")


def main() -> None:
    """Run one benchmark, print its figures, write them as JSON if asked."""
    arguments = parser().parse_args()
    comfyui = None if arguments.engine == "pypi" else engine.find_comfyui(arguments.comfyui)
    host = engine.load_engine(comfyui)
    engine.load_pack()
    figures = {"engine": host, **_COMMANDS[arguments.command](arguments)}
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def _step(arguments: argparse.Namespace) -> dict[str, Any]:
    import steps

    figures = steps.run(arguments)
    for key, value in figures.items():
        print(f"{key:>24}  {value:.4g}" if isinstance(value, float) and math.isfinite(value) else f"{key:>24}  {value}")
    return figures


def _scale(arguments: argparse.Namespace) -> dict[str, Any]:
    import scale

    return scale.run(arguments)


def _peak(arguments: argparse.Namespace) -> dict[str, Any]:
    import peak

    return peak.run(arguments)


def _windows(arguments: argparse.Namespace) -> dict[str, Any]:
    import windows

    return windows.run(arguments)


def _cards(arguments: argparse.Namespace) -> dict[str, Any]:
    import peak

    return peak.cards(arguments)


def _ablation(arguments: argparse.Namespace) -> dict[str, Any]:
    sys.path.append(str(ROOT / "demo"))
    import ablation

    if arguments.quick:
        arguments.clips = arguments.edits = arguments.seeds = 1
    report = ablation.run(arguments)
    table = ablation.table(report)
    (arguments.output / "ablation.md").write_text(table)
    print("\n" + table)
    print(f"Table and pictures: {arguments.output}")
    return report


def _ranks(arguments: argparse.Namespace) -> dict[str, Any]:
    sys.path.append(str(ROOT / "demo"))
    import ranks

    return ranks.run(arguments)


def _evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    import evaluate

    return evaluate.run(arguments)


_COMMANDS = {
    "tune-step": _step,
    "invert-step": _step,
    "sample-step": _step,
    "scale": _scale,
    "peak": _peak,
    "windows": _windows,
    "cards": _cards,
    "ablation": _ablation,
    "ranks": _ranks,
    "evaluate": _evaluate,
}

if __name__ == "__main__":
    main()
