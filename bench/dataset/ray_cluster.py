"""Workers that are actors of a Ray cluster, one a GPU. Frames, motions and edits travel through the object store.

``ray`` is no dependency of the pack: pip install ray.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import results
from .jobs import MOTION, NOISE, EditFailed, Job, Settings, WorkerDied

ROOT = Path(__file__).resolve().parents[2]


def connect(address: str) -> Any:
    """Return the module ``ray``, connected to a cluster; "" starts one on this machine. Exits without ray."""
    try:
        import ray
    except ImportError as error:
        raise SystemExit("--on ray needs Ray: pip install ray") from error
    ray.init(address=address or None, log_to_driver=False, include_dashboard=False, logging_level="error")
    return ray


class RemoteEditor:
    """The actor: an Editor in a process of the cluster. ``comfyui``: its ComfyUI's root on that machine, or ""."""

    def __init__(self, root: str, comfyui: str, settings: dict[str, Any], threads: int) -> None:
        sys.path[:0] = [str(Path(root) / "tools"), str(Path(root) / "bench")]
        sys.path.append(str(Path(root) / "demo"))
        import engine

        engine.load_engine(Path(comfyui) if comfyui else None)
        engine.load_pack()
        import torch

        torch.set_num_threads(threads)
        from dataset.editor import Editor

        self._editor = Editor(Settings(**settings))
        self._folder = Path(tempfile.mkdtemp(prefix="study-"))

    def process_id(self) -> int:
        """Return the process's id on its machine."""
        return os.getpid()

    def free_memory(self) -> int:
        """Return the bytes that are free for edits there."""
        from dataset.editor import free_memory

        return free_memory()

    def edit(self, values: dict[str, str], frames: Any, known: dict[str, bytes]) -> tuple[Any, dict[str, bytes]]:
        """Make an edit; return its frames and the files of its clip's tuning that were not ``known``."""
        work = self._folder / values["clip"] / "work"
        source = self._folder / values["clip"] / "frames"
        for name, content in known.items():
            if not (work / name).exists():
                results.write_whole(work / name, content)
        if not source.is_dir():
            results.write_frames(source, frames, ".png")
        paths = {"frames": source, "work": work, "result": work}
        job = Job(**{**values, **paths})  # type: ignore[arg-type]
        edited = self._editor.edited(job)
        new = {path.name: path.read_bytes() for path in work.glob("*.safetensors") if path.name not in known}
        return edited, new

    def close(self) -> None:
        """Remove the actor's files."""
        shutil.rmtree(self._folder, ignore_errors=True)


class RayWorker:
    """An actor as a worker. ``resources``: of ray.remote, such as num_gpus=1."""

    def __init__(self, ray: Any, name: str, settings: Settings, comfyui: Path | None, threads: int, **resources: Any):
        self.name, self._ray = name, ray
        kind = ray.remote(max_restarts=0, **resources)(RemoteEditor)
        # The actor's process imports this package from the same path on its machine.
        environment = {"env_vars": {"PYTHONPATH": str(ROOT / "bench")}}
        self._make = lambda: kind.options(runtime_env=environment).remote(
            str(ROOT), str(comfyui or ""), settings.to_json(), threads
        )
        self._actor = self._make()
        self._closed = False

    def free_memory(self) -> int:
        """Return the bytes that are free where the actor runs."""
        return int(self._ray.get(self._actor.free_memory.remote()))

    def process_id(self) -> int:
        """Return the id of the actor's process on its machine."""
        return int(self._ray.get(self._actor.process_id.remote()))

    def edit(self, job: Job) -> None:
        values = {key: str(value) for key, value in dataclasses.asdict(job).items()}
        files = [job.work / MOTION, job.work / NOISE.format(job.method)]
        known = {path.name: path.read_bytes() for path in files if path.exists()}
        try:
            frames, new = self._ray.get(self._actor.edit.remote(values, results.read_frames(job.frames), known))
        except self._ray.exceptions.RayActorError as error:
            raise WorkerDied(str(error).splitlines()[0]) from error
        except self._ray.exceptions.RayTaskError as error:
            raise EditFailed(f"{type(error.cause).__name__}: {error.cause}") from error
        for name, content in new.items():
            results.write_whole(job.work / name, content)
        results.write_frames(job.result, frames)

    def revive(self) -> bool:
        if not self._closed:
            self._actor = self._make()
        return not self._closed

    def close(self) -> None:
        self._closed = True
        self._ray.kill(self._actor)
