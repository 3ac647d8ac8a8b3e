"""Looking at a tuning and ending it early: neither changes what it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from tune_a_video.tav_core.motion.file import Motion
from tune_a_video.tav_core.tuning import trainer
from tune_a_video.tav_core.tuning.early_stop import stopped_improving_at
from tune_a_video.tav_core.tuning.trainer import TuneSettings
from tuning_runs import one_shot_tune
from unets import UNETS, build_model

Result = tuple[Motion, list[float]]


@pytest.fixture(autouse=True)
def on_the_server() -> Any:
    """Nodes run in inference mode."""
    with torch.inference_mode():
        yield


def latents() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def conditioning() -> list[Any]:
    return [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1)), {}]]


def tune(steps: int, size: str = "tiny", learning_rate: float = 1e-3, **options: Any) -> Result:
    prediction = options.pop("prediction", "epsilon")
    model = build_model(UNETS[size], prediction=prediction)
    settings = TuneSettings(steps=steps, learning_rate=learning_rate)
    return one_shot_tune(model, latents(), conditioning(), settings, **options)


def assert_same(ours: Result, theirs: Result) -> None:
    assert ours[1] == theirs[1]
    assert ours[0].tensors.keys() == theirs[0].tensors.keys()
    assert all(torch.equal(value, theirs[0].tensors[key]) for key, value in ours[0].tensors.items())


@pytest.mark.parametrize("precision", [None, torch.float16])
def test_looking_changes_nothing(precision: torch.dtype | None) -> None:
    seen: list[int] = []
    looked = tune(5, on_preview=lambda done, clip, made: seen.append(done), preview_every=2, precision=precision)
    assert seen == [2, 4]
    assert_same(looked, tune(5, precision=precision))


def test_a_preview_that_there_is_no_memory_for_stops_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scarce(*_: Any) -> None:
        raise torch.OutOfMemoryError("injected")

    expected = tune(5)
    monkeypatch.setattr(trainer, "reconstruct", scarce)
    assert_same(tune(5, on_preview=scarce, preview_every=2), expected)
    assert [record.message for record in caplog.records if "no memory for a preview" in record.message] == [
        f"Tune-A-Video: no memory for a preview after step {done}; tuning continues" for done in (2, 4)
    ]

    def broken(*_: Any) -> None:
        raise RuntimeError("another error")

    monkeypatch.setattr(trainer, "reconstruct", broken)
    with pytest.raises(RuntimeError, match="^another error$"):
        tune(5, on_preview=scarce, preview_every=2)


def test_looking_does_not_disturb_a_run_that_goes_on(tmp_path: Path) -> None:
    def cancel(done: int, clip: Tensor, made: Tensor) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        tune(5, on_preview=cancel, preview_every=3, checkpoints=tmp_path)
    taken: list[int] = []
    looked = tune(5, on_preview=lambda *_: None, preview_every=1, checkpoints=tmp_path, on_step=taken.append)
    assert taken == [3, 4]
    assert_same(looked, tune(5))


@pytest.mark.parametrize(("size", "prediction"), [("tiny", "epsilon"), ("tiny-v", "v")])
def test_the_clip_is_seen_better_the_longer_it_was_tuned_on(size: str, prediction: str) -> None:
    errors: dict[int, float] = {}

    def look(done: int, clip: Tensor, made: Tensor) -> None:
        assert clip.shape == made.shape == (2, 4, 8, 8) and made.isfinite().all()
        # The clip of the model's own scale, not of the LATENT's.
        torch.testing.assert_close(clip, latents() * 0.18215)
        errors[done] = float((made - clip).norm() / clip.norm())

    tune(25, size, 1e-2, prediction=prediction, on_preview=look, preview_every=5)
    assert sorted(errors) == [5, 10, 15, 20, 25]
    # A model of random weights is far from making the clip, but it comes closer.
    assert list(errors.values()) == sorted(errors.values(), reverse=True) and errors[25] < 0.97 * errors[5], errors


def test_a_run_that_is_stopped_keeps_what_it_has(tmp_path: Path) -> None:
    taken: list[int] = []
    stopped = tune(9, stop=lambda: len(taken) == 4, on_step=taken.append, checkpoints=tmp_path)
    assert taken == [0, 1, 2, 3]
    assert_same(stopped, tune(4))
    # The same inputs once more, and it goes on.
    whole = tune(9, stop=lambda: False, on_step=taken.append, checkpoints=tmp_path)
    assert taken == list(range(9))
    assert_same(whole, tune(9))


def test_a_fresh_run_takes_a_step_before_it_can_be_stopped() -> None:
    assert len(tune(3, stop=lambda: True)[1]) == 1


def test_patience_ends_a_run_at_the_same_step_however_it_came_there(tmp_path: Path) -> None:
    # With a learning rate of nothing much the loss cannot fall for long: it only jumps.
    arguments: dict[str, Any] = {"learning_rate": 1e-8, "patience": 4}
    ended = tune(60, **arguments)
    end = len(ended[1])
    over = stopped_improving_at(ended[1], 4)
    assert over is not None and 8 <= over <= end < 60 and end % 5 == 0
    taken: list[int] = []

    def cancel(step: int) -> None:
        if step == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        tune(60, checkpoints=tmp_path, on_step=cancel, **arguments)
    assert_same(tune(60, checkpoints=tmp_path, on_step=taken.append, **arguments), ended)
    assert taken == list(range(3, end))
    # Queued again it is over already; without patience it goes on; and what went on is no use to one with patience.
    assert_same(tune(60, checkpoints=tmp_path, on_step=taken.append, **arguments), ended)
    assert len(taken) == end - 3
    tune(60, learning_rate=1e-8, checkpoints=tmp_path)
    assert_same(tune(60, checkpoints=tmp_path, **arguments), ended)


def noisy(means: Any) -> list[float]:
    """Losses as of drawn timesteps: they spread as widely as their mean."""
    spread = np.random.default_rng(0).gamma(1.5, 1 / 1.5, len(means))
    return list(np.asarray(means) * spread)


def test_a_falling_loss_is_waited_for() -> None:
    assert stopped_improving_at([1 / (i + 1) for i in range(500)], 20) is None
    assert stopped_improving_at(noisy(np.geomspace(1, 0.05, 500)), 100) is None


def test_a_loss_that_has_stopped_falling_is_not() -> None:
    flat = stopped_improving_at([1 / (i + 1) for i in range(30)] + [1.0] * 70, 20)
    assert flat is not None and 50 <= flat <= 71
    end = stopped_improving_at(noisy([*np.geomspace(1, 0.1, 200), *[0.1] * 1000]), 100)
    assert end is not None and 300 <= end <= 900


def test_the_end_does_not_depend_on_what_comes_after() -> None:
    losses = noisy([0.1] * 400)
    end = stopped_improving_at(losses, 30)
    assert end is not None
    assert stopped_improving_at(losses[:end], 30) == end
    assert stopped_improving_at(losses[: end - 1], 30) is None


@pytest.mark.parametrize("patience", [0, -1])
def test_without_patience_there_is_no_end(patience: int) -> None:
    assert stopped_improving_at([1.0] * 100, patience) is None


def test_steps_that_were_left_out_do_not_count() -> None:
    losses = [1 / (i + 1) for i in range(100)]
    for i in range(0, 100, 7):
        losses[i] = float("nan")
    assert stopped_improving_at(losses, 10) is None
    assert stopped_improving_at([float("inf")] * 30, 10) is not None
