"""One-shot tuning: a model and one clip in, a MOTION out (paper, section 4.2)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import host, memory
from .inflate import (
    Inflation,
    TemporalLayer,
    build_temporal,
    initial_temporal,
    swapped,
    temporal_layers,
    transformer_blocks,
)
from .schedule import add_noise, alphas_cumprod, training_target
from .trainable import CastingOperations, TrainScope, in_scope
from .weights import QUERY_SUFFIX, Motion, check_fits

# How often the loss is read back: often enough to stop early on a NaN, seldom enough not to stall a GPU.
_LOSS_CHECK_INTERVAL = 10

# The rest is for what the allocator cannot use and for what other programs on the device do meanwhile.
SHARE_OF_FREE_MEMORY = 0.8


INFLATED = Inflation()


@dataclass(frozen=True)
class TuneSettings:
    """The released configuration. ``gradient_clip`` is a total L2 norm, 0 = off; ``warmup_steps`` linear."""

    steps: int = 500
    learning_rate: float = 3e-5
    seed: int = 0
    train_scope: TrainScope = "all"
    warmup_steps: int = 0
    gradient_clip: float = 1.0
    weight_decay: float = 1e-2


@dataclass(frozen=True)
class TuneStep:
    """State of a step, after its backward pass and before the update.

    ``gradients``: by motion key, before clipping. ``loss``, ``grad_norm``: scalars on the device; reading
    them waits for it.
    """

    index: int
    timestep: int
    loss: Tensor
    grad_norm: Tensor
    gradients: Mapping[str, Tensor]


Draw = Callable[[int], tuple[int, Tensor]]


def seeded_draw(latents: Tensor, train_steps: int, seed: int) -> Draw:
    """A timestep, uniform over all training timesteps, and noise like ``latents``; the same on any device."""
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
    inflation: Inflation = INFLATED,
    motion: Motion | None = None,
    precision: torch.dtype | None = None,
    budget: float | None = None,
    level: memory.Level | None = None,
    draw: Draw | None = None,
    on_gradients: Callable[[TuneStep], None] | None = None,
    on_plan: Callable[[memory.Plan], None] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> tuple[Motion, list[float]]:
    """Tune query projections and temporal layers on one clip.

    ``model``: a ComfyUI ModelPatcher without inflation; LoRAs on it are part of what is tuned on.
    ``latents``: the clip [frames, c, h, w] in the host's LATENT scale. ``conditioning``: a ComfyUI
    conditioning of one prompt. ``motion``: weights to go on from. ``precision``: compute dtype, None for the
    model's own; what learns is float32 always. ``budget``: bytes for activations and gradients, None for what
    the device has free; ``level``: what every block keeps, instead of a plan from a budget. ``draw(step)``:
    timestep and noise [frames, c, h, w], for runs that must repeat given draws. ``on_gradients`` sees each step
    before its update; ``on_plan`` is told what blocks keep before the first one; ``on_step`` is called after
    each, may raise to stop.

    Returns the motion (float32, without metadata) and the loss of every step. Raises ValueError for inputs
    that don't fit together, RuntimeError when the loss is no longer finite or no plan fits into memory.
    """
    host.check_model(model)
    if motion is not None:
        check_fits(motion, host.query_shapes(model), host.family(model))
    start = {} if motion is None else {key: value.float() for key, value in motion.tensors.items()}

    with host.training_unet(model, latents, conditioning, precision) as session:
        weights = _trainable_weights(session, settings, start)
        frames = len(session.latents)
        costs = _costs(session, weights, inflation)
        if budget is None:
            # AdamW's two moments are still to come.
            optimizer_bytes = 2 * sum(p.nbytes for p in weights.trained.values())
            budget = SHARE_OF_FREE_MEMORY * (host.free_memory(session.device) - optimizer_bytes)
        plan = memory.make_plan(costs, budget) if level is None else memory.uniform_plan(costs, level)
        if on_plan is not None:
            on_plan(plan)
        with session.prepared(inflation, weights.layers, weights.queries, frames):
            losses = _run(_Descent(session, weights.trained, settings, draw, on_gradients), costs, plan, on_step)
        return weights.motion(session), losses


def costs_of(
    model: Any,
    latents: Tensor,
    conditioning: Any,
    settings: TuneSettings,
    inflation: Inflation = INFLATED,
    precision: torch.dtype | None = None,
) -> tuple[dict[str, memory.UnitCost], int]:
    """What each block would hold on to in a tuning step, and how many numbers learn. Arguments as ``one_shot_tune``."""
    with host.training_unet(model, latents, conditioning, precision) as session:
        weights = _trainable_weights(session, settings, {})
        return _costs(session, weights, inflation), sum(p.numel() for p in weights.trained.values())


def _costs(session: host.TrainingUNet, weights: _Weights, inflation: Inflation) -> dict[str, memory.UnitCost]:
    frames, channels, height, width = session.latents.shape

    def evaluate(frames: int, height: int, width: int) -> Tensor:
        with session.prepared(inflation, weights.layers, weights.queries, frames):
            return session.predict(session.latents.new_zeros(frames, channels, height, width), 0)

    return memory.measure(session.unet, evaluate, frames, height, width, _gradient_bytes(weights.trained))


def _gradient_bytes(trained: Mapping[str, torch.nn.Parameter]) -> dict[str, int]:
    """Bytes of gradients by transformer block."""
    found: dict[str, int] = {}
    for key, parameter in trained.items():
        block = key.partition(".attn")[0]
        found[block] = found.get(block, 0) + parameter.nbytes
    return found


@dataclass(frozen=True)
class _Weights:
    """What a tuning run works on, float32, on its device.

    ``queries``: query projection weights by path, those that learn and those that a motion to go on from
    brings along. ``temporal``: the temporal layers; ``layers``: the same by block path. ``trained``: the
    parameters that learn, by motion key.
    """

    temporal: torch.nn.Module
    layers: Mapping[str, TemporalLayer]
    queries: Mapping[str, torch.nn.Parameter]
    trained: Mapping[str, torch.nn.Parameter]

    def motion(self, session: host.TrainingUNet) -> Motion:
        """The temporal weights, and the queries' differences from the model's, on the CPU."""
        tensors = {key: value.detach().to("cpu", copy=True) for key, value in self.temporal.state_dict().items()}
        for path, query in self.queries.items():
            delta = query.detach() - session.weight(path.removesuffix(".weight"))
            tensors[path.removesuffix(".weight") + QUERY_SUFFIX] = delta.cpu()
        return Motion(tensors)


def _trainable_weights(session: host.TrainingUNet, settings: TuneSettings, start: Mapping[str, Tensor]) -> _Weights:
    """Weights at the start of a run. ``start``: tensors of a motion to go on from, none for a fresh run."""

    def scope(path: str) -> bool:
        return in_scope(path, settings.train_scope)

    temporal = initial_temporal(session.unet, scope, settings.seed)
    temporal.update({key: value for key, value in start.items() if not key.endswith(QUERY_SUFFIX)})
    root = build_temporal(session.unet, temporal, CastingOperations, torch.float32).to(session.device)
    layers = temporal_layers(root)
    queries: dict[str, torch.nn.Parameter] = {}
    trained: dict[str, torch.nn.Parameter] = {}
    for block in transformer_blocks(session.unet):
        for path in (f"{block}.attn1.to_q", f"{block}.attn2.to_q"):
            delta = start.get(path + QUERY_SUFFIX)
            if delta is None and not scope(block):
                continue
            weight = session.weight(path)
            query = torch.nn.Parameter(weight if delta is None else weight + delta.to(weight), scope(block))
            queries[path + ".weight"] = query
            if scope(block):
                trained[path + QUERY_SUFFIX] = query
        if scope(block):
            layers[block].attn_temp.requires_grad_(True)
            for leaf, parameter in layers[block].attn_temp.named_parameters():
                trained[f"{block}.attn_temp.{leaf}"] = parameter
    return _Weights(root, layers, queries, trained)


class _Descent:
    """AdamW on the mean squared error of the model's own prediction target."""

    def __init__(
        self,
        session: host.TrainingUNet,
        trained: Mapping[str, torch.nn.Parameter],
        settings: TuneSettings,
        draw: Draw | None,
        on_gradients: Callable[[TuneStep], None] | None,
    ) -> None:
        self.session, self.trained, self.settings, self.on_gradients = session, trained, settings, on_gradients
        self.alpha_bars = alphas_cumprod(session.sigmas).tolist()
        self.draw = draw or seeded_draw(session.latents, len(self.alpha_bars), settings.seed)
        self.parameters = list(trained.values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / max(settings.warmup_steps, 1))
        )
        self.scaler = torch.amp.GradScaler(session.device.type, enabled=session.dtype == torch.float16)

    def backward(self, timestep: int, noise: Tensor) -> Tensor:
        """The loss at a timestep with noise [frames, c, h, w]; leaves its gradients in the parameters."""
        x0, alpha_bar = self.session.latents, self.alpha_bars[timestep]
        self.optimizer.zero_grad(set_to_none=True)
        predicted = self.session.predict(add_noise(x0, noise, alpha_bar), timestep)
        target = training_target(x0, noise, alpha_bar, self.session.prediction)
        loss = torch.nn.functional.mse_loss(predicted, target)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def update(self, step: int, timestep: int, loss: Tensor) -> None:
        """Clip the gradients and apply them."""
        self.scaler.unscale_(self.optimizer)
        gradients: dict[str, Tensor] = {}
        if self.on_gradients is not None:
            gradients = {key: p.grad.clone() for key, p in self.trained.items() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.gradient_clip or math.inf)
        if self.on_gradients is not None:
            self.on_gradients(TuneStep(step, timestep, loss, norm, gradients))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()


