"""Choose and build the weights that learn: query projections and temporal attention (paper, section 4.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..motion.file import QUERY_SUFFIX, Motion
from ..motion.low_rank import DOWN, UP
from ..temporal import TemporalLayer, build_temporal, initial_temporal, temporal_layers
from ..unet import transformer_blocks
from .factors import FactoredLinear, Factors, fresh_factors, rescaled
from .training_unet import TrainingUNet

TrainScope = Literal["all", "middle and up"]
TRAIN_SCOPES: tuple[TrainScope, ...] = get_args(TrainScope)


def in_scope(path: str, scope: TrainScope) -> bool:
    """Say whether a block learns. "all" is the paper; "middle and up" is what the released code trains in effect.

    Its reentrant activation checkpointing passes no gradient to the down blocks.
    """
    return scope == "all" or not path.startswith("input_blocks.")


def trained_bytes(unet: torch.nn.Module, scope: TrainScope, rank: int = 0) -> int:
    """Return the bytes of the weights that learn, float32, without building them. ``rank``: 0 for whole matrices."""
    numbers = 0
    for path, block in transformer_blocks(unet).items():
        if in_scope(path, scope):
            query = block.attn1.to_q
            inner, channels = query.out_features, query.in_features
            matrices = [(each.out_features, each.in_features) for each in (query, block.attn2.to_q)]
            matrices += [(inner, channels)] * 4
            numbers += channels + sum(
                min(rank, rows, columns) * (rows + columns) if rank else rows * columns for rows, columns in matrices
            )
    return numbers * torch.float32.itemsize


def frozen_bytes(unet: torch.nn.Module, scope: TrainScope, rank: int, dtype: torch.dtype) -> int:
    """Return the bytes of the temporal weights that a run of a rank keeps as they were drawn, in the compute dtype."""
    if not rank:
        return 0
    queries = [block.attn1.to_q for path, block in transformer_blocks(unet).items() if in_scope(path, scope)]
    return sum(3 * query.out_features * query.in_features for query in queries) * dtype.itemsize


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
    queries: Mapping[str, torch.nn.Parameter | Factors]
    trained: Mapping[str, torch.nn.Parameter]

    def motion(self, unet: TrainingUNet) -> Motion:
        """Return the temporal weights, and the queries' differences from the model's, on the CPU."""
        tensors = {key: value.detach().to("cpu", copy=True) for key, value in self.temporal.state_dict().items()}
        for path, query in self.queries.items():
            assert isinstance(query, Tensor)
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
    unet: TrainingUNet, train_scope: TrainScope, seed: int, start: Mapping[str, Tensor], rank: int = 0
) -> TrainableWeights:
    """Build the weights at the start of a run. ``start``: float32 tensors of a start motion, none for a fresh run.

    ``rank``: see ``factored_weights``; 0 for whole matrices.
    """
    if rank:
        return factored_weights(unet, train_scope, seed, start, rank)

    def scope(path: str) -> bool:
        return in_scope(path, train_scope)

    temporal = initial_temporal(unet.module, scope, seed)
    temporal.update({key: value for key, value in start.items() if not key.endswith(QUERY_SUFFIX)})
    root = build_temporal(unet.module, temporal, CastingOperations, torch.float32).to(unet.device)
    layers = temporal_layers(root)
    queries: dict[str, torch.nn.Parameter | Factors] = {}
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


@dataclass(frozen=True)
class FactoredWeights(TrainableWeights):
    """The weights of a run of low rank: changes as factors, on top of frozen weights; the rest as in full rank.

    ``tensors``: all that makes up the motion, by its key.
    """

    tensors: Mapping[str, Tensor]

    def motion(self, unet: TrainingUNet) -> Motion:
        """Return copies of ``tensors`` on the CPU, named as in a compressed motion; its metadata is the caller's."""
        return Motion({key: value.detach().to("cpu", copy=True) for key, value in self.tensors.items()})


def factored_weights(
    unet: TrainingUNet, train_scope: TrainScope, seed: int, start: Mapping[str, Tensor], rank: int
) -> FactoredWeights:
    """Build the weights at the start of a run of low rank.

    ``start``: float32 tensors of a compressed motion of this rank, none for a fresh run.
    """
    tensors: dict[str, Tensor] = {}
    trained: dict[str, torch.nn.Parameter] = {}

    def known(path: str) -> bool:
        return in_scope(path, train_scope) or f"{path}.attn_temp.to_q.weight{UP}" in start

    def learning(key: str, value: torch.nn.Parameter, block: str) -> None:
        tensors[key] = value.requires_grad_(in_scope(block, train_scope))
        if value.requires_grad:
            trained[key] = value

    def factors(key: str, shape: tuple[int, int], block: str) -> Factors:
        given = rescaled(start[key + UP], start[key + DOWN]) if key + UP in start else None
        up, down = given or fresh_factors(key, shape, rank, seed)
        found = Factors(up, down).to(unet.device)
        learning(key + UP, found.up, block)
        learning(key + DOWN, found.down, block)
        return found

    temporal = initial_temporal(unet.module, known, seed)
    temporal.update({key: value for key, value in start.items() if key in temporal})
    root = build_temporal(unet.module, temporal, CastingOperations, unet.dtype).to(unet.device)
    layers = temporal_layers(root)
    queries: dict[str, torch.nn.Parameter | Factors] = {}
    for block, module in transformer_blocks(unet.module).items():
        for path, query in ((f"{block}.attn1.to_q", module.attn1.to_q), (f"{block}.attn2.to_q", module.attn2.to_q)):
            key = path + QUERY_SUFFIX
            if in_scope(block, train_scope) or key + UP in start:
                queries[path + ".weight"] = factors(key, (query.out_features, query.in_features), block)
        if block not in layers:
            continue
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            key, last = f"{block}.attn_temp.{name}", name == "to_out.0"
            parent, _, leaf = name.rpartition(".")
            holder = layers[block].attn_temp.get_submodule(parent)
            layer: Any = holder.get_submodule(leaf)
            weight = layer.weight.detach()
            bias = torch.nn.Parameter(temporal[f"{key}.bias"].clone().to(unet.device)) if last else None
            if bias is not None:
                learning(f"{key}.bias", bias, block)
            # The output projection starts at zero.
            change = factors(f"{key}.weight", tuple(weight.shape), block)
            holder.add_module(leaf, FactoredLinear(None if last else weight, change, bias))
        # As they are in float32: the layer has them in the compute dtype.
        for leaf in ("weight", "bias"):
            tensors[f"{block}.norm_temp.{leaf}"] = temporal[f"{block}.norm_temp.{leaf}"]
    return FactoredWeights(root, layers, queries, trained, tensors)
