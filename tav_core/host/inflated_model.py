"""Inflate a MODEL: a clone whose every evaluation sees its batch as frames of video."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import Refusal
from ..inflate import Evaluation, Forward, Inflation, Layout, Swap, inflated_forwards, own_forward, swapped
from ..motion.file import Motion, check_fits
from ..motion.low_rank import UP, expand, outline
from ..temporal import add_queries, build_temporal, query_layers, temporal_layers
from ..unet import Parts, Tree, parts_of
from .controlled import control_of
from .lend import WeightAndBias, lent
from .model import ModelPatcher, family, inference_dtype, predicts, query_shapes, unet_of
from .on_cpu import cpu_forwards, with_fused_attention
from .stored import UNET_PREFIX, is_coarse
from .windows import FirstFrameCache, for_frames, window_frames

_KEY = "tune-a-video"
# WrappersMP's names; hosts before them have no such module.
_WRAPPED = ("apply_model", "predict_noise", "outer_sample")


@dataclass(frozen=True)
class InflationRecord:
    """Inflation and motion that ``inflate_model`` put on a MODEL, kept with it so that they can be taken off again.

    ``deltas``: the tensors of query deltas, by the path of their weight; weight patches hold these very objects.
    """

    inflation: Inflation
    motion: Motion | None
    query_strength: float
    deltas: Mapping[str, Tensor]


class _HostBackend:
    """Inflation's needs (``inflate.Backend``) met by the host: its attention, its weight casting."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int, **options: Any) -> Tensor:
        attention = comfy.ldm.modules.attention.optimized_attention
        if not _passes_options(attention):
            options.pop("transformer_options", None)
        return attention(q, k, v, heads, **options)

    def affine(self, norm: torch.nn.Module, x: Tensor) -> AbstractContextManager[WeightAndBias]:
        return lent(norm, x)


@lru_cache(maxsize=1)
def _passes_options(attention: Callable[..., Tensor]) -> bool:
    parameters = inspect.signature(attention).parameters.values()
    return any(p.kind is p.VAR_KEYWORD or p.name == "transformer_options" for p in parameters)


def inflation_of(model: ModelPatcher) -> InflationRecord | None:
    """Return the inflation that a MODEL carries, None for a plain one."""
    return getattr(model, "attachments", {}).get(_KEY)


def check_motion(model: ModelPatcher, motion: Motion | None) -> None:
    """Refuse a motion that does not fit a MODEL (ValueError)."""
    if motion is not None:
        check_fits(outline(motion), query_shapes(model), family(model))
        tuned_for, here = motion.metadata.get("prediction_type"), predicts(model)
        if tuned_for is not None and here is not None and tuned_for != here:
            logging.warning(
                "Tune-A-Video: the motion was tuned on a model that predicts %s, and this one predicts %s: the edit "
                "will follow the clip badly. Load the checkpoint that it was tuned on.",
                str(tuned_for)[:20],
                here,
            )


def inflate_model(
    model: ModelPatcher,
    inflation: Inflation,
    motion: Motion | None = None,
    query_strength: float = 1.0,
) -> Any:
    """Return a clone of a MODEL that sees its batch as frames of video; replaces an inflation it carries already.

    ``motion``: tuned weights; their query deltas are weight patches of ``query_strength``, which stack with
    LoRAs in any order. Where a weight is stored in 8 bits, its delta is applied in the layer's forward instead: a patch
    would be rounded away. The loaded model itself is not touched. Raises ValueError for models and motions that don't
    fit.
    """
    unet = unet_of(model)
    check_motion(model, motion)
    inflated: Any = without_inflation(model)
    root = torch.nn.Module()
    deltas: dict[str, Tensor] = {}
    if motion is not None:
        whole = expand(motion)
        deltas = whole.query_deltas()
        coarse = {k: v for k, v in deltas.items() if is_coarse(unet.get_submodule(k.removesuffix(".weight")))}
        patches = {UNET_PREFIX + k: ("diff", (delta,)) for k, delta in deltas.items() if k not in coarse}
        inflated.add_patches(patches, query_strength)
        build = partial(_added_layers, unet, whole.temporal(), coarse, inference_dtype(inflated))
        root = build()
        if len(root._modules) and hasattr(inflated, "set_additional_models"):
            inflated.set_additional_models(_KEY, [_patcher(build, root, inflated)])
    _wrap(inflated, inflation, root, query_strength)
    if hasattr(inflated, "set_attachments"):
        inflated.set_attachments(_KEY, InflationRecord(inflation, motion, query_strength, deltas))
    return inflated


