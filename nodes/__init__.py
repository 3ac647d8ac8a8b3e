"""The nodes, one file a feature: schema, checks and one call. The work is done in ``tav_core``."""

from comfy_api.latest import ComfyExtension, io

from . import (
    compare_videos,
    demo_model,
    edit_control,
    edit_prompt,
    evaluate_video,
    inflate,
    invert,
    load_motion,
    load_video,
    sample,
    save_motion,
    save_video,
    tune,
)
from .support.routes import register

# In the order of a graph.
NODES: list[type[io.ComfyNode]] = [
    *load_video.NODES,
    *inflate.NODES,
    *tune.NODES,
    *edit_prompt.NODES,
    *invert.NODES,
    *edit_control.NODES,
    *sample.NODES,
    *save_video.NODES,
    *save_motion.NODES,
    *load_motion.NODES,
    *evaluate_video.NODES,
    *compare_videos.NODES,
    *demo_model.NODES,
]


class TuneAVideoExtension(ComfyExtension):
    """The object that ComfyUI asks for the pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return all nodes. ComfyUI calls this once, so the pack's routes are added here."""
        register()
        return NODES
