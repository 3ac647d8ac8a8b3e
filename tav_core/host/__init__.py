"""The one file that knows ComfyUI's internals.

Everything of ``comfy`` that the method needs goes through here. Written against ComfyUI 0.3.64 and 0.26.0;
the engine of November 2024 that PyPI carries (without wrappers or attachments) runs the same code through
``set_model_unet_function_wrapper``.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.ops
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import inflate
from ..inflate import Inflation, Layout, TemporalLayer
from ..motion.file import Motion, check_fits
from ..tuning import trainable
from ..tuning.frozen_layers import WeightAndBias

_KEY = "tune-a-video"
_UNET_PREFIX = "diffusion_model."
# In multiples of what the host reckons for evaluating the model on the same clip.
_ROOM_FOR_TRAINING = 4
# An image encoder takes this many pictures at a time.
_IMAGES_AT_ONCE = 16
_FAMILIES = {768: "SD1", 1024: "SD2", 2048: "SDXL"}

ModelPatcher = Any
Conditioning = Any


# --- what a MODEL is ---------------------------------------------------------------------------------


def unet_of(model: ModelPatcher) -> torch.nn.Module:
    """The UNet of a MODEL. Raises ValueError for models without one (DiT, video models, audio models)."""
    unet = getattr(model.model, "diffusion_model", None) or torch.nn.Module()
    if not inflate.transformer_blocks(unet) or not inflate.pooled_norms(unet):
        raise ValueError(
            f"model: {type(model.model).__name__} has no UNet with spatial transformer blocks. Tune-A-Video "
            "inflates Stable Diffusion 1.x, 2.x and SDXL; load one of those."
        )
    if any(hasattr(module, "time_stack") for module in unet.modules()):
        raise ValueError("model: this UNet is a video model already. Load an image model: SD 1.x, 2.x or SDXL.")
    return unet


def check_model(model: ModelPatcher) -> None:
    """Refuse a MODEL that is no Stable Diffusion UNet with a discrete schedule (ValueError)."""
    unet_of(model)
    prediction_type(model)


def query_shapes(model: ModelPatcher) -> dict[str, torch.Size]:
    """Shape of every query projection's weight of the model's UNet, by path."""
    return inflate.query_shapes(unet_of(model))


def context_width(model: ModelPatcher) -> int:
    """Width of the text embedding that the model's cross-attention takes."""
    block = next(iter(inflate.transformer_blocks(unet_of(model)).values()))
    return int(block.attn2.to_k.in_features)


def family(model: ModelPatcher) -> str:
    """ "SD1", "SD2" or "SDXL"; another width of text embedding is a family of its own."""
    width = context_width(model)
    return _FAMILIES.get(width, f"a model of text width {width}")


def prediction_type(model: ModelPatcher) -> str:
    """ "epsilon" or "v". Raises ValueError for other parametrisations (flow, EDM)."""
    sampling = model.get_model_object("model_sampling")
    known = comfy.model_sampling
    if hasattr(sampling, "sigmas") and isinstance(sampling, known.ModelSamplingDiscrete):
        if isinstance(sampling, known.V_PREDICTION) and not isinstance(sampling, known.EDM):
            return "v"
        others = (known.V_PREDICTION, getattr(known, "X0", known.EDM))
        if isinstance(sampling, known.EPS) and not isinstance(sampling, others):
            return "epsilon"
    raise ValueError(
        f"model: its sampling ({type(sampling).__mro__[1].__name__}) is neither epsilon- nor v-prediction on "
        "discrete timesteps. Remove the node that changes it (ModelSampling...), or load another model."
    )


def sigma_table(model: ModelPatcher) -> Tensor:
    """Noise level per training timestep, [train_steps], ascending."""
    prediction_type(model)
    return model.get_model_object("model_sampling").sigmas.detach().to("cpu", torch.float32, copy=True)


