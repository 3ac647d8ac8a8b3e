"""Disks that are full or not to be written to, and names that lead elsewhere: told before the work, or without harm."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from tune_a_video.tav_core.media import encode
from tune_a_video.tav_core.motion import file as weights
from tune_a_video.tav_core.motion.file import Motion
from tune_a_video.tav_core.tuning import checkpoint as resume
from tune_a_video.tav_core.tuning.trainer import TuneSettings
from tuning_runs import Result, assert_same, run, trainer_of
from unets import UNETS, build_model

# Noise, which no encoder makes much smaller: several megabytes.
FRAMES = torch.rand(8, 512, 512, 3, generator=torch.Generator().manual_seed(0))
MOTION = Motion({"x": torch.zeros(2**20, dtype=torch.float16)})
SETTINGS = TuneSettings(steps=3, learning_rate=1e-3)
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
CONDITIONING = [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1)), {}]]
MOUNT, UNMOUNT = shutil.which("mount") or "", shutil.which("umount") or ""
MAY_MOUNT = sys.platform == "linux" and os.geteuid() == 0 and bool(MOUNT)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not MAY_MOUNT:
        pytest.skip("mounting a small disk takes root; the tests by name, below, inject what it would say")
    subprocess.run([MOUNT, "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run([UNMOUNT, folder], check=True)


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The nodes that write, on folders of their own; ``place(folder)`` has them write elsewhere."""
    import folder_paths
    from tune_a_video.nodes import load_motion, save_motion, save_video, tune
    from tune_a_video.nodes.support import paths

    def place(folder: Path) -> None:
        for kind in ("input", "output", "temp"):
            monkeypatch.setattr(folder_paths, f"{kind}_directory", str(folder))
        monkeypatch.setitem(folder_paths.folder_names_and_paths, "tav", ([str(folder)], {".safetensors"}))

    place(tmp_path)
    hidden = {"hidden": SimpleNamespace(prompt=None, unique_id="1", extra_pnginfo=None)}
    return SimpleNamespace(
        place=place,
        paths=paths,
        save_video=type("SaveVideo", (save_video.SaveVideo,), hidden),
        save=save_motion.SaveMotion,
        load=load_motion.LoadMotion,
        tune=type("OneShotTune", (tune.OneShotTune,), hidden),
    )


def tune(folder: Path | None, **options: Any) -> Result:
    with torch.inference_mode(), trainer_of(build_model(UNETS["tiny"]), LATENTS, CONDITIONING, SETTINGS) as trainer:
        return run(trainer, folder, **options)


# --- a real small disk -----------------------------------------------------------------------------------


@pytest.mark.comfyui
def test_a_full_disk_is_told_before_anything_runs(nodes: SimpleNamespace, small_disk: Path) -> None:
    nodes.place(small_disk)
    for node in (nodes.save_video, nodes.save):
        for prefix in ("clip", "new/folder/clip", None):
            said = node.validate_inputs(filename_prefix=prefix)
            assert re.match(r"the disk of .*disk is full: 1 MiB are left, and 32 MiB are needed. Make room", said), said
    assert not files(small_disk)


@pytest.mark.comfyui
@pytest.mark.parametrize("kind", ["mp4", "webm", "gif"])
def test_a_disk_that_fills_up_while_a_video_is_written(nodes: SimpleNamespace, small_disk: Path, kind: str) -> None:
    nodes.place(small_disk)
    with pytest.raises(RuntimeError, match="^filename_prefix: the disk is full, and no file was written. Make room"):
        nodes.save_video.execute(FRAMES, 8.0, "sub/clip", kind, 100)
    assert not files(small_disk)


