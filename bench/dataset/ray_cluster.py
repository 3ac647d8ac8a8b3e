"""Workers that are actors of a Ray cluster, one a GPU. Frames, motions and edits travel through the object store.

``ray`` is no dependency of the pack: pip install ray.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import results
from .jobs import MOTION, NOISE, EditFailed, Job, Settings, WorkerDied, WorkerLost

ROOT = Path(__file__).resolve().parents[2]
# Seconds that an actor may take to start, with the model on a slow disk, and between two looks at whether it has.
PATIENCE, _LOOK = 300, 1


def connect(address: str) -> Any:
    """Return the module ``ray``, connected to a cluster. Exits without ray.

    ``address``: "auto" is the cluster that ``ray start`` started here, "" is RAY_ADDRESS, else a new cluster of this
    machine. Ray itself would wait minutes for one that was killed, and start none then.
    """
    try:
        import ray
    except ImportError as error:
        raise SystemExit("--on ray needs Ray: pip install ray") from error
    address = address or os.environ.get("RAY_ADDRESS", "local")
    ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level="error")
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
    """An actor as a worker. ``resources``: of ray.remote, such as num_gpus=1.

    An actor that does not start again within ``patience`` seconds is left out: its machine is gone, or taken.
    """

    def __init__(
        self,
        ray: Any,
        name: str,
        settings: Settings,
        comfyui: Path | None,
        threads: int,
        patience: float = PATIENCE,
        **resources: Any,
    ) -> None:
        self.name, self._ray, self.patience = name, ray, patience
        kind = ray.remote(max_restarts=0, **resources)(RemoteEditor)
        # The actor's process imports this package from the same path on its machine.
        environment = {"env_vars": {"PYTHONPATH": str(ROOT / "bench")}}
        self._make = lambda: kind.options(runtime_env=environment).remote(
            str(ROOT), str(comfyui or ""), settings.to_json(), threads
        )
        self._actor = self._make()
        self._closed = False

    def starts(self) -> bool:
        """Wait for the actor's process; return whether it is there in time. Raises WorkerLost if it ends instead."""
        deadline, asked = time.monotonic() + self.patience, self._actor.process_id.remote()
        while not self._closed and time.monotonic() < deadline:
            if self._ray.wait([asked], timeout=_LOOK)[0]:
                try:
                    self._ray.get(asked)
                except self._ray.exceptions.RayError as error:
                    raise WorkerLost(f"it does not start ({str(error).strip().splitlines()[-1]})") from error
                return True
        return False

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
        if self._closed:
            return False
        self._actor = self._make()
        if self.starts():
            return True
        # Ray would start it whenever there is room, for nobody.
        self._ray.kill(self._actor)
        return False

    def close(self) -> None:
        self._closed = True
        self._ray.kill(self._actor)


def start_actors(
    ray: Any,
    count: int | None,
    settings: Settings,
    comfyui: Path | None,
    threads: int,
    say: Callable[[str], None],
    patience: float = PATIENCE,
) -> list[RayWorker]:
    """Start ``count`` actors, None for one a GPU, and return those that the cluster has room for, the roomiest first.

    Ray itself would wait for room without a word. ``threads`` are shared among the actors of a cluster without GPUs.
    ``say`` gets a sentence for each actor that is left out. Exits if none starts.
    """
    gpus = int(ray.cluster_resources().get("GPU", 0))
    needs = {"CPU": 1, "GPU": 1} if gpus else {"CPU": 1}
    wanted, room = count or gpus or 1, _room(ray, needs)
    each = " and ".join(f"1 {name}" for name in needs)
    if not room:
        raise SystemExit(f"--on ray: the cluster has no room for an actor, which takes {each}.")
    if room < wanted:
        say(f"The cluster has room for {room} of {wanted} actors, each of which takes {each}; {room} work.")
    started = min(wanted, room)
    threads = max(threads // started, 1)
    actors = [
        RayWorker(ray, f"actor-{i}", settings, comfyui, threads, patience, num_cpus=1, num_gpus=needs.get("GPU", 0))
        for i in range(started)
    ]
    ready = []
    for actor in actors:
        try:
            reason = "" if actor.starts() else f"it has not started after {patience:g} s; the cluster is busy"
        except WorkerLost as error:
            reason = str(error)
        if reason:
            say(f"{actor.name} is left out: {reason}.")
            actor.close()
        else:
            ready.append(actor)
    if not ready:
        raise SystemExit("--on ray: no actor has started.")
    return sorted(ready, key=lambda actor: -actor.free_memory())


def _room(ray: Any, needs: Mapping[str, int]) -> int:
    """Return how many actors fit into what is free, none of them spread over two machines."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    by_size = sum(min(int(node.get(name, 0)) // need for name, need in needs.items()) for node in nodes)
    free = ray.available_resources()
    return min(by_size, *(int(free.get(name, 0)) // need for name, need in needs.items()))
