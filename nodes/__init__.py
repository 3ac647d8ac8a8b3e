"""The nodes: schema, validation, progress. What they do is in ``tav_core``."""

from comfy_api.latest import ComfyExtension, io

from .demo_model import LoadDemoModel
from .evaluate import CompareVideos, EvaluateVideo
from .load_video import LoadVideo
from .motion import LoadMotion, SaveMotion
from .sample import DDIMInvert, TAVSample
from .save_video import SaveVideo
from .support.routes import register
from .tune import InflateUNet, OneShotTune


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