@pytest.mark.comfyui
def test_a_disk_that_fills_up_while_a_motion_is_written(
    nodes: SimpleNamespace, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes.place(small_disk)
    with pytest.raises(ValueError, match="^filename_prefix: the disk of .* is full: 1 MiB are left, and 2 MiB"):
        nodes.save.execute(MOTION, "motion")
    from tune_a_video.nodes import save_motion

    monkeypatch.setattr(save_motion, "check_room", lambda *_: None)
    with pytest.raises(RuntimeError, match="^filename_prefix: the disk is full, and no file was written. Make room"):
        nodes.save.execute(MOTION, "motion")
    assert not files(small_disk)


def test_a_tuning_on_a_full_disk_says_at_its_start_that_no_state_is_kept(small_disk: Path) -> None:
    said: list[str] = []
    (small_disk / "fill").write_bytes(bytes(900_000))
    with torch.inference_mode(), trainer_of(build_model(UNETS["tiny"]), LATENTS, CONDITIONING, SETTINGS) as trainer:
        result = run(
            trainer, small_disk / "runs", interval=0.0, warn=lambda text: said.append(f"{trainer.done}: {text}")
        )
    assert_same(result, tune(None))
    assert re.match(
        r"0: this run's state cannot be kept in .*runs \(0 MiB are left on the disk, .*starts again from the beginning",
        said[0],
    )
    assert any("cannot be written" in text for text in said[1:])
    assert files(small_disk) == [small_disk / "fill"], "half a state"


@pytest.mark.comfyui
def test_a_disk_that_cannot_be_written_to_is_told_before_anything_runs(
    nodes: SimpleNamespace, small_disk: Path
) -> None:
    subprocess.run([MOUNT, "-o", "remount,ro", small_disk], check=True)
    nodes.place(small_disk)
    for node in (nodes.save_video, nodes.save):
        said = node.validate_inputs(filename_prefix="new/clip")
        assert re.match(r".*disk cannot be written to. Allow it to the account that runs ComfyUI, or start", said), said
    with pytest.raises(RuntimeError, match="^filename_prefix: the folder cannot be written to. Allow it"):
        nodes.save_video.execute(FRAMES[:1], 8.0, "new/clip", "mp4", 80)
    said = []
    assert_same(tune(small_disk, warn=said.append), tune(None))
    assert "cannot be kept" in said[0] and "Read-only" in said[0]


# --- by name ---------------------------------------------------------------------------------------------


@pytest.mark.comfyui
def test_room_and_rights_are_asked_of_the_folder_that_is_there(
    nodes: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = nodes.save_video.validate_inputs
    assert check(filename_prefix="a/b/clip") is True and not files(tmp_path) and not (tmp_path / "a").exists()
    assert check(filename_prefix="../clip").startswith("'../clip' leaves the folder")
    (tmp_path / "file").touch()
    assert "file cannot be written to" in check(filename_prefix="file/clip")
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: asked.append((path, mode)))
        assert "cannot be written to" in check(filename_prefix="a/b/clip")
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
        assert "is full: 1 MiB are left" in check(filename_prefix=None)
        with pytest.raises(ValueError, match="2 MiB are needed"):
            nodes.save.execute(MOTION, "motion")
    assert check(filename_prefix=None) is True


@pytest.mark.comfyui
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "the disk is full"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "the disk is full"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "the folder cannot be written to"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "the folder cannot be written to"),
        (NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)), "the folder cannot be written to"),
    ],
    ids=["ENOSPC", "EDQUOT", "safetensors", "EROFS", "EACCES", "ENOTDIR"],
)
def test_what_the_system_says_of_a_disk_is_said_with_a_remedy(
    nodes: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match=f"^filename_prefix: {message}.*queue again"):
        patch.setattr(weights.safetensors.torch, "save_file", fail)
        nodes.save.execute(MOTION, "motion")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match=f"^filename_prefix: {message}.*queue again"):
        patch.setattr(encode, "_run_encoder", fail)
        nodes.save_video.execute(FRAMES[:1, :16, :16], 8.0, "clip", "mp4", 80)
    assert not files(tmp_path)


def test_ffmpegs_own_words_on_a_full_disk_are_found(tmp_path: Path) -> None:
    log = open(tmp_path / "log", "wb+")  # noqa: SIM115
    with log:
        log.write(b"[mp4 @ 0x1] Error writing trailer: No space left on device\nConversion failed!\n")
        error = encode._encoder_error("clip.mp4", 1, log)
    assert isinstance(error, OSError) and error.errno == errno.ENOSPC


