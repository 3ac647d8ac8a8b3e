"""Allocations that fail: every one ends in the same result with less memory, or in words; nothing stays behind.

The torch work is run with a mode that fails at the n-th operation, whatever it is, so no place is forgotten; n goes
over the whole of it in even steps. Around the torch work, functions that allocate are made to fail by name.
"""

from __future__ import annotations

import errno
import gc
import itertools
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from tune_a_video.tav_core import host, out_of_memory, schedule
from tune_a_video.tav_core.host import inflated_model
from tune_a_video.tav_core.inflate import Inflation
from tune_a_video.tav_core.invert import ddim_invert
from tune_a_video.tav_core.media import decode, encode, pictures
from tune_a_video.tav_core.media.clip import load_clip
from tune_a_video.tav_core.media.process import CannotReadError
from tune_a_video.tav_core.motion import file as weights
from tune_a_video.tav_core.motion import low_rank
from tune_a_video.tav_core.motion.file import Motion
from tune_a_video.tav_core.out_of_memory import OutOfMemoryError, is_out_of_memory
from tune_a_video.tav_core.sample import ddim_sample
from tune_a_video.tav_core.tuning import checkpoint, memory_probe
from tune_a_video.tav_core.tuning.trainer import Trainer, TuneSettings
from tune_a_video.tav_core.tuning.training_unet import TrainingUNet
from tuning_runs import Result, run, trainer_of
from unets import UNETS, build_model

# Messages of PyTorch, NumPy and the system, word by word.
CPU = (
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"
)
ERRORS: dict[str, Callable[[], Exception]] = {
    "accelerator": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CPU": lambda: RuntimeError(CPU),
    "driver": lambda: RuntimeError("CUDA error: out of memory"),
    "Python": lambda: MemoryError(),
}
# How many places of each piece of torch work are made to fail, with the errors in turn.
PLACES = 16
STEPS = 2
SETTINGS = TuneSettings(steps=STEPS, learning_rate=1e-3)
CLEAR = re.compile(r"^[a-z_]+: out of memory.*[.] .*(Use|Keep|Save|Close|Compare) .*", re.S)


@pytest.fixture(autouse=True)
def on_the_server() -> Iterator[None]:
    """Nodes run in inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(params=["accelerator", "CPU", "Python"])
def error(request: pytest.FixtureRequest) -> Callable[[], Exception]:
    return ERRORS[request.param]


class FailingAt(TorchDispatchMode):
    """Counts torch's operations; the ``at``-th, from 0, and ``times`` - 1 after it fail."""

    def __init__(self, at: int = -1, error: Callable[[], Exception] = MemoryError, times: int = 1) -> None:
        super().__init__()
        self.count, self.at, self.error, self.times = 0, at, error, times

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.at >= 0 and self.at < self.count <= self.at + self.times:
            raise self.error()
        return func(*args, **(kwargs or {}))


# Made before any operation fails.
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
CONDITIONING = [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1)), {}]]


def live_bytes() -> int:
    """Bytes of all tensors that anything still refers to."""
    gc.collect()
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for each in gc.get_objects()
        # A compilation leaves fake tensors behind, which have no storage.
        if issubclass(type(each), Tensor) and not issubclass(type(each), FakeTensor) and each.layout is torch.strided
    }
    return sum(storages.values())


@contextmanager
def unharmed(model: Any) -> Iterator[None]:
    """Afterwards the model is what it was, in bits and in forwards, and no tensor more is alive."""
    # A motion's changes are in the weights for as long as the model is loaded.
    comfy.model_management.unload_all_models()
    unet = host.unet_of(model)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    alive = live_bytes()
    yield
    comfy.model_management.unload_all_models()
    assert live_bytes() <= alive, "tensors are left over"
    assert not any("forward" in module.__dict__ for module in unet.modules()), "forwards are left over"
    assert torch.is_inference_mode_enabled()
    assert not model.is_injected if hasattr(model, "is_injected") else True
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def tuning(model: Any) -> AbstractContextManager[Trainer]:
    return trainer_of(model, LATENTS, CONDITIONING, SETTINGS)


def tune(model: Any, folder: Path | None = None) -> Result:
    with tuning(model) as trainer:
        return run(trainer, folder)


