"""Other people's packs that tests run beside, where a folder named by $TAV_TEST_PACKS holds them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

VARIABLE = "TAV_TEST_PACKS"
NAMES = (
    "ComfyUI-VideoHelperSuite",
    "ComfyUI-Advanced-ControlNet",
    "ComfyUI-AnimateDiff-Evolved",
    "ComfyUI-TiledDiffusion",
    "ComfyUI-GGUF",
)


def found() -> dict[str, Path]:
    """Return the packs that are there, by name; their folders have these names."""
    folder = os.environ.get(VARIABLE)
    paths = {name: Path(folder).expanduser() / name for name in NAMES} if folder else {}
    return {name: path for name, path in paths.items() if path.is_dir()}


def why_absent() -> str | None:
    """Name what a test beside these packs lacks here; None if it lacks nothing."""
    if not os.environ.get(VARIABLE):
        return f"${VARIABLE} names no folder"
    missing = [name for name in NAMES if name not in found()]
    if missing:
        return f"${VARIABLE} holds no {', '.join(missing)}"
    return None if importlib.util.find_spec("gguf") else "gguf is not installed (pip install gguf)"
