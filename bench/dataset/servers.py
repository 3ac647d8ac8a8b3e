"""Workers that are running ComfyUIs with this pack: clips are uploaded, graphs queued, pictures fetched.

A tuned clip stays on its server as a motion file, so that a server that was started again does not tune it again.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
from PIL import Image

from . import results
from .jobs import FRAME_BY_FRAME, TUNED, EditFailed, Job, Settings, WorkerDied

# Seconds: a single answer, a server that is starting again, between two looks at a graph.
_ANSWER, _RETURN, _LOOK = 60, 60, 0.3
# Looks in a row at which a graph is neither queued nor finished: the server has forgotten it.
_FORGOTTEN = 5

Graph = dict[str, dict[str, Any]]


class ServerWorker:
    """A ComfyUI at ``address`` (HOST:PORT). A server that does not answer for ``patience`` seconds is given up."""

    def __init__(self, address: str, settings: Settings, patience: float = _RETURN) -> None:
        self.name, self._settings, self._patience = address, settings, patience
        self._url = address if "://" in address else f"http://{address}"
        self._client = uuid.uuid4().hex
        self._uploaded: dict[str, str] = {}
        self._running, self._closed = "", False

    def edit(self, job: Job) -> None:
        file = self._upload(job.frames)
        motion = ""
        if job.method == TUNED:
            prefix = self._motion_prefix(job, file)
            motion = self._find_motion(prefix)
            if not motion:
                self._run(tuning_graph(self._settings, file, job.source, prefix))
                motion = self._find_motion(prefix)
                if not motion:
                    raise EditFailed(f"{self.name} lists no motion {prefix} after tuning")
        outputs = self._run(edit_graph(self._settings, file, job, motion))
        frames = [self._picture(image) for image in outputs["save"]["images"]]
        results.write_frames(job.result, np.stack(frames))

    def revive(self) -> bool:
        deadline = time.monotonic() + self._patience
        while not self._closed and time.monotonic() < deadline:
            try:
                self._request("/system_stats")
                self._uploaded.clear()
                return True
            except WorkerDied:
                time.sleep(0.5)
        return False

    def close(self) -> None:
        self._closed = True
        if self._running:
            body = json.dumps({"delete": [self._running]}).encode()
            for path, content in (("/queue", body), ("/interrupt", json.dumps({"prompt_id": self._running}).encode())):
                try:
                    self._request(path, content, timeout=2)
                except (WorkerDied, EditFailed):
                    return

    def _motion_prefix(self, job: Job, file: str) -> str:
        settings = self._settings
        decisive = [settings.checkpoint, settings.tune_steps, settings.learning_rate, settings.seed, job.source, file]
        return f"study-{hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]}"

    def _find_motion(self, prefix: str) -> str:
        schema = json.loads(self._request("/object_info/TAV_LoadMotion"))
        if "TAV_LoadMotion" not in schema:
            raise EditFailed(f"{self.name} has no Tune-A-Video nodes")
        kind = schema["TAV_LoadMotion"]["input"]["required"]["file"]
        names = kind[0] if isinstance(kind[0], list) else kind[1].get("options", [])
        return next((name for name in names if name.startswith(prefix)), "")

    def _upload(self, frames: Path) -> str:
        """Put a clip into the server's input folder, without loss, under a name that is its content's."""
        name = self._uploaded.get(str(frames))
        if name is None:
            pixels = results.read_frames(frames)
            shape = f"{pixels.shape}".encode()
            name = f"study-{hashlib.sha256(shape + pixels.tobytes()).hexdigest()[:24]}.mkv"
            boundary = uuid.uuid4().hex
            fields = [("overwrite", b"true", ""), ("image", lossless(pixels), f'; filename="{name}"')]
            body = b"".join(
                f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"{more}\r\n\r\n'.encode()
                + content
                + b"\r\n"
                for field, content, more in fields
            )
            body += f"--{boundary}--\r\n".encode()
            self._request("/upload/image", body, f"multipart/form-data; boundary={boundary}")
            self._uploaded[str(frames)] = name
        return name

    def _run(self, graph: Graph) -> dict[str, Any]:
        """Queue a graph and wait for its end; return its nodes' outputs."""
        if self._closed:
            raise WorkerDied("the study has ended")
        queued = json.loads(self._request("/prompt", json.dumps({"prompt": graph, "client_id": self._client}).encode()))
        self._running = queued["prompt_id"]
        missing = 0
        try:
            while missing < _FORGOTTEN:
                if self._closed:
                    raise WorkerDied("the study has ended")
                time.sleep(_LOOK)
                history = json.loads(self._request(f"/history/{self._running}"))
                if self._running in history:
                    return self._outputs(history[self._running])
                queue = json.loads(self._request("/queue"))
                known = {entry[1] for entry in (*queue["queue_running"], *queue["queue_pending"])}
                missing = 0 if self._running in known else missing + 1
            raise WorkerDied(f"{self.name} has forgotten the graph: it was started again")
        finally:
            self._running = ""

    def _outputs(self, entry: dict[str, Any]) -> dict[str, Any]:
        status = entry.get("status") or {}
        if status.get("status_str") != "success":
            messages = dict(status.get("messages") or ())
            if "execution_interrupted" in messages:
                raise WorkerDied(f"somebody has stopped the graph on {self.name}")
            error = messages.get("execution_error", {})
            raise EditFailed(f"{error.get('node_type', 'a node')}: {error.get('exception_message', status)}".strip())
        found: dict[str, Any] = entry["outputs"]
        return found

    def _picture(self, image: dict[str, str]) -> results.Pixels:
        query = urllib.parse.urlencode({key: image[key] for key in ("filename", "subfolder", "type")})
        with Image.open(io.BytesIO(self._request(f"/view?{query}"))) as picture:
            return np.asarray(picture.convert("RGB"))

    def _request(
        self, path: str, body: bytes | None = None, kind: str = "application/json", timeout: float = _ANSWER
    ) -> bytes:
        """Ask the server. Raises WorkerDied where it does not answer, EditFailed where it refuses."""
        request = urllib.request.Request(self._url + path, data=body, headers={"Content-Type": kind})  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:  # noqa: S310 - the user's own servers
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            raise EditFailed(f"{self.name} refuses {path}: {error.read()[:2000].decode(errors='replace')}") from error
        except (OSError, ValueError) as error:
            raise WorkerDied(f"{self.name} does not answer ({error})") from error


