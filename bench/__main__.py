"""Measure this project: single steps, how they scale, what each part of the method is worth, one edited video.

python bench COMMAND [--help]

  tune-step, invert-step, sample-step,  one kind of step at any UNet size, on random weights
  controlled-step
  control                               edit control against plain sampling: steps while it acts and afterwards
  overhead                              what an inflated evaluation costs in Python, without a kernel
  scale                                 steps over frames and sizes, with curves
  ablation                              ways of editing, compared on drawn clips
  peak                                  predicted against measured memory of a tuning step
  windows                               long clips, whole and in context windows
  cards                                 the planner's choices for graphics cards, on paper
  ranks                                 the loss of saving a motion at a rank
  recipes                               the quality of edits over tuning steps, by recipe of tuning
  evaluate                              the figures of the Evaluate Video node for two files
  gpu                                   all that a GPU decides, in about ten minutes
  dataset                               a study: all edits of a data set, on one machine or many
  votes                                 a page on which people compare the edits of a study
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
sys.path.append(str(ROOT / "demo"))

import engine  # noqa: E402

# Command -> the module that has its `add_arguments(parser)` and `run(**arguments) -> figures`.
COMMANDS = {
    "tune-step": "steps",
    "invert-step": "steps",
    "sample-step": "steps",
    "controlled-step": "steps",
    "control": "control",
    "overhead": "overhead",
    "scale": "scale",
    "peak": "peak",
    "windows": "windows",
    "cards": "cards",
    "ablation": "ablation",
    "ranks": "ranks",
    "recipes": "recipes",
    "evaluate": "evaluate",
    "gpu": "gpu",
    "dataset": "dataset.command",
    "votes": "votes.command",
}


def main() -> None:
    """Run one benchmark, print its figures and write them as JSON if asked."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python bench", description=__doc__, formatter_class=raw, add_help=False)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--comfyui", type=Path, help="a ComfyUI checkout")
    parser.add_argument("--engine", choices=["auto", "pypi"], default="auto", help="pypi: ignore any ComfyUI")
    if not set(COMMANDS) & set(sys.argv[1:]):
        parser.add_argument("-h", "--help", action="help")
    common, rest = parser.parse_known_args()

    # The modules import the engine, so it is loaded before they add their arguments.
    host = engine.load_engine(None if common.engine == "pypi" else engine.find_comfyui(common.comfyui))
    engine.load_pack()
    import torch

    torch.set_num_threads(common.threads)
    module = importlib.import_module(COMMANDS[common.command])
    own = argparse.ArgumentParser(prog=f"python bench {common.command}", description=module.__doc__)
    if common.command.endswith("-step"):
        own.set_defaults(kind=common.command)
    module.add_arguments(own)
    figures = {"engine": host, **module.run(**vars(own.parse_args(rest)))}
    if common.json:
        common.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
