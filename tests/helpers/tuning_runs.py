"""A tuning with everything that a caller may add to it, for tests that look at one part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tune_a_video.tav_core import host
from tune_a_video.tav_core.motion.file import Motion
from tune_a_video.tav_core.tuning.checkpoint import Checkpoint
from tune_a_video.tav_core.tuning.trainer import Trainer, TuneSettings, TuneStep
from tune_a_video.tav_core.tuning.training_unet import training_unet

Draw = Callable[[int], tuple[int, Tensor]]
Result = tuple[Motion, list[float]]


@contextmanager
def trainer_of(
    model: Any,
    latents: Tensor,
    conditioning: Any,
    settings: TuneSettings,
    precision: torch.dtype | None = None,
    **options: Any,
) -> Iterator[Trainer]:
    """A trainer on a loaded model; ``options`` go to it."""
    host.check_motion(model, options.get("start"))
    with training_unet(model, latents, conditioning, precision, settings.frames_per_step) as unet:
        yield Trainer(unet, settings, **options)


@contextmanager
def steps_of(
    trainer: Trainer,
    folder: Path | None = None,
    draw: Draw | None = None,
    interval: float = 60.0,
    warn: Callable[[str], None] | None = None,
) -> Iterator[Iterator[TuneStep]]:
    """The steps of a trainer that resumes from ``folder`` and saves there, as the node iterates them.

    ``draw`` gets the number of steps done and gives timestep and noise; without it the trainer draws its own.
    """

    def given(draw: Draw) -> Iterator[TuneStep]:
        while not trainer.ended:
            yield trainer.train_step(*draw(trainer.done))

    with Checkpoint(folder, trainer, warn, interval) as checkpoint:

        def steps() -> Iterator[TuneStep]:
            for step in trainer if draw is None else given(draw):
                checkpoint.save_if_due()
                yield step

        yield steps()


def result_of(trainer: Trainer) -> Result:
    """The motion and the losses."""
    return trainer.motion(), trainer.losses


def run(trainer: Trainer, *args: Any, **options: Any) -> Result:
    """Take every step that is left, see ``steps_of``; return the motion and the losses."""
    with steps_of(trainer, *args, **options) as steps:
        for _ in steps:
            pass
    return result_of(trainer)


def assert_same(ours: Result, theirs: Result) -> None:
    """Assert that two runs ended with the same bits."""
    assert ours[1] == theirs[1]
    assert ours[0].tensors.keys() == theirs[0].tensors.keys()
    assert not [key for key, value in ours[0].tensors.items() if not torch.equal(value, theirs[0].tensors[key])]


def seeded_draw(latents: Tensor, train_steps: int, seed: int) -> Draw:
    """A timestep and noise like ``latents`` for each step, in a row from a seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(step: int) -> tuple[int, Tensor]:
        timestep = int(torch.randint(train_steps, (1,), generator=generator))
        return timestep, torch.randn(latents.shape, generator=generator)

    return draw
