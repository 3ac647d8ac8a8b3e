"""Save Motion: tuned weights to a file in the host's models folder."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..tav_core import host
from ..tav_core.cancel import cancellable
from ..tav_core.motion.file import Motion, save_motion
from ..tav_core.motion.low_rank import KEPT_KEY, compress
from .support.limits import within_limits
from .support.memory import memory_explained
from .support.motions import FOLDER
from .support.paths import check_room, check_target, disk_explained, next_name
from .support.types import CATEGORY, MotionType, search_aliases

_EXAMPLE, _OPTION = "skiing", "--base-directory"


class SaveMotion(io.ComfyNode):
    """MOTION -> one safetensors file in models/tav."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TAV_SaveMotion",
            display_name="Save Motion (Tune-A-Video)",
            category=CATEGORY,
            **search_aliases("save tuned weights"),
            description="Saves tuned weights as one safetensors file in the models folder `tav`, so that the clip "
            "need not be tuned again. 149 MB for SD 1.5.",
            is_output_node=True,
            inputs=[
                MotionType.Input("motion", tooltip="Tuned weights, from One-Shot Tune."),
                io.String.Input(
                    "filename_prefix",
                    default="motion",
                    tooltip="Name of the file below models/tav. A counter is added; no file is overwritten. "
                    "It can hold a subfolder and %date:yyyy-MM-dd%.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=64,
                    optional=True,
                    tooltip="0 saves everything. 4 to 64 saves an approximation of that rank, about 0.3 MB per rank "
                    "for SD 1.5. The node shows how much of the learnt change the file keeps.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="Full path of the saved file.")],
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None) -> bool | str:
        """Check the folder before anything runs, because a long tuning may come first."""
        return check_target(filename_prefix, folder_paths.get_folder_paths(FOLDER)[0], _EXAMPLE, _OPTION)

    @classmethod
    @cancellable(host.raise_if_cancelled)
    @memory_explained("motion", "Close other programs that use memory and queue again; the tuning does not run again.")
    @within_limits
    def execute(cls, motion: Motion, filename_prefix: str, rank: int = 0) -> io.NodeOutput:
        """Write the file. Raises Refusal for a prefix that leaves the models folder or is no file name."""
        kept = ""
        if rank:
            motion = compress(motion, rank)
            if share := motion.metadata.get(KEPT_KEY):  # not where a low rank was learnt as such
                kept = f" (keeps {float(share):.0%} of the learnt change)"
        root = folder_paths.get_folder_paths(FOLDER)[0]
        with disk_explained(_OPTION):
            folder, name, _ = next_name(filename_prefix, root, _EXAMPLE)
            check_room(folder, sum(value.nbytes for value in motion.tensors.values()), _OPTION)
            path = Path(folder) / f"{name}.safetensors"
            save_motion(motion, path)
        return io.NodeOutput(str(path), ui={"text": [str(path) + kept]})


NODES = [SaveMotion]
