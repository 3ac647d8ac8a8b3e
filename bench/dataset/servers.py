"""Workers that are running ComfyUIs with this pack: clips are uploaded, graphs queued, pictures fetched.

A tuned clip stays on its server as a motion file, so that a server that was started again does not tune it again.
"""

from __future__ import annotations

import hashlib
import http.client
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
from .jobs import CONTROLLED, FRAME_BY_FRAME, WITH_MOTION, EditFailed, Job, Settings, WorkerDied, WorkerLost

# Seconds: a single answer, a server that is starting again, between two looks at a graph.
_ANSWER, RETURN, _LOOK = 60, 60, 0.3
# Looks in a row at which a graph is neither queued nor finished: the server has forgotten it.
_FORGOTTEN = 5

Graph = dict[str, dict[str, Any]]


class ServerWorker:
    """A ComfyUI at ``address`` (HOST:PORT). A server that does not answer for ``patience`` seconds is given up."""

    def __init__(self, address: str, settings: Settings, patience: float = RETURN) -> None:
        self.name, self._settings, self._patience = address, settings, patience
        self._url = url_of(address)
        self._client = uuid.uuid4().hex
        self._uploaded: dict[str, str] = {}
        # Graph -> its number on the server, until its end is known.
        self._queued: dict[str, str] = {}
        self._running, self._silence = "", ""
        self._checked = self._closed = False

    def edit(self, job: Job) -> None:
        if not self._checked:
            if not self.revive():
                raise WorkerLost(f"it does not answer ({self._silence})")
            self._check()
        file = self._upload(job.frames)
        motion = ""
        if job.method in WITH_MOTION:
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
        while not self._closed and time.monotonic() <= deadline:
            try:
                self._ask("/system_stats")
                self._uploaded.clear()
                self._checked = False
                return True
            except (WorkerDied, EditFailed) as error:
                self._silence = str(error)
                time.sleep(min(0.5, self._patience))
        return False

    def _check(self) -> None:
        """Raise WorkerLost for a server that lacks the nodes or the checkpoint."""
        nodes = self._ask("/object_info")
        missing = sorted(node for node in _needed(self._settings) if node not in nodes)
        if missing:
            raise WorkerLost(f"it has no node {', '.join(missing)}")
        checkpoint = self._settings.checkpoint
        if checkpoint and checkpoint not in _options(nodes, "CheckpointLoaderSimple", "ckpt_name"):
            raise WorkerLost(f"it has no checkpoint {checkpoint}")
        self._checked = True

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
        names = _options(self._ask("/object_info/TAV_LoadMotion"), "TAV_LoadMotion", "file")
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
        """Queue a graph, unless it is on the server, and wait for its end; return its nodes' outputs."""
        if self._closed:
            raise WorkerDied("the study has ended")
        key = json.dumps(graph)
        # Known before it is sent, so that a graph can be stopped whose answer never came.
        self._running = self._queued.setdefault(key, str(uuid.uuid4()))
        try:
            if self._state(self._running) is None:
                sent = {"prompt": graph, "client_id": self._client, "prompt_id": self._running}
                self._running = self._queued[key] = self._ask("/prompt", sent).get("prompt_id", self._running)
            entry = self._awaited()
            del self._queued[key]
            return self._outputs(entry)
        finally:
            self._running = ""

    def _awaited(self) -> dict[str, Any]:
        """Return the server's history of the running graph, as soon as there is one."""
        missing = 0
        while missing < _FORGOTTEN:
            if self._closed:
                raise WorkerDied("the study has ended")
            time.sleep(_LOOK)
            state = self._state(self._running)
            if state:
                return state
            missing = missing + 1 if state is None else 0
        raise WorkerDied(f"{self.name} has forgotten the graph: it was started again")

    def _state(self, number: str) -> dict[str, Any] | None:
        """Return the history of a graph, {} while it is queued, None if the server does not know it."""
        history = self._ask(f"/history/{number}")
        if number in history:
            found: dict[str, Any] = history[number]
            return found
        queue = self._ask("/queue")
        known = {entry[1] for entry in (*queue["queue_running"], *queue["queue_pending"])}
        return {} if number in known else None

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
        content = self._request(f"/view?{query}")
        try:
            with Image.open(io.BytesIO(content)) as picture:
                return np.asarray(picture.convert("RGB"))
        except OSError as error:
            raise WorkerDied(f"{self.name} sends no picture ({error})") from error

    def _ask(self, path: str, sent: object = None) -> dict[str, Any]:
        """Ask for JSON. Raises as ``_request`` does, and WorkerDied for an answer that is none of a ComfyUI."""
        answer = self._request(path, None if sent is None else json.dumps(sent).encode())
        try:
            found = json.loads(answer)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise WorkerDied(f"{self.name} answers {path} as no ComfyUI does")
        return found

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
            said = f"{self.name} refuses {path}: {_body_of(error) or error}"
            # 500 and above is the server's own trouble, or that of a proxy before one that is gone.
            raise (EditFailed if error.code < 500 else WorkerDied)(said) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise WorkerDied(f"no answer from {self._url} ({error})") from error