def test_a_state_that_is_there_already_takes_its_room_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = resume.RunFile(tmp_path / "run.safetensors", "run")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=150))
    assert "MiB are needed" in file.trouble(100)
    file.path.touch()
    assert not file.trouble(100)


# --- names that lead elsewhere ---------------------------------------------------------------------------


@pytest.mark.comfyui
def test_state_is_not_kept_where_a_link_leads_out_of_the_output_folder(
    nodes: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Old files are removed from that folder: it must not be somebody's models folder."""
    output, elsewhere = tmp_path / "output", tmp_path / "elsewhere"
    output.mkdir()
    elsewhere.mkdir()
    theirs = elsewhere / f"{'ab' * 32}.safetensors"
    theirs.touch()
    os.utime(theirs, (0, 0))
    nodes.place(output)
    arguments = (build_model(UNETS["tiny"]), {"samples": LATENTS}, CONDITIONING, 2, 1e-3, 0, "all", "auto", 0, 1.0)
    with torch.inference_mode():
        (output / ".tune-a-video").symlink_to(elsewhere)
        expected = nodes.tune.execute(*arguments).result[1]
        assert files(elsewhere) == [theirs] and "leads out of the output folder" in caplog.text
        (output / ".tune-a-video").unlink()
        again = nodes.tune.execute(*arguments).result[1]
    assert len(files(output / ".tune-a-video")) == 1
    assert all(torch.equal(value, again.tensors[key]) for key, value in expected.tensors.items())


GOOD = (
    "clip",
    "사람/스키",
    "Лыжник/прыжок",
    "اسم/مقطع",
    "滑雪 の 人/動画",
    "a.b/c.d",
    "%year%/clip",
    "con-1/x",
    "é" * 99,
)
BAD = (
    "../x",
    "a/../../x",
    "/x",
    "//server/share/x",
    "a\0b",
    "a\nb",
    "x" * 300,
    "名" * 100,
    "a/" * 500 + "b",
    "CON/x",
    "con.txt/x",
    "Com1/x",
    "LPT¹/x",
    "CONIN$/x",
    "folder./x",
    "folder /x",
    ".. /x",
    "a\\..\\..\\x/../../../x",
    "\ud800",
)
BAD_ON_WINDOWS = ("C:x", "C:\\x", "c:/x", "clip:stream", "a?", "a|b", 'a"b', "<a>", "a*")


@pytest.mark.comfyui
def test_names_that_every_system_takes(nodes: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for prefix in GOOD:
        folder, name, _ = nodes.paths.next_name(prefix, str(root), "ski")
        assert Path(folder).is_relative_to(root)
        Path(folder, f"{name}.safetensors").touch()
    for prefix in BAD:
        with pytest.raises(ValueError, match="^filename_prefix: .*(Give a name such as ski|Type it again)"):
            nodes.paths.check_prefix(prefix, str(root), "ski")
    monkeypatch.setattr(nodes.paths, "_WINDOWS", True)
    for prefix in BAD_ON_WINDOWS:
        with pytest.raises(ValueError, match="^filename_prefix: .*not a name that every system takes"):
            nodes.paths.check_prefix(prefix, str(root), "ski")
    assert {path.parent.parent for path in files(tmp_path)} <= {root, tmp_path}


@pytest.mark.comfyui
def test_a_motion_is_loaded_from_its_folder_alone(nodes: SimpleNamespace, tmp_path: Path) -> None:
    folder = tmp_path / "tav"
    folder.mkdir()
    weights.save_motion(MOTION, tmp_path / "outside.safetensors")
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    nodes.place(folder)
    outside = str(tmp_path / "outside.safetensors")
    names = ("../outside.safetensors", outside, "a/../../outside.safetensors", "C:\\outside.safetensors", "a\0b")
    kinds = ("folder.safetensors", "pipe.safetensors", "", ".", "스키.safetensors", "\ud800", "x" * 300, None, 5)
    for name in (*names, *kinds):
        with pytest.raises(ValueError, match="^file: .* is not in the models folder tav"):
            nodes.load.execute(name)
        assert nodes.load.fingerprint_inputs(name) == ""