def lossless(pixels: results.Pixels) -> bytes:
    """Encode frames as a video whose decoded pixels are the same (FFV1 in RGB, 8 frames a second)."""
    height, width = pixels.shape[1:3]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-f", "rawvideo"]
    command += ["-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "8", "-i", "pipe:0"]
    command += ["-c:v", "ffv1", "-level", "3", "-pix_fmt", "gbrp", "-f", "matroska", "pipe:1"]
    return subprocess.run(command, input=pixels.tobytes(), stdout=subprocess.PIPE, check=True).stdout


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def _common(settings: Settings, file: str, source: str) -> Graph:
    model = (
        _node("CheckpointLoaderSimple", ckpt_name=settings.checkpoint)
        if settings.checkpoint
        else _node("TAV_LoadDemoModel")
    )
    clip = _node(
        "TAV_LoadVideo",
        file=file,
        start=0.0,
        start_unit="frames",
        frame_count=0,
        frame_step=1,
        width=settings.width,
        height=settings.height,
        resize="keep",
    )
    return {
        "model": model,
        "frames": clip,
        "latent": _node("VAEEncode", pixels=["frames", 0], vae=["model", 2]),
        "source": _node("CLIPTextEncode", clip=["model", 1], text=source),
    }


def tuning_graph(settings: Settings, file: str, source: str, prefix: str) -> Graph:
    """Tune a clip and keep the motion on the server."""
    tune = _node(
        "TAV_OneShotTune",
        model=["model", 0],
        latent=["latent", 0],
        conditioning=["source", 0],
        steps=settings.tune_steps,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        train_scope="all",
        precision="auto",
        warmup_steps=0,
        gradient_clip=1.0,
        preview_every=0,
    )
    save = _node("TAV_SaveMotion", motion=["tune", 1], filename_prefix=prefix)
    return {**_common(settings, file, source), "tune": tune, "motion": save}


def edit_graph(settings: Settings, file: str, job: Job, motion: str) -> Graph:
    """Invert a clip, sample an edit and save its frames. ``motion``: a file in models/tav, "" for none."""
    graph = _common(settings, file, job.source)
    ready = ["model", 0]
    if job.method != FRAME_BY_FRAME:
        inflated = _node(
            "TAV_InflateUNet",
            model=["model", 0],
            attention="sparse-causal",
            group_norm="over frames",
            query_strength=1.0,
            temporal_strength=1.0,
        )
        if motion:
            graph["motion"] = _node("TAV_LoadMotion", file=motion)
            inflated["inputs"]["motion"] = ["motion", 0]
        graph["inflated"], ready = inflated, ["inflated", 0]
    return {
        **graph,
        "invert": _node(
            "TAV_DDIMInvert",
            model=ready,
            latent=["latent", 0],
            conditioning=["source", 0],
            steps=settings.ddim_steps,
        ),
        "edit": _node("CLIPTextEncode", clip=["model", 1], text=job.edit),
        "empty": _node("CLIPTextEncode", clip=["model", 1], text=""),
        "sample": _node(
            "TAV_Sample",
            model=ready,
            positive=["edit", 0],
            negative=["empty", 0],
            latent=["invert", 0],
            steps=settings.ddim_steps,
            guidance=settings.guidance,
            eta=0.0,
            seed=settings.seed,
            last_step="clip noise level",
        ),
        "decode": _node("VAEDecode", samples=["sample", 0], vae=["model", 2]),
        "save": _node("SaveImage", images=["decode", 0], filename_prefix="study/edit"),
    }