def check_latent(model: ModelPatcher, latent: Mapping[str, Any]) -> Tensor:
    """The samples of a LATENT, [frames, c, h, w]. Raises ValueError if they don't suit the model."""
    samples = latent["samples"]
    channels = model.get_model_object("latent_format").latent_channels
    if samples.ndim != 4:
        raise ValueError(
            f"latent: its shape is {list(samples.shape)}, but frames must lie on the batch axis: "
            "[frames, channels, height, width]. Encode the frames with the VAE Encode node of an image model."
        )
    if samples.shape[1] != channels:
        raise ValueError(
            f"latent: it has {samples.shape[1]} channels, the model takes {channels}. "
            "Encode the clip with the VAE of the model's own checkpoint."
        )
    if 0 in samples.shape:
        raise ValueError(f"latent: it is empty, its shape is {list(samples.shape)}. Load at least one frame.")
    if not torch.isfinite(samples).all():
        raise ValueError(
            "latent: it holds values that are not finite (NaN or infinity). Encode the clip again, "
            "with the VAE in fp32 if it was fp16."
        )
    mask = latent.get("noise_mask")
    if mask is not None and not torch.isfinite(mask).all():
        raise ValueError("latent: its noise mask holds values that are not finite (NaN or infinity). Draw it again.")
    return samples


def check_conditioning(model: ModelPatcher, name: str, conditioning: Conditioning, frames: int) -> None:
    """Refuse a CONDITIONING that the model or the clip cannot take. ``name``: of the input, for the message."""
    if not conditioning:
        raise ValueError(f"{name}: it is empty. Connect a CLIP Text Encode node.")
    width = context_width(model)
    for embedding, options in conditioning:
        pooled = options.get("pooled_output")
        if pooled is not None and not torch.isfinite(pooled).all():
            raise ValueError(f"{name}: its pooled text embedding holds NaN. Connect a CLIP Text Encode node.")
        if embedding.ndim != 3 or 0 in embedding.shape or not torch.isfinite(embedding).all():
            raise ValueError(
                f"{name}: a text embedding of shape {list(embedding.shape)} is not [prompts, tokens, width], or holds "
                "NaN. Connect a CLIP Text Encode node."
            )
        if embedding.shape[-1] != width:
            raise ValueError(
                f"{name}: its text embedding is {embedding.shape[-1]} wide, {family(model)} takes {width}. "
                "CLIP and model come from different families: use the CLIP of the model's own checkpoint."
            )
        if embedding.shape[0] not in (1, frames):
            raise ValueError(
                f"{name}: it holds {embedding.shape[0]} text embeddings for {frames} frames. "
                "Give one prompt for all frames, or one per frame."
            )
    length = getattr(model.model_options.get("context_handler"), "context_length", frames)
    if length < frames and any(_hints(options.get("control")) > 1 for _, options in conditioning):
        raise ValueError(
            f"{name}: it has a ControlNet with a hint for each frame, and the model looks at {length} of {frames} "
            "frames at a time. ComfyUI would give each window the hints of the first. Use one hint for all frames, or "
            "remove the context windows."
        )


def _hints(control: Any) -> int:
    """The most hints of a ControlNet and those before it; 0 for none."""
    most = 0
    while control is not None:
        hint = getattr(control, "cond_hint_original", None)
        most = max(most, 0 if hint is None else hint.shape[0])
        control = getattr(control, "previous_controlnet", None)
    return most


def check_prediction(samples: Tensor) -> Tensor:
    """``samples``, that a sampler gave. Raises RuntimeError if they are not finite: the model overflowed on the way."""
    if not torch.isfinite(samples).all():
        raise RuntimeError(
            "model: what it predicted is not finite (NaN or infinity). Half precision has overflowed, or the motion's "
            "strengths are too high: start ComfyUI with --fp32-unet or --bf16-unet, or lower them."
        )
    return samples


def model_scale(model: ModelPatcher) -> float:
    """Factor from LATENT scale to the model's own."""
    return float(model.get_model_object("latent_format").scale_factor)