def _run(
    descent: _Descent,
    costs: Mapping[str, memory.UnitCost],
    plan: memory.Plan,
    on_step: Callable[[int], None] | None,
) -> list[float]:
    """All steps; one that runs out of memory is repeated, like those behind it, with half of what was planned."""
    unet, steps = descent.session.unet, descent.settings.steps
    logging.info("Tune-A-Video: %s", plan)
    losses: list[Tensor] = []
    for step in range(steps):
        timestep, noise = descent.draw(step)
        # A copy, because a draw made in inference mode cannot be part of a differentiated target.
        noise = noise.to(descent.session.latents, copy=True)
        while True:
            try:
                with swapped(memory.planned_forwards(unet, plan)):
                    loss = descent.backward(timestep, noise)
                break
            except torch.cuda.OutOfMemoryError as error:  # of any device
                if plan.smallest:
                    raise RuntimeError(
                        "Out of memory, although all activations are recomputed. "
                        "Use fewer frames or a smaller size, or set train_scope to middle and up."
                    ) from error
            plan = memory.make_plan(costs, plan.bytes / 2)
            descent.optimizer.zero_grad(set_to_none=True)
            host.release_cached_memory()
            logging.warning("Tune-A-Video: out of memory in step %d; it is repeated with %s", step + 1, plan)
        descent.update(step, timestep, loss)
        losses.append(loss)
        if step % _LOSS_CHECK_INTERVAL == _LOSS_CHECK_INTERVAL - 1 or step == steps - 1:
            _check_finite(losses[-_LOSS_CHECK_INTERVAL:], step)
        if on_step is not None:
            on_step(step)
    return torch.stack(losses).tolist() if losses else []


def _check_finite(recent: list[Tensor], step: int) -> None:
    if not torch.isfinite(torch.stack(recent)).all():
        raise RuntimeError(
            f"The loss stopped being a finite number around step {step + 1}. "
            "Lower learning_rate, or set precision to fp32 or bf16."
        )
