"""A loaded UNet to tune on one clip: inflated, differentiable, its own again between calls."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import host
from ..errors import Refusal
from ..inflate import Evaluation, Inflation, Layout, Swap, inflated_forwards
from ..out_of_memory import naming_input
from ..temporal import TemporalLayer
from ..unet import parts_of
from .cast_cache import CastWeightCache
from .differentiable import TrainingBackend, training_forwards
from .factors import Factors
from .frame_window import window_length

_NO_MEMORY = (
    "Use fewer frames or a smaller size, set frames_per_step to fewer frames, set train_scope to middle and up, or "
    "close what else takes memory. The run's last written state is kept: queued again, it resumes from there."
)


@dataclass(frozen=True)
class TrainingUNet:
    """A loaded UNet and the clip that it is tuned on; made by ``training_unet``.

    ``module``: the host's UNet. ``latents``: the clip [frames, c, h, w], float32, in the UNet's own
    (variance-preserving) scale. ``sigmas``: noise level per training timestep. ``prediction``: "epsilon" or "v".
    """

    model: host.ModelPatcher
    module: torch.nn.Module
    latents: Tensor
    conditions: host.UNetConditions
    sigmas: Tensor
    prediction: str
    device: torch.device
    dtype: torch.dtype
    cast_cache: CastWeightCache

    def weight(self, path: str) -> Tensor:
        """Return a copy of a layer's weight as the model uses it (LoRAs applied), float32, on the device."""
        with host.lent(self.module.get_submodule(path), torch.empty(0, device=self.device)) as (weight, _):
            return weight.detach().clone()

    def fingerprint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor that decides a prediction: latents, conditioning, sigmas, weights and their patches."""
        yield from (("latents", self.latents), ("sigmas", self.sigmas), ("context", self.conditions.context))
        yield from sorted(self.conditions.extra.items())
        if self.conditions.concat is not None:
            yield "concat", self.conditions.concat
        yield from host.stored_tensors(self.model)

    def forwards(
        self,
        inflation: Inflation,
        layers: Mapping[str, TemporalLayer],
        queries: Mapping[str, Tensor | Factors],
        frames: int,
    ) -> list[Swap]:
        """Return the forwards with which ``predict`` is inflated and differentiable in ``layers`` and ``queries``.

        ``frames``: the length of the clips that ``predict`` will get.
        """
        backend = TrainingBackend(host.lent)
        evaluation = Evaluation(Layout(frames=frames, chunks=1))
        swaps = training_forwards(self.module, queries, self.conditions.context, self.cast_cache.lent, backend)
        return swaps + inflated_forwards(parts_of(self.module), inflation, layers, evaluation, backend)

    def check_windows(self) -> None:
        """Refuse a conditioning that windows of the clip cannot follow."""
        if len(self.conditions.context) > 1:
            raise Refusal(
                "frames_per_step",
                "conditioning has a text embedding for each frame, and the text's keys and values are made once",
                "Give one sentence for all frames, or set it to 0.",
            )

    def predict(self, noisy: Tensor, timestep: int, frames: Tensor | None = None) -> Tensor:
        """Return the UNet's output, float32, for noisy latents [frames, c, h, w] in its own scale.

        ``frames``: the numbers of the clip's frames that they are; None for all. Conditioning that comes per frame fits
        the tuned clip; for a clip of another length its first row stands for all. Call it within
        ``inflate.swapped(self.forwards(...))``.
        """
        count, whole = noisy.shape[0], len(self.latents)

        def rows(value: Tensor) -> Tensor:
            if frames is not None and 1 < value.shape[0] == whole:
                value = value[frames.to(value.device)]
            return value if value.shape[0] == count else value[:1].expand(count, *value.shape[1:])

        x, concat = noisy.to(self.dtype), self.conditions.concat
        if concat is not None:
            x = torch.cat([x, _as_large(rows(concat), x)], dim=1)
        t = torch.full((count,), float(timestep), device=self.device)
        extra = {key: rows(value) for key, value in self.conditions.extra.items()}
        return self.module(x, t, context=rows(self.conditions.context), transformer_options={}, **extra).float()


def _as_large(concat: Tensor, x: Tensor) -> Tensor:
    """Cut channels to add to x to its size; those of a clip smaller than the memory's probes begin again."""
    for dim in (-2, -1):
        index = torch.arange(x.shape[dim], device=concat.device) % concat.shape[dim]
        concat = concat.index_select(dim, index) if x.shape[dim] != concat.shape[dim] else concat
    return concat


