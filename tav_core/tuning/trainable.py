"""Choose and build the weights that learn: query projections and temporal attention (paper, section 4.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..motion.file import QUERY_SUFFIX, Motion
from ..temporal import TemporalLayer, build_temporal, initial_temporal, temporal_layers
from ..unet import transformer_blocks
from .training_unet import TrainingUNet

TrainScope = Literal["all", "middle and up"]
TRAIN_SCOPES: tuple[TrainScope, ...] = get_args(TrainScope)


def in_scope(path: str, scope: TrainScope) -> bool:
    """Say whether a block learns. "all" is the paper; "middle and up" is what the released code trains in effect.

    Its reentrant activation checkpointing passes no gradient to the down blocks.
    """
    return scope == "all" or not path.startswith("input_blocks.")


def trained_bytes(unet: torch.nn.Module, scope: TrainScope) -> int:
    """Return the bytes of the weights that learn, float32, without building them."""
    numbers = 0
    for path, block in transformer_blocks(unet).items():
        if in_scope(path, scope):
            queries = (block.attn1.to_q, block.attn2.to_q)
            inner, channels = queries[0].out_features, queries[0].in_features
            numbers += (
                sum(query.out_features * query.in_features for query in queries) + 4 * inner * channels + channels
            )
    return numbers * torch.float32.itemsize


class CastingOperations:
    """``torch.nn`` layers that keep float32 weights and compute in the dtype of their input."""

    class Linear(torch.nn.Linear):
        """Linear layer; see the enclosing class."""

        def forward(self, input: Tensor) -> Tensor:
            bias = None if self.bias is None else self.bias.to(input.dtype)
            return F.linear(input, self.weight.to(input.dtype), bias)

    class LayerNorm(torch.nn.LayerNorm):
        """Layer norm; see the enclosing class."""

        def forward(self, input: Tensor) -> Tensor:
            weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
            return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


@dataclass(frozen=True)
class TrainableWeights:
    """The weights of a tuning run, float32, on its device.

    ``queries``: query projection weights by path, those that learn and those that a start motion brings along.
    ``temporal``: the temporal layers; ``layers``: the same by block path. ``trained``: the parameters that learn,
    by motion key.
    """

    temporal: torch.nn.Module
    layers: Mapping[str, TemporalLayer]
    queries: Mapping[str, torch.nn.Parameter]
    trained: Mapping[str, torch.nn.Parameter]

    def motion(self, unet: TrainingUNet) -> Motion:
        """Return the temporal weights, and the queries' differences from the model's, on the CPU."""
        tensors = {key: value.detach().to("cpu", copy=True) for key, value in self.temporal.state_dict().items()}
        for path, query in self.queries.items():
            delta = query.detach() - unet.weight(path.removesuffix(".weight"))
            tensors[path.removesuffix(".weight") + QUERY_SUFFIX] = delta.cpu()
        return Motion(tensors)

    def gradient_bytes(self) -> dict[str, int]:
        """Return the bytes of gradients by transformer block."""
        found: dict[str, int] = {}
        for key, parameter in self.trained.items():
            block = key.partition(".attn")[0]
            found[block] = found.get(block, 0) + parameter.nbytes
        return found


def trainable_weights(
    unet: TrainingUNet, train_scope: TrainScope, seed: int, start: Mapping[str, Tensor]
) -> TrainableWeights:
    """Build the weights at the start of a run. ``start``: float32 tensors of a start motion, none for a fresh run."""

    def scope(path: str) -> bool:
        return in_scope(path, train_scope)

    temporal = initial_temporal(unet.module, scope, seed)
    temporal.update({key: value for key, value in start.items() if not key.endswith(QUERY_SUFFIX)})
    root = build_temporal(unet.module, temporal, CastingOperations, torch.float32).to(unet.device)
    layers = temporal_layers(root)
    queries: dict[str, torch.nn.Parameter] = {}
    trained: dict[str, torch.nn.Parameter] = {}
    for block in transformer_blocks(unet.module):
        for path in (f"{block}.attn1.to_q", f"{block}.attn2.to_q"):
            delta = start.get(path + QUERY_SUFFIX)
            if delta is None and not scope(block):
                continue
            weight = unet.weight(path)
            query = torch.nn.Parameter(weight if delta is None else weight + delta.to(weight), scope(block))
            queries[path + ".weight"] = query
            if scope(block):
                trained[path + QUERY_SUFFIX] = query
        if scope(block):
            layers[block].attn_temp.requires_grad_(True)
            for leaf, parameter in layers[block].attn_temp.named_parameters():
                trained[f"{block}.attn_temp.{leaf}"] = parameter
    return TrainableWeights(root, layers, queries, trained)
