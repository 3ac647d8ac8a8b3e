"""SaveMotion and LoadMotion: tuned weights to and from the host's models folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..tav_core.motion.file import Motion, load_motion, save_motion
from ..tav_core.motion.low_rank import KEPT_KEY, compress, expand
from .support.limits import check_limits
from .support.memory import memory_explained
from .support.paths import LONGEST_NAME, check_room, check_target, disk_explained, next_name
from .support.types import CATEGORY, MotionType, search_aliases

FOLDER = "tav"
_PREFIX, _OPTION = "skiing", "--base-directory"

folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
# Without this the list would show whatever lies there, unfinished files included.
folder_paths.folder_names_and_paths[FOLDER][1].add(".safetensors")


class SaveMotion(io.ComfyNode):
    """MOTION -> one safetensors file in models/tav."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
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
                    tooltip="Name of the file below models/tav; a counter is added, nothing is overwritten. "
                    "May hold a subfolder and %date:yyyy-MM-dd%.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=64,
                    optional=True,
                    tooltip="0 saves everything. 4 to 64 saves an approximation of that rank, some 0.3 MB per rank for "
                    "SD 1.5; the node says how much of what was learnt it keeps.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="Full path of the file that was written.")],
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None) -> bool | str:
        """Look at the folder before anything runs: a tuning comes before what saves it."""
        return check_target(filename_prefix, folder_paths.get_folder_paths(FOLDER)[0], _PREFIX, _OPTION)

    @classmethod
    @memory_explained("motion", "Close what else takes memory and queue again: the tuning need not run again.")
    def execute(cls, motion: Motion, filename_prefix: str, rank: int = 0) -> io.NodeOutput:
        """Write the file; ValueError for a prefix that leaves the models folder or is no name."""
        check_limits(cls, rank=rank)
        said = ""
        if rank:
            motion = compress(motion, rank)
            said = f" (keeps {float(motion.metadata[KEPT_KEY]):.0%} of what was learnt)"
        root = folder_paths.get_folder_paths(FOLDER)[0]
        with disk_explained(_OPTION):
            folder, name, _ = next_name(filename_prefix, root, _PREFIX)
            check_room(folder, sum(value.nbytes for value in motion.tensors.values()), _OPTION)
            path = Path(folder) / f"{name}.safetensors"
            save_motion(motion, path)
        return io.NodeOutput(str(path), ui={"text": [str(path) + said]})


class LoadMotion(io.ComfyNode):
    """One safetensors file in models/tav -> MOTION."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
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
    def fingerprint_inputs(cls, file: str) -> Any:
        """Load again when the file has changed."""
        path = _path_of(file)
        if path is None:
            return ""
        stat = Path(path).stat()
        return f"{path} {stat.st_mtime_ns} {stat.st_size}"

    @classmethod
    @memory_explained("file", "Close what else takes memory and queue again.")
    def execute(cls, file: str) -> io.NodeOutput:
        """Read the file; ValueError for one that is missing, damaged, of a newer format or no motion at all."""
        path = _path_of(file)
        if path is None:
            name = str(file)[:LONGEST_NAME]
            raise ValueError(f"file: {name} is not in the models folder {FOLDER}. Refresh the list and choose again.")
        return io.NodeOutput(expand(load_motion(Path(path))))


def _path_of(name: Any) -> str | None:
    """The path of a motion file by the name that the list has; None for anything else that a link may bring."""
    return folder_paths.get_full_path(FOLDER, name) if isinstance(name, str) and name else None