def can_scale_gradients(device: torch.device) -> bool:
    """Say whether a GradScaler, which fp16 needs, works on a device: some lack the float64 that it reckons in."""
    parameter = torch.nn.Parameter(torch.zeros(1, device=device))
    parameter.grad = torch.zeros_like(parameter)
    try:
        scaler = torch.amp.GradScaler(device.type)
        scaler.scale(parameter.detach())
        scaler.unscale_(torch.optim.SGD([parameter], lr=0.0))
    except (RuntimeError, TypeError, AssertionError):
        return False
    return True


def _trainable_dtype(model: host.ModelPatcher, precision: torch.dtype | None) -> torch.dtype:
    """Return the compute dtype. Raises ValueError for an explicit fp16 on a device that cannot be tuned in it."""
    device, dtype = model.load_device, precision or host.inference_dtype(model)
    if dtype != torch.float16 or can_scale_gradients(device):
        return dtype
    if precision is not None:
        raise Refusal(
            "precision",
            f"fp16 cannot be tuned on this device ({device.type}): its gradients are scaled in float64, which the "
            "device or this PyTorch lacks",
            "Set it to auto, bf16 or fp32.",
        )
    instead = torch.bfloat16 if host.computes_bfloat16(device) else torch.float32
    logging.warning("Tune-A-Video: fp16 cannot be tuned on this device; precision is %s", str(instead)[6:])
    return instead


@contextmanager
def training_unet(
    model: host.ModelPatcher,
    latents: Tensor,
    conditioning: host.Conditioning,
    precision: torch.dtype | None = None,
    frames_per_step: int = 0,
) -> Iterator[TrainingUNet]:
    """Load a MODEL for tuning and leave inference mode, for as long as the context lasts.

    ``model``: a MODEL without inflation; LoRAs on it are part of what is tuned on. ``latents``: the clip
    [frames, c, h, w] in the host's LATENT scale. ``conditioning``: one prompt. ``precision``: compute dtype, None for
    the model's own. ``frames_per_step``: as in the settings, so that loading leaves room for as many. Nodes run in
    inference mode, where nothing can be differentiated. The loaded weights stay the host's and are only read. Raises
    ValueError for a model that cannot be tuned, and turns allocations that fail inside into OutOfMemoryError.
    """
    with naming_input("latent", _NO_MEMORY):
        host.check_model(model)
        if left_out := host.left_out_of_tuning(model, conditioning):
            logging.warning("Tune-A-Video: tuning runs without %s; sampling uses them", " and ".join(left_out))
        dtype = _trainable_dtype(model, precision)
        model = host.without_injections(model)
        length = window_length(len(latents), frames_per_step) or len(latents)
        with host.current_device(model.load_device):
            host.load_for_training(model, latents[:length].shape)
        with host.current_device(model.load_device), torch.inference_mode(False), torch.enable_grad():
            x0 = host.latents_in(model, latents)
            module = host.unet_of(model)
            host.check_lending(module, model.load_device, dtype)
            yield TrainingUNet(
                model=model,
                module=module,
                latents=x0,
                conditions=host.unet_conditions(model, conditioning, x0, dtype),
                sigmas=host.sigma_table(model),
                prediction=host.prediction_type(model),
                device=model.load_device,
                dtype=dtype,
                cast_cache=CastWeightCache(module, model.load_device, dtype),
            )
