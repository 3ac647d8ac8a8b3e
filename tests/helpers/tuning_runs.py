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
from tune_a_video.tav_core.tuning.memory_plan import Level, Plan
from tune_a_video.tav_core.tuning.trainer import Trainer, TuneSettings
from tune_a_video.tav_core.tuning.training_unet import training_unet

Draw = Callable[[int], tuple[int, Tensor]]


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
    with training_unet(model, latents, conditioning, precision) as unet:
        yield Trainer(unet, settings, **options)


def seeded_draw(latents: Tensor, train_steps: int, seed: int) -> Draw:
    """A timestep and noise like ``latents`` for each step, in a row from a seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(step: int) -> tuple[int, Tensor]:
        timestep = int(torch.randint(train_steps, (1,), generator=generator))
        return timestep, torch.randn(latents.shape, generator=generator)

    return draw


def run(
    model: Any,
    latents: Tensor,
    conditioning: Any,
    settings: TuneSettings,
    *,
    draw: Draw | None = None,
    level: Level | None = None,
    folder: Path | None = None,
    interval: float = 60.0,
    warn: Callable[[str], None] | None = None,
    before_update: Callable[[Trainer], None] | None = None,
    after_step: Callable[[Trainer], Any] | None = None,
    **options: Any,
) -> tuple[Motion, list[float]]:
    """Tune, resuming from ``folder``; returns the motion and the losses.

    ``draw``: given timesteps and noise. ``level``: every block at one. ``before_update`` sees gradients, not yet
    clipped. ``after_step``: may raise, and ends the run by returning True. ``options`` go to the trainer.
    """
    with trainer_of(model, latents, conditioning, settings, **options) as trainer:
        if level is not None:
            trainer.plan = Plan.all_at(trainer.costs, level)
        with Checkpoint(folder, trainer, warn, interval) as checkpoint:
            while not trainer.ended:
                loss = trainer.backward(*(draw(trainer.done) if draw else trainer.draw()))
                if before_update is not None:
                    before_update(trainer)
                trainer.update(loss)
                checkpoint.save_if_due()
                if after_step is not None and after_step(trainer):
                    break
        return trainer.motion(), trainer.losses
