"""The models folder of motion files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths

FOLDER = "tav"

folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
# Without this the list would show every file there, unfinished ones included.
folder_paths.folder_names_and_paths[FOLDER][1].add(".safetensors")


def path_of_motion(name: Any) -> str | None:
    """Return the path of a motion file by its name in the list; None if there is no such file."""
    return folder_paths.get_full_path(FOLDER, name) if isinstance(name, str) and name else None