def paste_masked(edited: Tensor, original: Tensor, noise_mask: Tensor) -> Tensor:
    """``edited`` where a LATENT's noise mask is 1, ``original`` where it is 0; both [frames, c, h, w]."""
    mask = comfy.sampler_helpers.prepare_mask(noise_mask, edited.shape, edited.device)
    return edited * mask + original.to(edited) * (1 - mask)


def inference_dtype(model: ModelPatcher) -> torch.dtype:
    """The dtype the host computes the model in."""
    return model.model.manual_cast_dtype or model.model.get_dtype()


# --- inflation ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inflated:
    """What ``inflate_model`` put on a MODEL: kept with it, so that it can be read and taken off again."""

    inflation: Inflation
    motion: Motion | None
    query_strength: float

    def deltas(self) -> dict[str, Tensor]:
        """The very tensors that went into weight patches, by the path of their weight."""
        return {} if self.motion is None else self.motion.query_deltas()


class _HostBackend:
    """Inflation's needs (``inflate.Backend``) met by the host: its attention, its weight casting."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int, **options: Any) -> Tensor:
        attention = comfy.ldm.modules.attention.optimized_attention
        if not _passes_options(attention):
            options.pop("transformer_options", None)
        return attention(q, k, v, heads, **options)

    def affine(self, norm: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = fetch(norm, x)
        assert bias is not None
        return weight, bias


def _passes_options(attention: Callable[..., Tensor]) -> bool:
    parameters = inspect.signature(attention).parameters.values()
    return any(p.kind is p.VAR_KEYWORD or p.name == "transformer_options" for p in parameters)


def fetch(module: torch.nn.Module, x: Tensor) -> WeightAndBias:
    """Weight and bias of a UNet layer for use with x: cast, moved and patched as the host would."""
    if hasattr(module, "comfy_cast_weights"):
        return comfy.ops.cast_bias_weight(module, x)
    return module.weight.to(x), None if module.bias is None else module.bias.to(x)  # type: ignore[return-value]


def inflation_of(model: ModelPatcher) -> Inflated | None:
    """What inflation a MODEL carries, if any."""
    return getattr(model, "attachments", {}).get(_KEY)


def inflate_model(
    model: ModelPatcher,
    inflation: Inflation,
    motion: Motion | None = None,
    query_strength: float = 1.0,
) -> ModelPatcher:
    """A clone of a MODEL that sees its batch as frames of video; replaces an inflation it carries already.

    ``motion``: tuned weights; their query deltas are weight patches of ``query_strength``, which stack with
    LoRAs in any order. The loaded model itself is not touched. Raises ValueError for models and motions that
    don't fit.
    """
    unet = unet_of(model)
    if motion is not None:
        check_fits(motion, inflate.query_shapes(unet), family(model))
    model = deflated(model)
    layers: dict[str, TemporalLayer] = {}
    if motion is not None:
        patches = {_UNET_PREFIX + path: ("diff", (delta,)) for path, delta in motion.query_deltas().items()}
        model.add_patches(patches, query_strength)
        root = inflate.build_temporal(unet, motion.temporal(), comfy.ops.manual_cast, inference_dtype(model))
        layers = inflate.temporal_layers(root)
        if layers and hasattr(model, "set_additional_models"):
            patcher = comfy.model_patcher.ModelPatcher(root, model.load_device, model.offload_device)
            model.set_additional_models(_KEY, [patcher])
    _wrap(model, inflation, layers)
    if hasattr(model, "set_attachments"):
        model.set_attachments(_KEY, Inflated(inflation, motion, query_strength))
    return model


class _Windows:
    """Keys and values of a long video's first frame, for context windows that do not hold it.

    The host evaluates a long video window by window. Whenever a window holds frame 0, what the spatial attentions
    see of it is kept, one frame's worth, and the windows after it attend to that in the place of their own first
    frame. So ST-Attn has its anchor at no cost. A window that comes before any that holds frame 0 (looped
    schedules) sees that of the step before, or its own first frame.
    """

    def __init__(self) -> None:
        # By the run's sigmas, which live as long as the run.
        self._runs: Any = WeakIdKeyDictionary()

    def first_frame(self, layout: Layout, transformer_options: Mapping[str, Any]) -> inflate.FirstFrame | None:
        """What ``inflated_forwards`` wants for one call; None for a video in one piece."""
        window, sigmas = transformer_options.get("context_window"), transformer_options.get("sample_sigmas")
        indices = getattr(window, "index_list", None)
        if indices is None or sigmas is None:
            return None
        kept: dict[Any, Tensor] = self._runs.setdefault(sigmas, {})
        # A prompt's own identity: several may share one number in cond_or_uncond.
        conds = transformer_options.get("uuids") or transformer_options.get("cond_or_uncond") or [0]
        # Newer hosts put the frame before a window in front of it, so that the first has its previous one.
        ahead = layout.frames - len(indices)
        at = indices.index(0) + ahead if 0 in indices else None

        def first_frame(path: str, name: str, tokens: Tensor) -> Tensor | None:
            if at is not None:
                first = tokens[:, at : at + 1]
                for cond, one in zip(conds, first, strict=True):
                    kept[path, name, cond] = one.clone()
                return first
            found = [kept.get((path, name, cond)) for cond in conds]
            if any(one is None or one.shape[1:] != tokens.shape[2:] for one in found):
                return None
            return torch.stack([one for one in found if one is not None])

        return first_frame


def _wrap(model: ModelPatcher, inflation: Inflation, layers: Mapping[str, TemporalLayer]) -> None:
    """Have every evaluation of the model run inflated."""

    windows = _Windows()

    def swaps(base_model: torch.nn.Module, rows: int, transformer_options: Mapping[str, Any]) -> Any:
        unet = base_model.diffusion_model
        # The host runs several conditionings in one batch, each a whole video.
        videos = len(transformer_options.get("cond_or_uncond", ())) or 1
        layout = Layout(frames=rows // videos, videos=videos)
        unet = getattr(unet, "_orig_mod", unet)  # torch.compile's wrapper around the module
        first = windows.first_frame(layout, transformer_options)
        forwards = inflate.inflated_forwards(unet, inflation, layers, layout, _HostBackend(), first)  # type: ignore[arg-type]
        return inflate.swapped(forwards)

    if hasattr(model, "add_wrapper_with_key"):
        # Around apply_model, not around the UNet's forward: so the swaps also enclose a compiled UNet.
        def apply_model(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
            given = inspect.signature(executor.original).bind(*args, **kwargs).arguments
            with swaps(executor.class_obj, given["x"].shape[0], given.get("transformer_options", {})):
                return executor(*args, **kwargs)

        one_step: Any = WeakIdKeyDictionary()

        def predict_noise(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
            given = inspect.signature(executor.original).bind(*args, **kwargs)
            options = given.arguments.get("model_options", {})
            handler = options.get("context_handler")
            if hasattr(handler, "set_step"):
                fitted = one_step.setdefault(handler, _for_frames(handler))
                given.arguments["model_options"] = {**options, "context_handler": fitted}
            return executor(*given.args, **given.kwargs)

        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, _KEY, apply_model)
        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, _KEY, predict_noise)
    else:

        def unet_function(apply_model: Any, args: Mapping[str, Any]) -> Tensor:
            with swaps(apply_model.__self__, args["input"].shape[0], args["c"]["transformer_options"]):
                return apply_model(args["input"], args["timestep"], **args["c"])

        model.set_model_unet_function_wrapper(unet_function)


def _for_frames(handler: Any) -> Any:
    """A copy of a handler of context windows that takes a timestep for each frame.

    The host's compares them with all sigmas of the run, element by element; ComfyUI 0.3.64 fails then, unless there
    are as many frames as sigmas, as it thinks of models whose batch is one video.
    """
    fitted, kind = copy.copy(handler), type(handler)
    fitted.set_step = lambda timestep, *args, **kwargs: kind.set_step(fitted, timestep[:1], *args, **kwargs)
    return fitted


def deflated(model: ModelPatcher) -> ModelPatcher:
    """A clone of a MODEL without inflation and motion; LoRAs and everything else stay."""
    inflated = inflation_of(model)
    model = model.clone()
    if inflated is None:
        return model
    deltas = inflated.deltas()
    ours = {id(delta) for delta in deltas.values()}
    for path in deltas:
        key = _UNET_PREFIX + path
        others = [patch for patch in model.patches.get(key, []) if not _holds(patch, ours)]
        if others:
            model.patches[key] = others
        else:
            model.patches.pop(key, None)
    model.add_patches({})  # gives the changed set of patches an identity of its own
    model.remove_additional_models(_KEY)
    for kind in (comfy.patcher_extension.WrappersMP.APPLY_MODEL, comfy.patcher_extension.WrappersMP.PREDICT_NOISE):
        model.remove_wrappers_with_key(kind, _KEY)
    model.remove_attachments(_KEY)
    return model


def _holds(patch: tuple[Any, ...], tensors: set[int]) -> bool:
    value = patch[1]
    return isinstance(value, tuple) and value[0] == "diff" and id(value[1][0]) in tensors


def carried_motion(model: ModelPatcher) -> Motion | None:
    """The motion a MODEL carries, at the strengths it carries it with."""
    inflated = inflation_of(model)
    if inflated is None or inflated.motion is None:
        return None
    strength = {".diff": inflated.query_strength, ".to_out.0.weight": inflated.inflation.temporal_strength}
    strength[".to_out.0.bias"] = strength[".to_out.0.weight"]
    scaled = {
        key: value * next((s for suffix, s in strength.items() if key.endswith(suffix)), 1.0)
        for key, value in inflated.motion.tensors.items()
    }
    return replace(inflated.motion, tensors=scaled)


# --- training ----------------------------------------------------------------------------------------


class Converted:
    """Weights as they are computed with, for a model that keeps them in another dtype.

    To convert them anew in every step takes about a tenth of its time; to keep the results takes memory, so it is
    done only while ``keep`` is set. Weights that the host keeps elsewhere are not kept here either.
    """

    def __init__(self, unet: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self.keep = False
        self._unet, self._device, self._dtype = unet, device, dtype
        self._kept: dict[torch.nn.Module, WeightAndBias] = {}

    def _is_converted(self, module: torch.nn.Module) -> bool:
        weight = module.weight
        return isinstance(weight, Tensor) and weight.dtype != self._dtype and weight.device == self._device

    @property
    def bytes(self) -> int:
        """Bytes that all of them take, kept or not."""
        layers = (m for m in self._unet.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d))
        return sum(m.weight.numel() * self._dtype.itemsize for m in layers if self._is_converted(m))

    def fetch(self, module: torch.nn.Module, x: Tensor) -> WeightAndBias:
        """As ``fetch``."""
        if module in self._kept:
            return self._kept[module]
        found = fetch(module, x)
        if self.keep and x.dtype == self._dtype and self._is_converted(module):
            self._kept[module] = found
        return found

    def drop(self) -> None:
        """Keep none any longer."""
        self.keep = False
        self._kept.clear()


@dataclass(frozen=True)
class TrainingUNet:
    """A loaded UNet to tune on a clip; made by ``training_unet``.

    ``latents``: the clip [frames, c, h, w], float32, in the UNet's own (variance-preserving) scale.
    ``sigmas``: noise level per training timestep. ``prediction``: "epsilon" or "v".
    """

    model: ModelPatcher
    unet: torch.nn.Module
    latents: Tensor
    sigmas: Tensor
    prediction: str
    context: Tensor
    extra: Mapping[str, Tensor]
    concat: Tensor | None
    device: torch.device
    dtype: torch.dtype
    converted: Converted

    def weight(self, path: str) -> Tensor:
        """A copy of a layer's weight as the model uses it (LoRAs applied), float32, on the device."""
        weight, _ = fetch(self.unet.get_submodule(path), torch.empty(0, device=self.device))
        return weight.detach().clone()

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """All that a prediction is made from: latents, conditioning, sigmas and every layer's weight and bias.

        Weights as the model uses them (LoRAs applied), in the dtype that they are kept in.
        """
        yield from (("latents", self.latents), ("sigmas", self.sigmas), ("context", self.context))
        yield from sorted(self.extra.items())
        if self.concat is not None:
            yield "concat", self.concat
        for path, module in self.unet.named_modules():
            if isinstance(getattr(module, "weight", None), Tensor):
                weight, bias = fetch(module, torch.empty(0, device=self.device))
                yield f"{path}.weight", weight.to(module.weight.dtype)
                if bias is not None:
                    yield f"{path}.bias", bias.to(module.weight.dtype)

    @contextmanager
    def prepared(
        self,
        inflation: Inflation,
        layers: Mapping[str, TemporalLayer],
        queries: Mapping[str, Tensor],
        frames: int,
    ) -> Iterator[None]:
        """Within: ``predict`` is inflated and differentiable in the temporal layers and ``queries``.

        ``frames``: of the clips that will be given to ``predict``.
        """
        backend = trainable.TrainingBackend(fetch)
        layout = Layout(frames=frames, videos=1)
        forwards = trainable.training_forwards(self.unet, queries, self.context, self.converted.fetch, backend)
        with inflate.swapped(forwards):
            inflated = inflate.inflated_forwards(self.unet, inflation, layers, layout, backend)
            with inflate.swapped(inflated):
                yield

    def predict(self, noisy: Tensor, timestep: int) -> Tensor:
        """The UNet's output, float32, for noisy latents [frames, c, h, w] in its own scale.

        Conditioning that comes per frame fits the tuned clip; for a clip of another length its first row
        stands for all.
        """
        frames = noisy.shape[0]

        def rows(value: Tensor) -> Tensor:
            return value if value.shape[0] == frames else value[:1].expand(frames, *value.shape[1:])

        x = noisy.to(self.dtype)
        if self.concat is not None:
            x = torch.cat([x, rows(self.concat)[..., : x.shape[-2], : x.shape[-1]]], dim=1)
        t = torch.full((frames,), float(timestep), device=self.device)
        extra = {key: rows(value) for key, value in self.extra.items()}
        return self.unet(x, t, context=rows(self.context), transformer_options={}, **extra).float()