def _added_layers(
    unet: torch.nn.Module, temporal: Mapping[str, Tensor], coarse: Mapping[str, Tensor], dtype: torch.dtype
) -> torch.nn.Module:
    """Build a module of temporal layers, and of query deltas that cannot be weight patches, under the UNet's paths."""
    root = build_temporal(unet, temporal, comfy.ops.manual_cast, dtype)
    return add_queries(root, coarse, comfy.ops.manual_cast, dtype)


def _patcher(build: Callable[[], torch.nn.Module], root: torch.nn.Module, model: ModelPatcher) -> Any:
    """Return a patcher of ``root`` like those of the host's own loaders.

    The host makes further ones of what ``build`` returns: for each GPU, and without dynamic VRAM.
    """
    devices = model.load_device, model.offload_device

    def again(disable_dynamic: bool = False) -> Any:
        kind = comfy.model_patcher.ModelPatcher if disable_dynamic else _patcher_class()
        return kind(build(), *devices)

    patcher = _patcher_class()(root, *devices)
    patcher.cached_patcher_init = again, ()
    return patcher


def _patcher_class() -> Any:
    """Return the class that loads weights as they are used, where the host has that switched on."""
    return getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)


def _shuffle(transformer_options: Mapping[str, Any]) -> int:
    """Return a number of the step at hand, the same for all its conditionings and windows."""
    sigmas = transformer_options.get("sigmas")
    return 0 if sigmas is None else int(1e4 * float(sigmas.flatten()[0]))


def _layers_of(base_model: Any, default: torch.nn.Module) -> torch.nn.Module:
    """Return the layers that are loaded beside the model which runs: another GPU has its own."""
    patcher = getattr(base_model, "current_patcher", None)
    beside = patcher.get_additional_models_with_key(_KEY) if patcher is not None else []
    return beside[0].model if beside else default


def _with_delta(query: Any, delta: Any, strength: float) -> Forward:
    """Return a forward for a query projection whose stored weight is too coarse for a patch."""
    original = own_forward(query)
    if original is not None:  # another pack's: what it computes is kept
        return lambda x: torch.add(original(x), delta(x), alpha=strength)

    def forward(x: Tensor) -> Tensor:
        # As in training: the sum is made in float32, and the input is not quantised on hardware that would do so.
        exact = x.new_empty(0, dtype=torch.float32)
        # One loan at a time: hosts that copy in a stream of their own may reuse the memory of the one before.
        with lent(query, exact) as (weight, bias):
            tuned, bias = weight.clone(), None if bias is None else bias.to(x.dtype, copy=True)
        with lent(delta, exact) as (change, _):
            tuned.add_(change, alpha=strength)
        return torch.nn.functional.linear(x, tuned.to(x.dtype), bias)

    return forward


