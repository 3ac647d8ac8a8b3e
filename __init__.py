"""Tune-A-Video for ComfyUI: nothing here but the node list and where the help pages lie."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Called by ComfyUI; the import waits until then, so that the package loads without a host too."""
    from .nodes import TuneAVideoExtension

    return TuneAVideoExtension()