@contextmanager
def training_unet(
    model: ModelPatcher, latents: Tensor, conditioning: Conditioning, precision: torch.dtype | None
) -> Iterator[TrainingUNet]:
    """Load a MODEL onto its device and leave inference mode, for as long as the context lasts.

    Nodes run in inference mode, where nothing can be differentiated. The loaded weights stay the host's and
    are only read.
    """
    dtype = precision or inference_dtype(model)
    inference = model.memory_required(latents.shape)
    # Have other models make room as far as they can, but rather recompute activations than offload weights.
    comfy.model_management.load_models_gpu(
        [model], memory_required=_ROOM_FOR_TRAINING * inference, minimum_memory_required=inference
    )
    device = model.load_device
    with torch.inference_mode(False), torch.enable_grad():
        x0 = model.model.process_latent_in(latents.detach().clone().float().to(device))
        conds = comfy.sampler_helpers.convert_cond(conditioning)
        conds = comfy.samplers.encode_model_conds(
            model.model.extra_conds, conds, x0, device, "positive", latent_image=x0, denoise_mask=None, seed=0
        )[0]["model_conds"]

        def ready(value: Tensor) -> Tensor:
            return value.detach().clone().to(device, dtype)

        frames = x0.shape[0]
        extra = {
            key: ready(cond.process_cond(batch_size=frames, device=device, area=None).cond)
            for key, cond in conds.items()
            if key not in ("c_crossattn", "c_concat")
        }
        concat = conds.get("c_concat")
        yield TrainingUNet(
            model=model,
            unet=unet_of(model),
            latents=x0,
            sigmas=sigma_table(model),
            prediction=prediction_type(model),
            context=ready(conds["c_crossattn"].cond),
            extra=extra,
            concat=(
                None if concat is None else ready(concat.process_cond(batch_size=frames, device=device, area=None).cond)
            ),
            device=device,
            dtype=dtype,
            converted=Converted(unet_of(model), device, dtype),
        )


