"""Moving pictures in a node: previews while it runs, and a clip of its result."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import folder_paths
import latent_preview
from comfy_api.latest import io, ui
from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from ...tav_core import host
from ...tav_core.media.encode import save_clip
from .said import say

# A picture as the host sends it: format, picture, size that it is scaled to.
Picture = tuple[str, Image.Image, int | None]

# The frame rate of the paper's clips.
FRAMES_PER_SECOND = 8.0
# At most this share of the time is spent on decoding frames for previews.
_SHARE_OF_TIME = 0.05


class MovingPreview:
    """A node's progress bar with pictures below it, which change while the context lasts.

    The host shows one picture for each progress message, and a step can take seconds, so a thread sends the pictures
    between steps. The thread ignores a cancelled run; ``update`` and ``show`` raise in the node's own thread.
    """

    def __init__(self, total: int, frames_per_second: float = FRAMES_PER_SECOND) -> None:
        self.bar = host.progress_bar(total)
        self._total, self._seconds = total, 1 / frames_per_second
        self._done = self._turn = 0
        self._pictures: Sequence[Picture] = ()
        context = get_executing_context()
        self._node = None if context is None else context.node_id
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> MovingPreview:
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def update(self, done: int) -> None:
        """Move the bar to ``done`` steps. Raises if the user cancelled."""
        with self._lock:
            self._done = done
        self.bar.update_absolute(done, self._total)

    def show(self, done: int, pictures: Sequence[Picture]) -> None:
        """Move the bar to ``done`` steps and replace the pictures. Raises if the user cancelled."""
        if not pictures:
            self.update(done)
            return
        with self._lock:
            self._done, self._pictures = done, pictures
            self._turn %= len(pictures)
            picture = pictures[self._turn]
        # Sent through the bar too, for clients without previews in nodes.
        self.bar.update_absolute(done, self._total, picture)
        if self._thread is None and self._node is not None and len(pictures) > 1:
            self._thread = threading.Thread(target=self._play, name="tune-a-video-preview", daemon=True)
            self._thread.start()

    def _play(self) -> None:
        while not self._ended.wait(self._seconds):
            with self._lock:
                self._turn = (self._turn + 1) % len(self._pictures)
                get_progress_state().update_progress(self._node, self._done, self._total, self._pictures[self._turn])


class LatentFrames:
    """Decode a LATENT's frames to pictures with the user's preview method; no pictures for "none".

    ``anyway``: decode small coloured pictures even for "none".
    """

    def __init__(self, model: Any, anyway: bool = False) -> None:
        latent_format = model.model.latent_format
        self._colours = None
        # A pack that shows frames by itself would show a reconstruction in the place of the loss curve.
        get_previewer = inspect.unwrap(latent_preview.get_previewer) if anyway else latent_preview.get_previewer
        if anyway and latent_format.latent_rgb_factors is not None:
            self._colours = latent_preview.Latent2RGBPreviewer(
                latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias
            )
        self._previewer = get_previewer(model.load_device, latent_format) or self._colours
        self._latest: dict[int, Picture] = {}
        self._next, self._seen = 0, time.monotonic()

    def all(self, x0: Tensor) -> list[Picture]:
        """Decode every frame of x0 [frames, c, h, w], in the UNet's scale."""
        for previewer in (self._previewer, self._colours):
            found = [_decode(previewer, x0, frame) for frame in range(len(x0))]
            if all(picture is not None for picture in found):
                break
        return [picture for picture in found if picture is not None]

    def refreshed(self, x0: Tensor) -> list[Picture]:
        """Decode as many frames of x0 as the time allows, and return them in order with the older ones of the rest."""
        previewer = self._previewer
        if previewer is None:
            return []
        now = time.monotonic()
        until = now + _SHARE_OF_TIME * (now - self._seen)
        self._seen = now
        for _ in range(len(x0)):
            # All frames as long as there are no pictures: a previewer that shows them by itself (VideoHelperSuite's
            # animation) learns how many there are. The host's own decode the first of them.
            given = x0[self._next : self._next + 1] if self._latest else x0
            picture = previewer.decode_latent_to_preview_image("JPEG", given)
            if picture is None:
                break
            self._latest[self._next] = picture
            self._next = (self._next + 1) % len(x0)
            if time.monotonic() > until:
                break
        return [self._latest[frame] for frame in sorted(self._latest)]


def _decode(previewer: Any, x0: Tensor, frame: int) -> Picture | None:
    return previewer and previewer.decode_latent_to_preview_image("JPEG", x0[frame : frame + 1])


def sampling_callback(
    model: Any, preview: MovingPreview, cost: Callable[[], str] | None = None
) -> Callable[[int, Tensor, Tensor, int], None]:
    """Return a callback for the host's samplers that shows progress and the frames so far.

    ``cost``: gives a line that the node shows after the first step.
    """
    frames = LatentFrames(model)

    def callback(step: int, x0: Tensor, x: Tensor, total_steps: int) -> None:
        if cost is not None and step == 0:
            say(cost())
        preview.show(step + 1, frames.refreshed(x0))

    return callback


def temporary_video(images: Tensor, fps: float, name: str) -> ui.PreviewVideo:
    """Write frames [frames, h, w, 3] to an mp4 in the temp folder, and return it for the node to play."""
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(name, folder_paths.get_temp_directory())
    path = Path(folder, f"{name}_{counter:05}_.mp4")
    save_clip(images, fps, path)
    return ui.PreviewVideo([ui.SavedResult(path.name, subfolder, io.FolderType.temp)])
