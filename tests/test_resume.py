"""Runs that were cut off go on, to the same bits; files that cannot be trusted are left alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from tune_a_video.tav_core.inflate import Inflation
from tune_a_video.tav_core.tuning import checkpoint as resume
from tune_a_video.tav_core.tuning.trainer import TuneSettings
from tuning_runs import Result, assert_same, result_of, steps_of, trainer_of
from unets import UNETS, build_model

SETTINGS = TuneSettings(steps=5, learning_rate=1e-3, warmup_steps=3)


class StoppedError(Exception):
    pass


@pytest.fixture(autouse=True)
def on_the_server() -> Any:
    """Nodes run in inference mode."""
    with torch.inference_mode():
        yield


def latents() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def conditioning(seed: int = 1) -> list[Any]:
    return [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(seed)), {}]]


def tune(
    folder: Path | None, cancel_after: int = 0, interval: float = 60.0, **options: Any
) -> tuple[Result, list[int]]:
    """A run's result and the numbers of the steps it took; raises StoppedError after a step."""
    inputs = {"latents": latents(), "conditioning": conditioning(), "settings": SETTINGS, **options}
    model = inputs.pop("model", None) or build_model(UNETS["tiny"])
    taken: list[int] = []
    with trainer_of(model, **inputs) as trainer:
        with steps_of(trainer, folder, interval=interval) as steps:
            for step in steps:
                taken.append(step.number)
                if step.number == cancel_after:
                    raise StoppedError
        return result_of(trainer), taken


@pytest.fixture(scope="module")
def undisturbed() -> Result:
    with torch.inference_mode():
        return tune(None)[0]


