"""Memory that is RAM: what a tuning takes is held against what is free, container limits included."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tune_a_video.tav_core import host
from tune_a_video.tav_core.host import cgroup
from tune_a_video.tav_core.out_of_memory import OutOfMemoryError
from tune_a_video.tav_core.tuning import trainer as trainer_module
from tune_a_video.tav_core.tuning.trainable import TRAIN_SCOPES, TrainScope, frozen_bytes, trained_bytes
from tune_a_video.tav_core.tuning.trainer import TuneSettings
from tuning_runs import run, trainer_of
from unets import UNETS, build_model

GIB = 2**30
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
CONDITIONING: list[Any] = [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1)), {}]]


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_version_2_counts_the_tightest_group_and_reclaimable_files(tmp_path: Path) -> None:
    (tmp_path / "self").write_text("0::/pod/box\n")
    write(tmp_path / "pod", memory__max=f"{8 * GIB}\n", memory__current=f"{6 * GIB}\n")
    write(tmp_path / "pod", memory__stat=f"anon 5\ninactive_file {GIB}\n")
    write(tmp_path / "pod" / "box", memory__max="max\n", memory__current="1\n", memory__stat="inactive_file 0\n")
    assert cgroup.memory_left(tmp_path / "self", tmp_path) == 3 * GIB


def test_version_1_and_a_container_that_sees_the_root_alone(tmp_path: Path) -> None:
    (tmp_path / "self").write_text("5:cpu,cpuacct:/\n4:memory:/docker/0123\n0::/\n")
    write(tmp_path / "memory", memory__limit_in_bytes=f"{4 * GIB}", memory__usage_in_bytes=f"{2 * GIB}")
    write(tmp_path / "memory", memory__stat=f"inactive_file 7\ntotal_inactive_file {GIB}\n")
    assert cgroup.memory_left(tmp_path / "self", tmp_path) == 3 * GIB


def test_without_limits_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "self").write_text("0::/\n")
    assert cgroup.memory_left(tmp_path / "self", tmp_path) == math.inf
    assert cgroup.memory_left(tmp_path / "nowhere", tmp_path) == math.inf


def test_free_memory_is_within_the_containers_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "memory_left", lambda: 1234.0)
    assert host.free_memory(torch.device("cpu")) == 1234.0


@pytest.mark.parametrize("rank", [0, 4, 128])
@pytest.mark.parametrize("scope", TRAIN_SCOPES)
def test_what_learns_is_reckoned_as_it_is_built(scope: TrainScope, rank: int) -> None:
    settings = TuneSettings(train_scope=scope, rank=rank)
    with trainer_of(build_model(UNETS["tiny"]), LATENTS, CONDITIONING, settings, torch.bfloat16) as trainer:
        unet = trainer.unet.module
        assert trained_bytes(unet, scope, rank) == sum(value.nbytes for value in trainer.trained.values())
        frozen = [value for name, value in trainer._weights.temporal.named_buffers() if name.endswith("frozen")]
        assert frozen_bytes(unet, scope, rank, torch.bfloat16) == sum(value.nbytes for value in frozen)


def test_fixed_memory_is_refused_before_it_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(UNETS["tiny"])
    needed = 4 * trained_bytes(host.unet_of(model), "all")
    built: list[Any] = []
    weights = trainer_module.trainable_weights

    def counted(*given: Any) -> Any:
        built.append(given)
        return weights(*given)

    monkeypatch.setattr(trainer_module, "trainable_weights", counted)
    monkeypatch.setattr(host, "free_memory", lambda device: needed - 1)
    with (
        pytest.raises(OutOfMemoryError, match=r"train_scope: all takes .* Set it to middle and up .*set rank to 32"),
        trainer_of(model, LATENTS, CONDITIONING, TuneSettings()),
    ):
        pass
    monkeypatch.setattr(host, "free_memory", lambda device: 1)
    with (
        pytest.raises(OutOfMemoryError, match=r"train_scope: middle and up takes .* free\. Close what else"),
        trainer_of(model, LATENTS, CONDITIONING, TuneSettings(train_scope="middle and up", rank=4)),
    ):
        pass
    assert not built


def test_a_clip_that_does_not_fit_into_ram_is_refused_before_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(UNETS["tiny"])
    free = 4 * trained_bytes(host.unet_of(model), "all")
    monkeypatch.setattr(host, "free_memory", lambda device: free)
    long = LATENTS[:1].repeat(64, 1, 2, 2)
    with (
        trainer_of(model, long, CONDITIONING, TuneSettings(steps=1)) as trainer,
        pytest.raises(OutOfMemoryError, match=r"latent: tuning on it takes .* GiB .* fewer frames"),
    ):
        run(trainer)
    with trainer_of(model, LATENTS, CONDITIONING, TuneSettings(steps=1)) as trainer:
        run(trainer)
        assert trainer.done == 1
