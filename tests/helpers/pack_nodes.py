"""The pack's node classes and what they share, imported when a test asks: PyPI's engine has nothing for nodes."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    package = importlib.import_module("tune_a_video.nodes")
    for found in pkgutil.walk_packages(package.__path__, "tune_a_video.nodes."):
        module = importlib.import_module(found.name)
        if getattr(getattr(module, name, None), "__module__", "") == found.name:
            return getattr(module, name)
    raise AttributeError(f"no node file has {name}")
