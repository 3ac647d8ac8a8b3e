"""The nodes: schema, validation, progress. What they do is in ``tav_core``."""

from comfy_api.latest import ComfyExtension, io

from .demo_model import LoadDemoModel
from .evaluate import CompareVideos, EvaluateVideo
from .inflate import InflateUNet
from .invert import DDIMInvert
from .motion import LoadMotion, SaveMotion
from .sample import TAVSample
from .support.routes import register
from .tune import OneShotTune
from .video import LoadVideo, SaveVideo


class TuneAVideoExtension(ComfyExtension):
    """What ComfyUI asks for the pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes, in the order of a graph."""
        register()
        return [
            LoadVideo,
            InflateUNet,
            OneShotTune,
            DDIMInvert,
            TAVSample,
            SaveVideo,
            SaveMotion,
            LoadMotion,
            EvaluateVideo,
            CompareVideos,
            LoadDemoModel,
        ]