def free_memory(device: torch.device) -> float:
    """Bytes that can still be allocated on a device."""
    return float(comfy.model_management.get_free_memory(device))


def offload_weights(model: ModelPatcher, size: float) -> float:
    """Have the host move about so many bytes of a loaded MODEL's weights off its device; returns how many went.

    The layers fetch them from there then, one by one, as they do where the host loads a model in part.
    """
    if model.load_device == model.offload_device:
        return 0.0
    return float(model.partially_unload(model.offload_device, int(size)) or 0)


def weights_on_device(model: ModelPatcher) -> float:
    """Bytes of a MODEL's weights that are on its device."""
    return float(model.loaded_size())


def release_cached_memory() -> None:
    """Give back what PyTorch's allocator holds in reserve."""
    comfy.model_management.soft_empty_cache()


def put_models_aside() -> None:
    """Unload all models, as the host does when it runs out of memory; they are loaded again when they are needed."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


# --- CLIP ------------------------------------------------------------------------------------------


def image_embeddings(clip_vision: Any, images: Tensor) -> Tensor:
    """Embeddings [n, width], float32, of IMAGEs [n, h, w, 3 or 4] by a CLIP_VISION."""
    parts = [clip_vision.encode_image(part)["image_embeds"] for part in images.split(_IMAGES_AT_ONCE)]
    return torch.cat([part.float().cpu() for part in parts])


def text_embedding(clip: Any, text: str) -> Tensor:
    """A sentence's embedding [width], float32, in the space of the images' embeddings of the same CLIP.

    Raises ValueError for a CLIP without a text projection: checkpoints of SD 1.x don't have one.
    """
    _, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
    models = [module for module in clip.cond_stage_model.children() if hasattr(module, "return_projected_pooled")]
    if pooled is None or not models:
        raise ValueError("clip: it is not a CLIP text model. Connect Load CLIP with the text half of the clip_vision.")
    pooled = pooled[0].float().cpu()
    if len(models) == 1 and not models[0].return_projected_pooled:
        projection = models[0].transformer.text_projection.weight.detach().float().cpu()
        # What no file filled is zeros, or whatever lay in memory.
        if not torch.isfinite(projection).all() or projection.abs().max() in (0, 1) or projection.norm() > 1e3:
            raise ValueError(
                "clip: it has no text projection, so its sentences cannot be compared with images. Connect Load CLIP "
                "with a file that has it (clip_l.safetensors), not the CLIP of a checkpoint."
            )
        pooled = projection @ pooled
    return pooled


# --- sampling ----------------------------------------------------------------------------------------


def run_sampler(
    model: ModelPatcher,
    sampler: Callable[..., Tensor],
    sigmas: Tensor,
    positive: Conditioning,
    negative: Conditioning,
    guidance: float,
    latent: Tensor,
    noise: Tensor | None = None,
    noise_mask: Tensor | None = None,
    seed: int = 0,
    callback: Callable[[int, Tensor, Tensor, int], None] | None = None,
    **options: Any,
) -> Tensor:
    """Run a sampler function through the host's guider, so that whatever chains with a MODEL applies.

    ``latent`` [frames, c, h, w] in LATENT scale; ``noise`` is what is added to it at sigmas[0], none by
    default. ``options`` go to the sampler function. Returns samples in LATENT scale.
    """
    return comfy.sample.sample_custom(
        model,
        torch.zeros_like(latent) if noise is None else noise,
        guidance,
        comfy.samplers.KSAMPLER(partial(sampler, **options)),
        sigmas,
        positive,
        negative,
        latent,
        noise_mask=noise_mask,
        callback=callback,
        disable_pbar=callback is None,
        seed=seed,
    )