def url_of(address: str) -> str:
    """Return the URL of HOST:PORT or of a URL, without a slash at its end. Raises ValueError for anything else."""
    url = (address if "://" in address else f"http://{address}").rstrip("/")
    parts = urllib.parse.urlsplit(url)
    try:
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        usable = False
    if not usable or set(url) & set(" \t\n?#"):
        raise ValueError(f"{address!r} is not HOST:PORT")
    return url


def _body_of(error: urllib.error.HTTPError) -> str:
    try:
        return error.read()[:2000].decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""


def _options(nodes: dict[str, Any], node: str, name: str) -> list[str]:
    """Return the choices of a combo input in the server's description of its nodes."""
    try:
        kind = nodes[node]["input"]["required"][name]
        found: list[str] = kind[0] if isinstance(kind[0], list) else kind[1].get("options", [])
        return found
    except (KeyError, IndexError, TypeError, AttributeError):
        return []


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


def _needed(settings: Settings) -> set[str]:
    """Return the node types of all graphs of a study."""
    job = Job("", CONTROLLED, "", "", Path(), Path(), Path())
    graphs = (tuning_graph(settings, "", "", ""), edit_graph(settings, "", job, "motion"))
    return {node["class_type"] for graph in graphs for node in graph.values()}


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
    prompt, extra = _node("CLIPTextEncode", clip=["model", 1], text=job.edit), {}
    positive, saved = ["edit", 0], ["decode", 0]
    if job.method == CONTROLLED:
        prompt = _node(
            "TAV_EditPrompt", clip=["model", 1], source=job.source, edit=job.edit, negative_prompt="empty prompt"
        )
        positive, extra = ["edit", 1], {"control": ["control", 0]}
        graph["control"] = _node("TAV_EditControl", preset=job.preset, strength=0.5)
        kept = {"destination": ["frames", 0], "source": ["decode", 0], "mask": ["sample", 1]}
        graph["kept"] = _node("ImageCompositeMasked", x=0, y=0, resize_source=False, **kept)
        saved = ["kept", 0]
    return {
        **graph,
        "invert": _node(
            "TAV_DDIMInvert",
            model=ready,
            latent=["latent", 0],
            conditioning=["source", 0],
            steps=settings.ddim_steps,
        ),
        "edit": prompt,
        "empty": _node("CLIPTextEncode", clip=["model", 1], text=""),
        "sample": _node(
            "TAV_Sample",
            model=ready,
            positive=positive,
            negative=["empty", 0],
            latent=["invert", 0],
            steps=settings.ddim_steps,
            guidance=settings.guidance,
            eta=0.0,
            seed=settings.seed,
            last_step="clip noise level",
            **extra,
        ),
        "decode": _node("VAEDecode", samples=["sample", 0], vae=["model", 2]),
        "save": _node("SaveImage", images=saved, filename_prefix="study/edit"),
    }
