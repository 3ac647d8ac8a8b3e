"""Find the engine that tests, demo and benchmarks run on, and import this pack beside it.

The engine is a real ComfyUI if there is one, else ComfyUI's `comfy` package from PyPI, which `tools/setup_env.py`
unpacks into the virtual environment. This file imports only the standard library until `load_engine` is called, since
the set-up uses it too.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

PACK_ROOT = Path(__file__).resolve().parent.parent
PACK_NAME = "tune_a_video"


def find_comfyui(path: str | Path | None = None) -> Path | None:
    """Return the root of a ComfyUI checkout: `path`, else $COMFYUI_PATH, else ~/comfy/ComfyUI; None if it is not there.

    Only the first of these that is given is looked at. Raises FileNotFoundError if `path` holds no ComfyUI.
    """
    named = path or os.environ.get("COMFYUI_PATH")
    root = Path(named).expanduser().resolve() if named else Path.home() / "comfy" / "ComfyUI"
    if (root / "main.py").is_file() and (root / "nodes.py").is_file() and (root / "comfy").is_dir():
        return root
    if path:
        raise FileNotFoundError(f"no ComfyUI at {path}: it needs main.py, nodes.py and comfy/")
    return None


def load_engine(comfyui: Path | None, base_directory: Path | None = None) -> str:
    """Put an engine on sys.path and return its name.

    Call it before anything imports `comfy`. `comfyui` is a checkout's root, or None for the engine from PyPI.
    `base_directory` replaces ComfyUI's own input, output, temp and models folders. The engine uses the CPU if torch
    finds no accelerator. Raises FileNotFoundError if there is no engine.
    """
    root = comfyui or Path(sys.prefix) / "notcomfy"
    if not (root / "comfy").is_dir():
        raise FileNotFoundError(
            f"no ComfyUI was given and {root} does not hold the engine from PyPI: run `make env ENGINE=pypi`"
        )
    # python -m puts the working directory on the path. In this pack's root, nodes/ would hide the host's nodes.py.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != PACK_ROOT]
    sys.path.insert(0, str(root))

    import torch
    from comfy.cli_args import args

    if not (torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()):
        args.cpu = True
    if base_directory is not None:
        args.base_directory = str(base_directory)
    if comfyui is None:
        return "ComfyUI's engine of November 2024 from PyPI (notcomfy 0.1.0)"
    # ComfyUI's nodes.py puts comfy/ first on the path, where utils.py would hide this package.
    import utils.extra_config  # noqa: F401
    from comfyui_version import __version__

    return f"ComfyUI {__version__}"


def load_pack() -> ModuleType:
    """Import this checkout as the package `tune_a_video`, whatever its folder is called."""
    if PACK_NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACK_NAME, PACK_ROOT / "__init__.py", submodule_search_locations=[str(PACK_ROOT)]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[PACK_NAME] = module
        spec.loader.exec_module(module)
    return sys.modules[PACK_NAME]
