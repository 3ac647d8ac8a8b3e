"""One-shot tuning: a model and one clip in, a MOTION out (paper, section 4.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import host
from .inflate import Inflation, build_temporal, initial_temporal, temporal_layers, transformer_blocks
from .schedule import add_noise, alphas_cumprod, training_target
from .trainable import CastingOperations, TrainScope, in_scope
from .weights import QUERY_SUFFIX, Motion, check_fits

# How often the loss is read back: often enough to stop early on a NaN, seldom enough not to stall a GPU.
_LOSS_CHECK_INTERVAL = 10


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
    draw: Draw | None = None,
    on_gradients: Callable[[TuneStep], None] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> tuple[Motion, list[float]]:
    """Tune query projections and temporal layers on one clip.

    ``model``: a ComfyUI ModelPatcher without inflation; LoRAs on it are part of what is tuned on.
    ``latents``: the clip [frames, c, h, w] in the host's LATENT scale. ``conditioning``: a ComfyUI
    conditioning of one prompt. ``motion``: weights to go on from. ``precision``: compute dtype, None for the
    model's own; what learns is float32 always. ``draw(step)``: timestep and noise [frames, c, h, w], for
    runs that must repeat given draws. ``on_gradients`` sees each step before its update; ``on_step`` is
    called after it, may raise to stop.

    Returns the motion (float32, without metadata) and the loss of every step. Raises ValueError for inputs
    that don't fit together, RuntimeError when the loss is no longer finite.
    """
    unet = host.unet_of(model)
    shapes = host.query_shapes(model)
    if motion is not None:
        check_fits(motion, shapes, host.family(model))
    start = {} if motion is None else {key: value.float() for key, value in motion.tensors.items()}

    with host.training_unet(model, latents, conditioning, precision) as session:

        def scope(path: str) -> bool:
            return in_scope(path, settings.train_scope)

        temporal = initial_temporal(unet, scope, settings.seed)
        temporal.update({k: v for k, v in start.items() if not k.endswith(QUERY_SUFFIX)})
        root = build_temporal(unet, temporal, CastingOperations, torch.float32).to(session.device)
        layers = temporal_layers(root)

        queries: dict[str, Tensor] = {}
        base: dict[str, Tensor] = {}
        trained: dict[str, torch.nn.Parameter] = {}
        for block in transformer_blocks(unet):
            for name in ("attn1", "attn2"):
                path = f"{block}.{name}.to_q"
                delta = start.get(path + QUERY_SUFFIX)
                if delta is None and not scope(block):
                    continue
                weight = session.weight(path)
                base[path] = weight.to("cpu", copy=True)
                query = torch.nn.Parameter(weight if delta is None else weight + delta.to(weight), scope(block))
                queries[path + ".weight"] = query
                if scope(block):
                    trained[path + QUERY_SUFFIX] = query
            if scope(block):
                layers[block].attn_temp.requires_grad_(True)
                for leaf, parameter in layers[block].attn_temp.named_parameters():
                    trained[f"{block}.attn_temp.{leaf}"] = parameter

        with session.prepared(inflation, layers, queries):
            losses = _descend(session, trained, settings, draw, on_gradients, on_step)

        tensors = {k: v.detach().cpu().clone() for k, v in root.state_dict().items()}
        for path, initial in base.items():
            tensors[path + QUERY_SUFFIX] = queries[path + ".weight"].detach().cpu() - initial
    return Motion(tensors), losses


def _descend(
    session: host.TrainingUNet,
    trained: Mapping[str, torch.nn.Parameter],
    settings: TuneSettings,
    draw: Draw | None,
    on_gradients: Callable[[TuneStep], None] | None,
    on_step: Callable[[int], None] | None,
) -> list[float]:
    """AdamW on the mean squared error of the model's own prediction target."""
    x0, prediction = session.latents, session.prediction
    alpha_bars = alphas_cumprod(session.sigmas).tolist()
    draw = draw or seeded_draw(x0, len(alpha_bars), settings.seed)
    parameters = list(trained.values())
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    warmup = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    )
    scaler = torch.amp.GradScaler(session.device.type, enabled=session.dtype == torch.float16)
    losses: list[Tensor] = []

    for step in range(settings.steps):
        timestep, noise = draw(step)
        # A copy, because a draw made in inference mode cannot be part of a differentiated target.
        noise = noise.to(x0, copy=True)
        noisy = add_noise(x0, noise, alpha_bars[timestep])
        target = training_target(x0, noise, alpha_bars[timestep], prediction)
        predicted = session.predict(noisy, timestep)
        loss = torch.nn.functional.mse_loss(predicted, target)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        limit = settings.gradient_clip or math.inf
        if on_gradients is not None:
            gradients = {key: p.grad.clone() for key, p in trained.items() if p.grad is not None}
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        if on_gradients is not None:
            on_gradients(TuneStep(step, timestep, loss.detach(), grad_norm, gradients))
        scaler.step(optimizer)
        scaler.update()
        warmup.step()
        losses.append(loss.detach())
        if step % _LOSS_CHECK_INTERVAL == _LOSS_CHECK_INTERVAL - 1 or step == settings.steps - 1:
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