def layout_of(rows: int, transformer_options: Mapping[str, Any]) -> Layout:
    """Return how the rows of one evaluation are videos. Raises Refusal for tiles of context windows.

    The host runs several conditionings in one batch, each a whole video. A pack that cuts pictures into tiles stacks
    these as well, each with all conditionings (Tiled Diffusion): the host's sigmas, one a frame, tell how long a video
    is.
    """
    conds = len(transformer_options.get("cond_or_uncond", ())) or 1
    sigmas = transformer_options.get("sigmas")
    frames = 0 if sigmas is None or sigmas.ndim == 0 else len(sigmas)
    tiles = rows // (conds * frames) if frames > 1 and rows % (conds * frames) == 0 else 1
    windows = transformer_options.get("context_window"), window_frames(transformer_options, frames)
    if tiles > 1 and any(window is not None for window in windows):
        raise Refusal(
            "model",
            "tiles and context windows both divide the batch, and the frames of a tile cannot be told apart then",
            "Take the tiles (Tiled Diffusion) or the context windows off the model.",
        )
    return Layout(frames=rows // (conds * tiles), chunks=conds * tiles)


@dataclass(frozen=True)
class _Forwards:
    """The forwards of an inflated UNet, and all that they were made of: they serve until that changes.

    ``added``: the layers of ``_added_layers``. ``replaced``: modules, and the forwards of other packs that ours call.
    ``swaps``: with edit control, and without. ``on_cpu``: more of them, for that device.
    """

    tree: Tree
    parts: Parts
    added: torch.nn.Module
    replaced: list[tuple[torch.nn.Module, Forward | None]]
    evaluation: Evaluation
    swaps: dict[bool, list[Swap]]
    on_cpu: list[Swap]

    def serve(self, added: torch.nn.Module) -> bool:
        """Say whether they can be used for a call with these layers beside the UNet."""
        same = all(own_forward(module) is forward for module, forward in self.replaced)
        return added is self.added and same and self.tree.is_unchanged()


def _make_forwards(
    unet: torch.nn.Module, inflation: Inflation, added: torch.nn.Module, query_strength: float
) -> _Forwards:
    """Make the forwards of an inflated UNet; they hold parts of it, but not the UNet itself."""
    parts, evaluation, backend = parts_of(unet), Evaluation(Layout(1, 1)), _HostBackend()
    layers = temporal_layers(added)
    queries = {path: unet.get_submodule(path) for path in query_layers(added)}
    deltas = [(queries[path], _with_delta(queries[path], d, query_strength)) for path, d in query_layers(added).items()]
    swaps = {
        controlled: [*inflated_forwards(parts, inflation, layers, evaluation, backend, controlled), *deltas]
        for controlled in (False, True)
    }
    on_cpu = cpu_forwards(unet, parts.blocks, evaluation)
    called = (*parts.blocks.values(), *queries.values(), *(module for module, _ in on_cpu))
    replaced = [(module, own_forward(module)) for module in called]
    return _Forwards(Tree(unet), parts, added, replaced, evaluation, swaps, on_cpu)


def _wrap(model: Any, inflation: Inflation, root: torch.nn.Module, query_strength: float) -> None:
    """Have every evaluation of the model run inflated, with the layers in ``root`` or their copies on another GPU."""
    first_frames, backend = FirstFrameCache(), _HostBackend()
    # By UNet, since every GPU has one of its own. Making them takes longer than a small evaluation.
    made: Any = WeakIdKeyDictionary()

    def forwards_for(unet: torch.nn.Module, added: torch.nn.Module) -> _Forwards:
        found: _Forwards | None = made.get(unet)
        if found is None or not found.serve(added):
            found = made[unet] = _make_forwards(unet, inflation, added, query_strength)
        return found

    @contextmanager
    def inflated(base_model: Any, x: Tensor, transformer_options: Mapping[str, Any]) -> Iterator[None]:
        unet = base_model.diffusion_model
        shuffle = _shuffle(transformer_options) if inflation.attention == "shuffled groups" else 0
        layout = replace(layout_of(x.shape[0], transformer_options), shuffle=shuffle)
        unet = getattr(unet, "_orig_mod", unet)  # torch.compile's wrapper around the module
        control = control_of(layout, x, transformer_options)
        evaluation = Evaluation(layout, first_frames.lookup(layout, transformer_options), control)
        forwards = forwards_for(unet, _layers_of(base_model, root))
        swaps = forwards.swaps[control is not None]
        if x.device.type == "cpu":
            swaps = [*forwards.on_cpu, *swaps]
        if control is not None:
            swaps = [*swaps, *control.swaps(unet, forwards.parts.blocks, backend.attend, swaps)]
        with forwards.evaluation.of(evaluation), swapped(swaps):
            yield

    if hasattr(model, "add_wrapper_with_key"):
        # Around apply_model, not around the UNet's forward: so the swaps also enclose a compiled UNet.
        def apply_model(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
            given = inspect.signature(executor.original).bind(*args, **kwargs)
            x, options = given.arguments["x"], given.arguments.get("transformer_options", {})
            if x.device.type == "cpu":
                given.arguments["transformer_options"] = with_fused_attention(options)
            with inflated(executor.class_obj, x, options):
                return executor(*given.args, **given.kwargs)

        fitted: Any = WeakIdKeyDictionary()

        def predict_noise(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
            given = inspect.signature(executor.original).bind(*args, **kwargs)
            options = given.arguments.get("model_options", {})
            handler = options.get("context_handler")
            if hasattr(handler, "set_step"):
                per_frame = fitted.setdefault(handler, for_frames(handler))
                given.arguments["model_options"] = {**options, "context_handler": per_frame}
            return executor(*given.args, **given.kwargs)

        def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
            # The guider has options of its own in a run.
            first_frames.begin(executor.class_obj.model_options.setdefault("transformer_options", {}))
            return executor(*args, **kwargs)

        for kind, wrapper in zip(_WRAPPED, (apply_model, predict_noise, outer_sample), strict=True):
            model.add_wrapper_with_key(kind, _KEY, wrapper)
    else:

        def unet_function(apply_model: Any, args: Mapping[str, Any]) -> Tensor:
            with inflated(apply_model.__self__, args["input"], args["c"]["transformer_options"]):
                return apply_model(args["input"], args["timestep"], **args["c"])

        model.set_model_unet_function_wrapper(unet_function)


def without_inflation(model: ModelPatcher) -> Any:
    """Return a clone of a MODEL without inflation and motion; LoRAs and everything else stay."""
    record = inflation_of(model)
    clone: Any = model.clone()
    if record is None:
        return clone
    deltas = record.deltas
    ours = {id(delta) for delta in deltas.values()}
    for path in deltas:
        key = UNET_PREFIX + path
        others = [patch for patch in clone.patches.get(key, []) if not _holds(patch, ours)]
        if others:
            clone.patches[key] = others
        else:
            clone.patches.pop(key, None)
    clone.add_patches({})  # gives the changed set of patches an identity of its own
    clone.remove_additional_models(_KEY)
    for kind in _WRAPPED:
        clone.remove_wrappers_with_key(kind, _KEY)
    clone.remove_attachments(_KEY)
    return clone


def _holds(patch: tuple[Any, ...], tensors: set[int]) -> bool:
    value = patch[1]
    return isinstance(value, tuple) and value[0] == "diff" and id(value[1][0]) in tensors


def carried_motion(model: ModelPatcher, whole: bool = True) -> Motion | None:
    """Return the motion that a MODEL carries, at the strengths it carries it with; None for none.

    ``whole``: expand one of low rank.
    """
    record = inflation_of(model)
    if record is None or record.motion is None:
        return None
    motion = expand(record.motion) if whole else record.motion
    strength = {".diff": record.query_strength, ".to_out.0.weight": record.inflation.temporal_strength}
    strength[".to_out.0.bias"] = strength[".to_out.0.weight"]
    # Scaling one of two factors scales their product. The other factor's suffix matches no entry.
    scaled = {
        key: value * next((s for suffix, s in strength.items() if key.removesuffix(UP).endswith(suffix)), 1.0)
        for key, value in motion.tensors.items()
    }
    return replace(motion, tensors=scaled)
