"""Moving pictures in a node: while it works, and of what came out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
import latent_preview
from comfy_api.latest import io, ui
from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from ...tav_core.media.encode import save_clip

# A picture as the host sends it: format, picture, the size that it is scaled to.
Picture = tuple[str, Image.Image, int | None]

# As many pictures a second as the paper's clips have.
FRAMES_PER_SECOND = 8.0
# At most this share of the time goes into decoding frames to be looked at.
_SHARE_OF_TIME = 0.05


class MovingPreview:
    """A node's progress bar, and below it pictures that take turns for as long as the context lasts.

    The host shows one picture for each progress message, and a step may take seconds: so a thread sends the pictures
    between the steps. It says nothing of a cancelled run; that is for ``update``, in the node's own thread.
    """

    def __init__(self, total: int, frames_per_second: float = FRAMES_PER_SECOND) -> None:
        self.bar = comfy.utils.ProgressBar(total)
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
        """Move the bar to ``done`` steps. Raises when the user cancels."""
        with self._lock:
            self._done = done
        self.bar.update_absolute(done, self._total)

    def show(self, done: int, pictures: Sequence[Picture]) -> None:
        """The same, with new pictures in the place of those before. Raises when the user cancels."""
        if not pictures:
            self.update(done)
            return
        with self._lock:
            self._done, self._pictures = done, pictures
            self._turn %= len(pictures)
            picture = pictures[self._turn]
        # Through the bar too: it is the way to clients that know nothing of nodes' own previews.
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
    """The frames of a LATENT as pictures, by the preview method that the user has chosen; none for "none".

    ``anyway``: small coloured pictures even so.
    """

    def __init__(self, model: Any, anyway: bool = False) -> None:
        latent_format = model.model.latent_format
        self._previewer = latent_preview.get_previewer(model.load_device, latent_format)
        if self._previewer is None and anyway and latent_format.latent_rgb_factors is not None:
            self._previewer = latent_preview.Latent2RGBPreviewer(
                latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias
            )
        self._latest: dict[int, Picture] = {}
        self._next, self._seen = 0, time.monotonic()

    def all(self, x0: Tensor) -> list[Picture]:
        """Every frame of x0 [frames, c, h, w], in the UNet's scale."""
        found = [self._decode(x0, frame) for frame in range(len(x0))]
        return [picture for picture in found if picture is not None]

    def refreshed(self, x0: Tensor) -> list[Picture]:
        """What is known of the frames, in order: as many as the time allows are of this x0, the others of earlier."""
        now = time.monotonic()
        until = now + _SHARE_OF_TIME * (now - self._seen)
        self._seen = now
        for _ in range(len(x0)):
            picture = self._decode(x0, self._next)
            if picture is not None:
                self._latest[self._next] = picture
            self._next = (self._next + 1) % len(x0)
            if time.monotonic() > until:
                break
        return [self._latest[frame] for frame in sorted(self._latest)]

    def _decode(self, x0: Tensor, frame: int) -> Picture | None:
        if self._previewer is None:
            return None
        return self._previewer.decode_latent_to_preview_image("JPEG", x0[frame : frame + 1])


def sampling_callback(model: Any, preview: MovingPreview) -> Callable[[int, Tensor, Tensor, int], None]:
    """For a sampler of the host's: progress, and the frames as they become."""
    frames = LatentFrames(model)

    def callback(step: int, x0: Tensor, x: Tensor, total_steps: int) -> None:
        preview.show(step + 1, frames.refreshed(x0))

    return callback


def temporary_video(images: Tensor, fps: float, name: str) -> ui.PreviewVideo:
    """Frames [frames, h, w, 3] as an mp4 of the temp folder, which plays in the node."""
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(name, folder_paths.get_temp_directory())
    path = Path(folder, f"{name}_{counter:05}_.mp4")
    save_clip(images, fps, path)
    return ui.PreviewVideo([ui.SavedResult(path.name, subfolder, io.FolderType.temp)])
