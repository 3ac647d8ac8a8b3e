"""A tuning with everything that a caller may add to it, for tests that look at one part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tune_a_video.tav_core import host
from tune_a_video.tav_core.inflate import Inflation
from tune_a_video.tav_core.motion.file import Motion
from tune_a_video.tav_core.tuning.checkpoint import Checkpoint
from tune_a_video.tav_core.tuning.memory_plan import Level, Plan
from tune_a_video.tav_core.tuning.trainer import PAPER, Trainer, TuneSettings
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


def one_shot_tune(
    model: Any,
    latents: Tensor,
    conditioning: Any,
    settings: TuneSettings,
    inflation: Inflation = PAPER,
    motion: Motion | None = None,
    precision: torch.dtype | None = None,
    *,
    budget: float | None = None,
    level: Level | None = None,
    draw: Draw | None = None,
    patience: int = 0,
    checkpoints: Path | None = None,
    checkpoint_interval: float = 60.0,
    on_warning: Callable[[str], None] | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    on_gradients: Callable[[Trainer], None] | None = None,
    on_step: Callable[[int], None] | None = None,
    on_preview: Callable[[int, Tensor, Tensor], None] | None = None,
    preview_every: int = 0,
    stop: Callable[[], bool] | None = None,
) -> tuple[Motion, list[float]]:
    """Tune as a node does, with a look at every part; return the motion and the losses.

    ``draw``: given timesteps and noise. ``level``: the plan of every block. ``on_gradients`` sees gradients before
    they are clipped. ``on_step`` gets the step's index and may raise. ``stop`` is asked after every step.
    """
    with trainer_of(
        model, latents, conditioning, settings, precision,
        inflation=inflation, start=motion, memory_budget=budget, patience=patience,
    ) as trainer:  # fmt: skip
        with Checkpoint(checkpoints, trainer, on_warning, checkpoint_interval) as run:
            if level is not None:
                trainer.plan = Plan.all_at(trainer.costs, level)
            if on_plan is not None:
                on_plan(trainer.plan)
            while not trainer.ended:
                loss = trainer.backward(*(draw(trainer.done) if draw else trainer.draw()))
                if on_gradients is not None:
                    on_gradients(trainer)
                trainer.update(loss)
                if on_preview is not None and preview_every and trainer.done % preview_every == 0:
                    made = trainer.reconstruct()
                    if made is not None:
                        on_preview(trainer.done, trainer.unet.latents, made)
                run.save_if_due()
                if on_step is not None:
                    on_step(trainer.done - 1)
                if stop is not None and stop():
                    break
        return trainer.motion(), trainer.losses
