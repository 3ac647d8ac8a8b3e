"""The nodes, one file a feature: schema, checks and one call. The work is done in ``tav_core``."""

from comfy_api.latest import ComfyExtension, io

from . import compare_videos, demo_model, evaluate_video, load_motion, save_motion
from .sample import DDIMInvert, TAVSample
from .support.routes import register
from .tune import InflateUNet, OneShotTune
from .video import LoadVideo, SaveVideo

# In the order of a graph.
NODES: list[type[io.ComfyNode]] = [
    LoadVideo,
    InflateUNet,
    OneShotTune,
    DDIMInvert,
    TAVSample,
    SaveVideo,
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
