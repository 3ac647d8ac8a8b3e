"""Tune-A-Video for ComfyUI: nothing here but the node list and where the help pages lie."""

import importlib.util
import logging
import re
import sys

WEB_DIRECTORY = "./web"
OLDEST_HOST = "0.3.64"


def _older_host() -> str | None:
    """The version of the ComfyUI that is loading this, if it is too old; None for others, and without a ComfyUI."""
    if "nodes" not in sys.modules:
        return None
    try:
        from comfyui_version import __version__ as version
    except ImportError:
        # The oldest ones don't say; what the nodes are written with is younger than that.
        return None if importlib.util.find_spec("comfy_api") else "without a version"
    numbers = [tuple(map(int, re.findall(r"\d+", text)[:3])) for text in (version, OLDEST_HOST)]
    return version if numbers[0] < numbers[1] else None


if _version := _older_host():
    logging.warning(
        "Tune-A-Video needs ComfyUI %s or newer, and this one is %s: update ComfyUI. Its nodes are left out.",
        OLDEST_HOST,
        _version,
    )
    # Has any ComfyUI leave it at that; otherwise it would look for an entry point, or complain of having found none.
    NODE_CLASS_MAPPINGS: dict[str, type] = {}


async def comfy_entrypoint():
    """Called by ComfyUI; the import waits until then, so that the package loads without a host too."""
    from .nodes import TuneAVideoExtension

    return TuneAVideoExtension()
