"""Tuning on windows of a long clip: the first frame and some others in a row, at memory that does not grow with it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from tune_a_video.tav_core.errors import Refusal
from tune_a_video.tav_core.tuning.frame_window import draw_window, window_length
from tune_a_video.tav_core.tuning.trainer import Trainer, TuneSettings
from tuning_runs import Result, assert_same, result_of, run, steps_of, trainer_of
from unets import UNETS, build_model

FRAMES, LENGTH = 9, 4
SETTINGS = TuneSettings(steps=5, learning_rate=1e-3, frames_per_step=LENGTH)
WHOLE = replace(SETTINGS, frames_per_step=0)


@pytest.fixture(autouse=True)
def on_the_server() -> Any:
    """Nodes run in inference mode."""
    with torch.inference_mode():
        yield


def latents(frames: int = FRAMES, side: int = 8) -> Tensor:
    return torch.randn(frames, 4, side, side, generator=torch.Generator().manual_seed(0))


def conditioning(rows: int = 1) -> Any:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(rows, 7, 32, generator=generator), {"pooled_output": torch.randn(1, 1280)}]]


def trainer(settings: TuneSettings = SETTINGS, clip: Tensor | None = None, size: str = "tiny", **options: Any) -> Any:
    clip = latents() if clip is None else clip
    return trainer_of(build_model(UNETS[size]), clip, conditioning(), settings, **options)


def tuned(settings: TuneSettings, **options: Any) -> Result:
    with trainer(settings, **options) as running:
        return run(running)


def test_0_and_as_many_as_there_are_stand_for_all_frames() -> None:
    assert [window_length(9, per_step) for per_step in (0, 9, 10, 8, 2)] == [None, None, None, 8, 2]
    assert window_length(1, 1) is None
    with pytest.raises(Refusal, match="frames_per_step: with 1 a step would see the first frame alone"):
        window_length(9, 1)


@pytest.mark.parametrize(("frames", "length"), [(9, 4), (9, 2), (9, 8), (3, 2), (40, 16)])
def test_a_window_holds_frame_0_and_frames_in_a_row_and_each_is_drawn_often_enough(frames: int, length: int) -> None:
    generator, draws = torch.Generator().manual_seed(0), 4000
    seen: Counter[int] = Counter()
    for _ in range(draws):
        first, *others = draw_window(frames, length, generator).tolist()
        assert first == 0 and len(others) == length - 1
        assert others == [*range(others[0], others[0] + length - 1)] and 0 < others[0] and others[-1] < frames
        seen.update(others)
    least = draws * (length - 1) / (frames + length - 3)
    assert set(seen) == set(range(1, frames))
    assert min(seen.values()) > least - 5 * math.sqrt(least)


def test_all_frames_at_once_are_tuned_on_as_without_windows() -> None:
    """To the bit, and under the same run's name."""
    expected = tuned(WHOLE)
    for per_step in (FRAMES, FRAMES + 5):
        assert_same(tuned(replace(SETTINGS, frames_per_step=per_step)), expected)
    with trainer(WHOLE) as whole, trainer(replace(SETTINGS, frames_per_step=FRAMES)) as same, trainer() as windows:
        assert whole.decisive == same.decisive != windows.decisive
        assert "frames_per_step" not in whole.decisive["settings"]


@pytest.mark.parametrize("cancel_after", [1, 3])
def test_a_run_that_is_cut_off_goes_on_to_the_same_bits(tmp_path: Path, cancel_after: int) -> None:
    with pytest.raises(InterruptedError), trainer() as running, steps_of(running, tmp_path) as steps:
        for step in steps:
            if step.number == cancel_after:
                raise InterruptedError
    with trainer() as running:
        with steps_of(running, tmp_path) as steps:
            assert [step.number for step in steps] == [*range(cancel_after + 1, SETTINGS.steps + 1)]
        assert_same(result_of(running), tuned(SETTINGS))


def test_a_step_sees_its_window_and_nothing_else() -> None:
    """The loss of a window is that of a clip which is these frames; the rest of the clip has no part in it."""
    shown = torch.tensor([0, 5, 6, 7])
    noise = torch.randn(LENGTH, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    other = latents() + 1
    other[shown] = latents()[shown]

    def loss(running: Trainer, *frames: Tensor) -> float:
        return float(running.backward(500, noise, *frames))

    with trainer() as window, trainer(clip=other) as elsewhere, trainer(WHOLE, latents()[shown]) as alone:
        assert loss(window, shown) == loss(elsewhere, shown) == loss(alone)
        assert loss(window, torch.tensor([0, 4, 5, 6])) != loss(window, shown)


@pytest.mark.parametrize("size", ["tiny", "tiny-sdxl"])
def test_the_planned_memory_does_not_grow_with_the_clip(size: str) -> None:
    def planned(settings: TuneSettings, frames: int) -> float:
        with trainer(settings, latents(frames), size, memory_budget=math.inf) as running:
            return running.plan.bytes

    assert planned(SETTINGS, 8) == planned(SETTINGS, 40) == planned(WHOLE, LENGTH)
    assert planned(WHOLE, 40) > 4 * planned(SETTINGS, 40)


def test_loading_leaves_room_for_a_window_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.model_management

    asked: list[float] = []
    load = comfy.model_management.load_models_gpu

    def noted(models: Any, memory_required: float = 0, **options: Any) -> Any:
        asked.append(memory_required)
        return load(models, memory_required=memory_required, **options)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", noted)
    for settings, frames in ((SETTINGS, 40), (WHOLE, LENGTH), (WHOLE, 40)):
        with trainer(settings, latents(frames)):
            pass
    assert asked[0] == asked[1] < asked[2]


def test_the_preview_is_the_first_window() -> None:
    with trainer() as running:
        made = running.reconstruct()
        assert made is not None and made.shape == (LENGTH, 4, 8, 8)
    with trainer(WHOLE, latents()[:LENGTH]) as alone:
        again = alone.reconstruct()
        assert again is not None and torch.equal(made, again)


def test_a_sentence_for_each_frame_is_refused() -> None:
    inputs = build_model(UNETS["tiny"]), latents(), conditioning(FRAMES)
    with pytest.raises(Refusal, match="frames_per_step: conditioning has a text embedding for each frame"):
        with trainer_of(*inputs, SETTINGS):
            pass
    with trainer_of(*inputs, WHOLE):
        pass
