"""A cancel is heard in every phase of every node, also where no sampler and no progress bar runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import pack_nodes
import pytest
import torch
from tune_a_video.tav_core import cancel
from tune_a_video.tav_core.media import encode, process
from tune_a_video.tav_core.motion.file import Motion
from tune_a_video.tav_core.motion.low_rank import SEED_KEY
from unets import UNETS, build_model

pytestmark = pytest.mark.comfyui

Interrupted = comfy.model_management.InterruptProcessingException
FRAMES = torch.rand(3, 32, 32, 3, generator=torch.Generator().manual_seed(0))
# A wait for another program ends within seconds of the cancel; the program itself would run for a minute.
SOON = 20


@pytest.fixture(autouse=True)
def on_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nodes run in inference mode, and write below ``tmp_path``."""
    import folder_paths

    assert pack_nodes.SaveMotion is not None  # makes the folder known
    for kind in ("input", "output", "temp"):
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
        (tmp_path / kind).mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "tav", ([str(tmp_path / "tav")], {".safetensors"}))
    with torch.inference_mode():
        yield
    comfy.model_management.interrupt_current_processing(False)


def node(name: str) -> Any:
    hidden = SimpleNamespace(prompt={}, unique_id="1", extra_pnginfo=None)
    return type(name, (getattr(pack_nodes, name),), {"hidden": hidden})


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def evaluate() -> None:
    node("EvaluateVideo").execute(FRAMES, FRAMES.flip(0))


def compare() -> None:
    node("CompareVideos").execute(FRAMES, FRAMES.flip(0))


def save() -> None:
    node("SaveVideo").execute(FRAMES, 8.0, "clip", "mp4", 80)


def save_at_a_rank() -> None:
    tensors = {f"block.{name}.to_q.diff": torch.randn(64, 64) for name in ("attn1", "attn2")}
    node("SaveMotion").execute(Motion(tensors, {SEED_KEY: "0"}), "motion", 4)


def tune() -> None:
    latent = {"samples": torch.randn(2, 4, 8, 8)}
    conditioning = [[torch.randn(1, 7, 32), {}]]
    node("OneShotTune").execute(
        build_model(UNETS["tiny"]), latent, conditioning, 2, 1e-3, 0, "all", "fp32", 0, 1.0, preview_every=0
    )


@pytest.mark.parametrize("work", [evaluate, compare, save, save_at_a_rank, tune])
def test_a_cancel_ends_a_node_in_its_first_phase(work: Callable[[], None], tmp_path: Path) -> None:
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(Interrupted):
        work()
    assert files(tmp_path) == []
    # The host's flag is down again, and the next run is whole.
    work()


class Checks:
    """A check that counts, and raises at the ``at``-th call."""

    def __init__(self, at: int = -1) -> None:
        self.count, self.at = 0, at

    def __call__(self) -> None:
        self.count += 1
        if self.count == self.at:
            raise Interrupted


@pytest.mark.parametrize("work", [evaluate, compare, save, save_at_a_rank, tune])
def test_a_cancel_in_any_phase_leaves_nothing(
    work: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def checked_as(check: Checks) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", check)
            work()

    checks = Checks()
    checked_as(checks)
    assert checks.count >= 2
    for path in files(tmp_path):
        path.unlink()
    # A tuning may have ended a step before: its state is kept on purpose.
    for at in {1, checks.count // 2 + 1, checks.count}:
        with pytest.raises(Interrupted):
            checked_as(Checks(at))
        assert [path for path in files(tmp_path) if ".tune-a-video" not in path.parts] == []


@contextmanager
def cancelled_soon() -> Iterator[None]:
    """The user cancels after half a second; what is inside ends with that, not with the program that it waits for."""
    timer = threading.Timer(0.5, comfy.model_management.interrupt_current_processing)
    began = time.monotonic()
    timer.start()
    try:
        with pytest.raises(Interrupted):
            yield
    finally:
        timer.cancel()
    assert time.monotonic() - began < SOON


def test_a_cancel_is_heard_while_a_reader_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = tmp_path / "hangs.py"
    hangs.write_text("import time\ntime.sleep(60)\n")
    (tmp_path / "input" / "clip.mp4").write_bytes(b"clip")
    monkeypatch.setattr(process, "READER", str(hangs))
    threads = threading.active_count()
    with cancelled_soon():
        node("LoadVideo").execute("clip.mp4", 0.0, "seconds", 2, 1, 16, 16, "stretch")
    assert threading.active_count() <= threads


@pytest.fixture
def slow_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An encoder that takes all frames and does not end."""
    slow = tmp_path / "ffmpeg"
    slow.write_text("#!/bin/sh\ncat > /dev/null\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(encode, "_ffmpeg", lambda: str(slow))
    return slow


@pytest.mark.parametrize("format", ["mp4", "gif"])
def test_a_cancel_is_heard_while_the_encoder_has_all_frames(format: str, tmp_path: Path, slow_ffmpeg: Path) -> None:
    with cancelled_soon():
        node("SaveVideo").execute(FRAMES, 8.0, "clip", format, 80)
    assert files(tmp_path) == [slow_ffmpeg]


def test_an_encoder_that_never_ends_is_one_sentence(
    tmp_path: Path, slow_ffmpeg: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "ENCODE_LIMIT", 0.5)
    with pytest.raises(RuntimeError, match=r"did not finish clip.mp4 within .* Save fewer frames at a time"):
        encode.save_clip(FRAMES, 8.0, tmp_path / "clip.mp4")
    assert files(tmp_path) == [slow_ffmpeg]


def test_outside_of_a_node_nothing_is_cancelled() -> None:
    cancel.raise_if_cancelled()