@pytest.fixture(scope="module")
def half_way(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was cancelled after its third step."""
    folder = tmp_path_factory.mktemp("runs")
    with torch.inference_mode(), pytest.raises(StoppedError):
        tune(folder, cancel_after=3)
    return folder


def copy_of(folder: Path, to: Path) -> Path:
    """The one run of a folder, in another folder."""
    (source,) = folder.iterdir()
    return Path(shutil.copy(source, to))


def test_killed_and_cancelled_runs_end_with_the_weights_of_an_undisturbed_one(comfyui: Path | None) -> None:
    command = [sys.executable, Path(__file__).with_name("interrupted.py"), "--kills", "3", "--cancels", "2"]
    done = subprocess.run([*command, "--seed", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" 0 wrong") == 2


def test_a_cancelled_run_goes_on(half_way: Path, tmp_path: Path, undisturbed: Result) -> None:
    copy_of(half_way, tmp_path)
    result, taken = tune(tmp_path)
    assert taken == [4, 5]
    assert_same(result, undisturbed)
    # Nor is a finished one computed again: the host drops results of its cache when memory is short.
    result, taken = tune(tmp_path)
    assert taken == []
    assert_same(result, undisturbed)


@pytest.mark.parametrize("options", [{"precision": torch.float16}, {"precision": torch.bfloat16}])
def test_half_precision_goes_on_too(tmp_path: Path, options: dict[str, Any]) -> None:
    whole, _ = tune(None, **options)
    with pytest.raises(StoppedError):
        tune(tmp_path, cancel_after=2, **options)
    result, taken = tune(tmp_path, **options)
    assert taken == [3, 4, 5]
    assert_same(result, whole)


def test_a_run_that_goes_on_from_a_motion_goes_on(tmp_path: Path, undisturbed: Result) -> None:
    settings = replace(SETTINGS, train_scope="middle and up")
    whole, _ = tune(None, settings=settings, start=undisturbed[0])
    with pytest.raises(StoppedError):
        tune(tmp_path, cancel_after=4, settings=settings, start=undisturbed[0])
    result, taken = tune(tmp_path, settings=settings, start=undisturbed[0])
    assert taken == [5]
    assert_same(result, whole)


def test_stopped_within_an_update_it_goes_on_from_before(
    tmp_path: Path, undisturbed: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_update(*_: object) -> None:
        raise StoppedError

    with trainer_of(build_model(UNETS["tiny"]), latents(), conditioning(), SETTINGS) as trainer:
        with pytest.raises(StoppedError), steps_of(trainer, tmp_path, interval=0.0) as steps:
            for step in steps:
                if step.number == 3:
                    monkeypatch.setattr(trainer.optimizer, "step", in_update)
    result, taken = tune(tmp_path)
    assert taken == [4, 5]
    assert_same(result, undisturbed)


def with_lora() -> Any:
    """Changes a layer that is not trained."""
    model = build_model(UNETS["tiny"]).clone()
    key = "diffusion_model.middle_block.1.transformer_blocks.0.ff.net.2.weight"
    model.add_patches({key: ("diff", (torch.full((64, 256), 1e-3),))})
    return model


@pytest.mark.parametrize(
    "other",
    [
        lambda: {"latents": latents() + 1e-6},
        lambda: {"conditioning": conditioning(2)},
        lambda: {"settings": replace(SETTINGS, seed=1)},
        lambda: {"inflation": Inflation(pool_group_norm=False)},
        lambda: {"precision": torch.bfloat16},
        lambda: {"model": build_model(UNETS["tiny"], seed=1)},
        lambda: {"model": build_model(UNETS["tiny"], prediction="v")},
        lambda: {"model": with_lora()},
    ],
    ids=["latents", "prompt", "seed", "inflation", "precision", "model", "prediction", "lora"],
)
def test_a_run_with_other_inputs_is_another_run(
    half_way: Path, tmp_path: Path, other: Callable[[], dict[str, Any]]
) -> None:
    copy_of(half_way, tmp_path)
    with pytest.raises(StoppedError):
        tune(tmp_path, cancel_after=1, **other())


def flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-7],
        lambda data: data[:100],
        lambda data: flip(data, len(data) // 2),
        lambda data: flip(data, 4),
        lambda data: data.replace(b"exp_avg_sq", b"exp_avg_xx"),
        lambda data: data.replace(resume.FORMAT.encode(), b"tune-a-video run 0"),
        lambda data: b"\x80\x04\x95" + data,
    ],
    ids=["empty", "cut short", "header alone", "one bit", "length", "names", "older format", "pickle"],
)
def test_a_damaged_file_is_left_alone(
    half_way: Path,
    tmp_path: Path,
    undisturbed: Result,
    damage: Callable[[bytes], bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = copy_of(half_way, tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    result, taken = tune(tmp_path)
    assert "is damaged" in caplog.text and taken == [1, 2, 3, 4, 5]
    assert_same(result, undisturbed)


def test_another_runs_file_is_left_alone(half_way: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = copy_of(half_way, tmp_path)
    other = resume.RunFile(tmp_path / "other.safetensors", "other")
    path.rename(other.path)
    assert other.read() is None and "its run is another" in caplog.text


def test_a_folder_that_cannot_be_written_to_stops_nothing(
    tmp_path: Path, undisturbed: Result, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    result, _ = tune(tmp_path / "file" / "runs", interval=0.0)
    assert "cannot be written" in caplog.text
    assert_same(result, undisturbed)


def test_old_runs_and_leftovers_go(tmp_path: Path) -> None:
    def file(name: str, age: float) -> Path:
        path = tmp_path / name
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
        return path

    run, theirs, old = ("ab" * 32, "cd" * 32, "ef" * 32)
    ours = resume.RunFile(tmp_path / f"{run}.safetensors", run)
    kept = [file(f"{run}.safetensors", resume.KEPT_FOR + 60), file(f"{theirs}.safetensors", 60)]
    kept += [file(f".{theirs}.part", 60), file("notes.txt", 2 * resume.KEPT_FOR)]
    # A user's other files there stay.
    kept.append(file("sd15.safetensors", 2 * resume.KEPT_FOR))
    file(f"{old}.safetensors", resume.KEPT_FOR + 60)
    file(f".{run}x1.part", 0)
    (tmp_path / f".{run}x2.part").mkdir()
    file(f".{run}x2.part/motion", 0)
    ours.tidy()
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    kept[1].unlink()
    for age in range(resume.KEPT_RUNS + 2):
        file(f"{age:064}.safetensors", age + 1)
    ours.tidy()
    names = {path.name for path in tmp_path.glob("[!.]*.safetensors")}
    newest = (f"{age:064}.safetensors" for age in range(resume.KEPT_RUNS))
    assert names == {f"{run}.safetensors", "sd15.safetensors", *newest}


def test_writing_takes_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, writes = 1000.0, 0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def slow(*_: object) -> None:
        nonlocal now, writes
        now += 10.0
        writes += 1

    def written_after(seconds: float) -> bool:
        nonlocal now
        now += seconds
        before = writes
        checkpoint.save_if_due()
        return writes > before

    monkeypatch.setattr(resume, "write_safetensors", slow)
    with trainer_of(build_model(UNETS["tiny"]), latents(), conditioning(), SETTINGS) as trainer:
        checkpoint = resume.Checkpoint(tmp_path, trainer)
        next(iter(trainer))
        assert not written_after(59.0)
        assert written_after(1.0)
        assert not written_after(199.0)
        assert written_after(1.0)


def test_a_fingerprint_is_of_names_types_shapes_and_bytes() -> None:
    x = torch.arange(4.0)
    same = resume.fingerprint({"a": 1}, [("x", x)])
    assert same == resume.fingerprint({"a": 1}, [("x", x.clone())])
    others = [("y", x), ("x", x.double()), ("x", x.reshape(2, 2)), ("x", x + 1), ("x", x.view(torch.int32))]
    assert len({same, *(resume.fingerprint({"a": 1}, [other]) for other in others)}) == 6
    assert resume.fingerprint({"a": 2}, [("x", x)]) != same