def walk(sampler: Callable[..., Tensor], model: Any, start: Tensor) -> Tensor:
    table = host.sigma_table(model)
    sigmas = schedule.inversion_sigmas(table, 2) if sampler is ddim_invert else schedule.sampling_sigmas(table, 2)
    return host.run_sampler(model, sampler, sigmas, (CONDITIONING, CONDITIONING), 3.0, start)


def tensors_of(result: Result) -> list[Tensor]:
    motion, losses = result
    return [*(motion.tensors[key] for key in sorted(motion.tensors)), torch.tensor(losses)]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# --- anywhere in the torch work --------------------------------------------------------------------------


def attempt(work: Callable[[], list[Tensor]], expected: list[Tensor], mode: FailingAt, where: str) -> str:
    """Do the work with a failing allocation; which of the two good ends it had."""
    try:
        with mode:
            result = work()
    except OutOfMemoryError as error:
        assert CLEAR.match(str(error)), f"{where}: {error}"
        return "clear error"
    assert same(result, expected), f"{where}: another result"
    return "same result"


def test_an_allocation_that_fails_anywhere_in_tuning(exercised: list[str]) -> None:
    model = build_model(UNETS["tiny"])
    expected = tensors_of(tune(model))
    counting = FailingAt()
    with counting:
        assert same(tensors_of(tune(model)), expected)
    ends = []
    for index in range(PLACES):
        at = index * counting.count // PLACES
        kind = list(ERRORS)[index % len(ERRORS)]
        with unharmed(model):
            ends.append(attempt(lambda: tensors_of(tune(model)), expected, FailingAt(at, ERRORS[kind]), f"{kind} {at}"))
    # In forward and backward passes a smaller plan helps; in probes, loading and the optimiser's step nothing does.
    assert set(ends) == {"same result", "clear error"}
    assert same(tensors_of(tune(model)), expected)
    exercised.append(
        f"allocations failing in tuning: {PLACES} of {counting.count} places, {ends.count('same result')} went on with "
        f"less memory to the same weights, {ends.count('clear error')} ended in a clear error"
    )


@pytest.mark.parametrize("sampler", [ddim_invert, ddim_sample])
@pytest.mark.comfyui
def test_an_allocation_that_fails_anywhere_in_sampling(sampler: Callable[..., Tensor]) -> None:
    from tune_a_video.nodes.support.memory import memory_explained

    explained = memory_explained("latent", "Use fewer frames.")(walk)
    model = build_model(UNETS["tiny"])
    motion, _ = tune(model)
    tuned = host.inflate_model(model, Inflation(), motion)
    expected = [walk(sampler, tuned, LATENTS)]
    counting = FailingAt()
    with counting:
        walk(sampler, tuned, LATENTS)
    for index in range(PLACES):
        at = index * counting.count // PLACES
        kind = list(ERRORS)[index % len(ERRORS)]
        with unharmed(model):
            attempt(lambda: [explained(sampler, tuned, LATENTS)], expected, FailingAt(at, ERRORS[kind]), f"{kind} {at}")
    assert same([walk(sampler, tuned, LATENTS)], expected)


# --- by name ---------------------------------------------------------------------------------------------


def failing(error: Callable[[], Exception]) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error()

    return fail


IN_TUNING = [
    (comfy.model_management, "load_models_gpu"),
    (comfy.sampler_helpers, "convert_cond"),
    (memory_probe, "measure"),
    (TrainingUNet, "predict"),
    (Tensor, "backward"),
    (torch.nn.utils, "clip_grad_norm_"),
    (torch.optim.AdamW, "step"),
    (TrainingUNet, "weight"),
    (checkpoint, "fingerprint"),
]


