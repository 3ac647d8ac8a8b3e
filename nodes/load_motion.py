"""Load Motion: tuned weights from a file in the host's models folder."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..tav_core.errors import Refusal
from ..tav_core.motion.file import load_motion
from ..tav_core.motion.low_rank import outline
from .support.memory import memory_explained
from .support.motions import FOLDER, path_of_motion
from .support.paths import LONGEST_NAME
from .support.types import CATEGORY, MotionType, search_aliases


class LoadMotion(io.ComfyNode):
    """One safetensors file in models/tav -> MOTION."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TAV_LoadMotion",
            display_name="Load Motion (Tune-A-Video)",
            category=CATEGORY,
            **search_aliases("load tuned weights"),
            description="Loads tuned weights that Save Motion wrote. Connect them to Inflate UNet together with a "
            "checkpoint of the same family.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A motion file in the models folder `tav`. Press R to refresh the list.",
                )
            ],
            outputs=[MotionType.Output(display_name="motion", tooltip="Tuned weights, for Inflate UNet.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        """Return a value that changes with the file, so that a changed file is loaded again."""
        # A constant where there is no file to look at: an error here would load it again on every run.
        try:
            path = path_of_motion(file)
            if path is None:
                return ""
            stat = Path(path).stat()
        except OSError:
            return ""
        return f"{path} {stat.st_mtime_ns} {stat.st_size}"

    @classmethod
    @memory_explained("file", "Close other programs that use memory and queue again.")
    def execute(cls, file: str) -> io.NodeOutput:
        """Read the file. Raises Refusal or ValueError for one that is missing, damaged, too new or not a motion."""
        path = path_of_motion(file)
        if path is None:
            name = str(file)[:LONGEST_NAME]
            raise Refusal("file", f"{name} is not in the models folder {FOLDER}", "Refresh the list and choose again.")
        motion = load_motion(Path(path))
        outline(motion)  # raises for one of low rank that is damaged; what uses it expands it
        return io.NodeOutput(motion)


NODES = [LoadMotion]
