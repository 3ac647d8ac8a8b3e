"""Looking at a tuning and ending it early: neither changes what it learns."""

from __future__ import annotations

from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from tune_a_video.tav_core.tuning import trainer as tuning
from tune_a_video.tav_core.tuning.early_stop import stopped_improving_at
from tune_a_video.tav_core.tuning.trainer import Trainer, TuneSettings
from tuning_runs import Result, assert_same, result_of, run, steps_of, trainer_of
from unets import UNETS, build_model


@pytest.fixture(autouse=True)
def on_the_server() -> Any:
    """Nodes run in inference mode."""
    with torch.inference_mode():
        yield


def latents() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def conditioning() -> list[Any]:
    return [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1)), {}]]


def started(
    steps: int,
    size: str = "tiny",
    prediction: str = "epsilon",
    precision: torch.dtype | None = None,
    learning_rate: float = 1e-3,
    patience: int = 0,
) -> AbstractContextManager[Trainer]:
    model = build_model(UNETS[size], prediction=prediction)
    settings = TuneSettings(steps=steps, learning_rate=learning_rate)
    return trainer_of(model, latents(), conditioning(), settings, precision, patience=patience)


def tune(steps: int, folder: Path | None = None, **options: Any) -> Result:
    with started(steps, **options) as trainer:
        return run(trainer, folder)


@pytest.mark.parametrize("precision", [None, torch.float16])
def test_looking_changes_nothing(precision: torch.dtype | None) -> None:
    with started(5, precision=precision) as trainer:
        for step in trainer:
            if step.number in (2, 4):
                assert trainer.reconstruct() is not None
        assert_same(result_of(trainer), tune(5, precision=precision))


def test_a_preview_that_there_is_no_memory_for_stops_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    error: Exception = torch.OutOfMemoryError("injected")

    def fail(*_: Any) -> None:
        raise error

    expected = tune(5)
    monkeypatch.setattr(tuning, "reconstruct", fail)
    with started(5) as trainer:
        for step in trainer:
            if step.number in (2, 4):
                assert trainer.reconstruct() is None
        assert_same(result_of(trainer), expected)
        assert [record.message for record in caplog.records if "no memory for a preview" in record.message] == [
            f"Tune-A-Video: no memory for a preview after step {done}; tuning continues" for done in (2, 4)
        ]
        error = RuntimeError("another error")
        with pytest.raises(RuntimeError, match="^another error$"):
            trainer.reconstruct()


def test_looking_does_not_disturb_a_run_that_resumes(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError), started(5) as trainer, steps_of(trainer, tmp_path) as steps:
        list(islice(steps, 3))
        trainer.reconstruct()
        raise InterruptedError
    with started(5) as trainer, steps_of(trainer, tmp_path) as steps:
        assert [step.number for step in steps if trainer.reconstruct() is not None] == [4, 5]
        assert_same(result_of(trainer), tune(5))


@pytest.mark.parametrize(("size", "prediction"), [("tiny", "epsilon"), ("tiny-v", "v")])
def test_the_clip_is_seen_better_the_longer_it_was_tuned_on(size: str, prediction: str) -> None:
    errors = []
    with started(25, size, prediction, learning_rate=1e-2) as trainer:
        made_from = trainer.unet.latents
        # The clip of the model's own scale, not of the LATENT's.
        torch.testing.assert_close(made_from, latents() * 0.18215)
        for step in trainer:
            if step.number % 5 == 0:
                made = trainer.reconstruct()
                assert made is not None and made.shape == (2, 4, 8, 8) and made.isfinite().all()
                errors.append(float((made - made_from).norm() / made_from.norm()))
    # A model of random weights is far from making the clip, but it comes closer.
    assert errors == sorted(errors, reverse=True) and errors[4] < 0.97 * errors[0], errors


@pytest.mark.parametrize("stop_after", [1, 4])
def test_a_run_that_is_stopped_keeps_what_it_has(tmp_path: Path, stop_after: int) -> None:
    with started(9) as trainer:
        with steps_of(trainer, tmp_path) as steps:
            list(islice(steps, stop_after))
        assert_same(result_of(trainer), tune(stop_after))
    # With the same inputs once more, it resumes.
    with started(9) as trainer, steps_of(trainer, tmp_path) as steps:
        assert [step.number for step in steps] == list(range(stop_after + 1, 10))
        assert_same(result_of(trainer), tune(9))


def test_patience_ends_a_run_at_the_same_step_however_it_came_there(tmp_path: Path) -> None:
    # With a learning rate of nothing much the loss cannot fall for long: it only jumps.
    arguments: dict[str, Any] = {"learning_rate": 1e-8, "patience": 4}
    ended = tune(60, **arguments)
    end = len(ended[1])
    over = stopped_improving_at(ended[1], 4)
    assert over is not None and 8 <= over <= end < 60 and end % 5 == 0
    with pytest.raises(InterruptedError), started(60, **arguments) as trainer, steps_of(trainer, tmp_path) as steps:
        list(islice(steps, 3))
        raise InterruptedError
    # Queued once more it resumes; then it is over already.
    for expected in (list(range(4, end + 1)), []):
        with started(60, **arguments) as trainer, steps_of(trainer, tmp_path) as steps:
            assert [step.number for step in steps] == expected
            assert_same(result_of(trainer), ended)
    # Without patience it goes on, and what it then leaves is no use to one with patience.
    assert len(tune(60, tmp_path, learning_rate=1e-8)[1]) == 60
    assert_same(tune(60, tmp_path, **arguments), ended)


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