@pytest.mark.parametrize(
    ("owner", "name", "kind"),
    [
        pytest.param(*each, kind, id=f"{each[1]}-{kind}")
        for each, kind in zip(IN_TUNING, itertools.cycle(ERRORS), strict=False)
    ],
)
def test_tuning_without_memory_says_so(
    owner: Any, name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(UNETS["tiny"])
    # In all other places, probes among them, no smaller plan was tried.
    recomputed = f"(?{'=' if name == 'backward' else '!'}.*activations are recomputed)"
    said = re.compile(recomputed + CLEAR.pattern, re.S)
    with unharmed(model), monkeypatch.context() as patch, pytest.raises(OutOfMemoryError, match=said):
        patch.setattr(owner, name, failing(ERRORS[kind]))
        tune(model, tmp_path)
    assert not list(tmp_path.glob(".*")), "half a file"


def test_what_is_learnt_survives_a_step_without_memory(
    error: Callable[[], Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(UNETS["tiny"])
    expected = tensors_of(tune(model))
    with (
        monkeypatch.context() as patch,
        pytest.raises(OutOfMemoryError, match="fewer frames"),
        tuning(model) as trainer,
        checkpoint.Checkpoint(tmp_path, trainer),
    ):
        for _ in trainer:
            patch.setattr(TrainingUNet, "predict", failing(error))
    with tuning(model) as trainer, checkpoint.Checkpoint(tmp_path, trainer):
        assert trainer.done == 1
        assert same(tensors_of(run(trainer)), expected)


def test_a_state_that_cannot_be_written_for_want_of_memory_stops_nothing(
    error: Callable[[], Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model(UNETS["tiny"])
    expected = tensors_of(tune(model))
    monkeypatch.setattr(checkpoint, "write_safetensors", failing(error))
    assert same(tensors_of(tune(model, tmp_path)), expected)
    assert "cannot be written" in caplog.text


def test_a_state_that_cannot_be_read_for_want_of_memory_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not damaged: a new run would overwrite it."""
    model = build_model(UNETS["tiny"])
    tune(model, tmp_path)
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(OutOfMemoryError):
        patch.setattr(checkpoint, "safe_open", failing(lambda: OSError(errno.ENOMEM, "Cannot allocate memory")))
        tune(model, tmp_path)
    assert path.read_bytes() == before


@pytest.mark.comfyui
def test_no_picture_of_the_loss_does_not_end_a_tuning(
    error: Callable[[], Exception], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tune_a_video.nodes import tune as module
    from tune_a_video.nodes.support.preview import MovingPreview

    trainer: Any = SimpleNamespace(done=2, settings=TuneSettings(steps=10), losses_so_far=lambda: [1.0, 0.5])
    curve = module._Curve(trainer, MovingPreview(10))
    monkeypatch.setattr(module, "_PREVIEW_SECONDS", 0.0)
    monkeypatch.setattr(pictures, "loss_curve", failing(error))
    curve.update()
    assert "tuning continues" in caplog.text


# --- the nodes beside the model --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def motion() -> Motion:
    with torch.inference_mode():
        found, _ = tune(build_model(UNETS["tiny"]))
    return Motion(found.tensors, {low_rank.SEED_KEY: "0"}).to(torch.float16)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    encode.save_clip(torch.rand(4, 16, 16, 3), 8.0, path)
    return path


def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    import folder_paths
    from tune_a_video.nodes import (
        compare_videos,
        evaluate_video,
        inflate,
        load_motion,
        load_video,
        save_motion,
        save_video,
        tune,
    )

    for kind in ("input", "output", "temp"):
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "tav", ([str(tmp_path)], {".safetensors"}))
    hidden = {"hidden": SimpleNamespace(prompt={}, unique_id="1", extra_pnginfo=None)}
    return SimpleNamespace(
        load_video=load_video.LoadVideo,
        save_video=type("SaveVideo", (save_video.SaveVideo,), hidden),
        save=save_motion.SaveMotion,
        load=load_motion.LoadMotion,
        tune=type("OneShotTune", (tune.OneShotTune,), hidden),
        inflate=inflate.InflateUNet,
        evaluate=evaluate_video.EvaluateVideo,
        compare=compare_videos.CompareVideos,
    )


FRAMES = torch.rand(2, 16, 16, 3, generator=torch.Generator().manual_seed(0))
LOAD = ("clip.mp4", 0.0, "seconds", 2, 1, 16, 16, "stretch")
POPEN_FAILS = pytest.param(
    "load_video", LOAD, subprocess, "Popen", lambda: OSError(errno.ENOMEM, "Cannot allocate memory"), id="fork"
)
ALLOCATIONS = [
    ("load_video", LOAD, torch, "empty"),
    ("load_video", LOAD, Image, "fromarray"),
    ("save_video", (FRAMES, 8.0, "out/clip", "mp4", 80), encode.np, "pad"),
    ("save_video", (FRAMES, 8.0, "out/clip", "gif", 80), encode, "_add_gif_comment"),
    ("save", ("motion", "out/motion", 4), torch.linalg, "svd"),
    ("save", ("motion", "out/motion"), weights.safetensors.torch, "save_file"),
    ("inflate", ("model", "sparse-causal", "over frames", 1.0, 1.0, "low-rank motion"), low_rank, "draw_temporal"),
    ("load", ("low-rank.safetensors",), weights, "safe_open"),
    ("inflate", ("model", "sparse-causal", "over frames", 1.0, 1.0, "motion"), inflated_model, "build_temporal"),
    ("evaluate", (FRAMES, FRAMES), torch.nn.functional, "grid_sample"),
    ("compare", (FRAMES, FRAMES), Image, "new"),
]


@pytest.mark.comfyui
@pytest.mark.parametrize(
    ("node", "given", "owner", "name", "kind"),
    [
        *(
            pytest.param(*each, ERRORS[kind], id=f"{each[0]}-{each[3]}-{kind}")
            for each, kind in zip(ALLOCATIONS, itertools.cycle(ERRORS), strict=False)
        ),
        POPEN_FAILS,
    ],
)
def test_a_node_without_memory_says_so(
    node: str,
    given: tuple[Any, ...],
    owner: Any,
    name: str,
    kind: Callable[[], Exception],
    tmp_path: Path,
    clip: Path,
    motion: Motion,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = low_rank.compress(motion, 4)
    weights.save_motion(small, tmp_path / "low-rank.safetensors")
    model = build_model(UNETS["tiny"])
    named = {"motion": motion, "low-rank motion": small, "model": model}
    arguments = [named.get(each, each) if isinstance(each, str) else each for each in given]
    ours = nodes(tmp_path, monkeypatch)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    with unharmed(model), monkeypatch.context() as patch, pytest.raises(OutOfMemoryError, match=CLEAR):
        patch.setattr(owner, name, failing(kind))
        getattr(ours, node).execute(*arguments)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before, "half a file"
    getattr(ours, node).execute(*arguments)


@pytest.mark.comfyui
def test_models_are_put_aside_and_the_host_goes_on(motion: Motion, monkeypatch: pytest.MonkeyPatch) -> None:
    from tune_a_video.nodes.support.memory import memory_explained

    model = host.inflate_model(build_model(UNETS["tiny"]), Inflation(), motion)
    expected = walk(ddim_sample, model, LATENTS)
    assert comfy.model_management.current_loaded_models
    with pytest.raises(OutOfMemoryError), memory_explained("latent", "Use fewer frames."):
        raise torch.OutOfMemoryError("injected")
    assert not comfy.model_management.current_loaded_models
    assert torch.equal(walk(ddim_sample, model, LATENTS), expected)


@pytest.mark.comfyui
def test_other_errors_stay_what_they_are() -> None:
    from tune_a_video.nodes.support.memory import memory_explained

    for error in (
        ValueError("steps: 0"),
        RuntimeError("mat1 and mat2 shapes"),
        OSError(errno.ENOENT, "gone"),
        KeyError(),
    ):
        assert not is_out_of_memory(error)
        with pytest.raises(type(error)) as caught, memory_explained("latent", "Use fewer frames."):
            raise error
        assert caught.value is error


def test_a_decoder_that_runs_out_of_memory_is_no_damaged_file(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def starved(*_: Any) -> Any:
        raise CannotReadError("Error while decoding: Cannot allocate memory")
        yield

    monkeypatch.setattr(decode, "decord_frames", starved)
    monkeypatch.setattr(decode, "av_frames", starved)
    with pytest.raises(MemoryError, match="Cannot allocate memory"):
        load_clip(clip, width=16, height=16)


def test_an_encoder_that_the_system_ended_was_out_of_memory(tmp_path: Path) -> None:
    log = open(tmp_path / "log", "wb+")  # noqa: SIM115
    with log:
        assert is_out_of_memory(encode._encoder_error("clip.mp4", -9, log))
        assert not is_out_of_memory(encode._encoder_error("clip.mp4", 1, log))


def test_what_pytorch_really_says_is_known() -> None:
    assert all(is_out_of_memory(make()) for make in ERRORS.values())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**56, dtype=torch.uint8)
    assert is_out_of_memory(caught.value) and type(caught.value) is not torch.OutOfMemoryError
    for text in (
        "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "GET was unable to find an engine to execute this computation",
    ):
        assert out_of_memory.mentions_oom(text)
    assert out_of_memory.mentions_oom("MPS backend out of memory (MPS allocated: 9.05 GB)")
