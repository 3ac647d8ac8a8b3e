"""Build ComfyUI models around a UNet of any configuration, for tests and benchmarks. Call load_engine first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import torch
from torch import Tensor

_COMMON: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_checkpoint": False,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
_TINY: dict[str, Any] = {
    **_COMMON,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1],
    "context_dim": 32,
    "num_heads": 4,
    "num_head_channels": -1,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
}
UNETS: dict[str, dict[str, Any]] = {
    "tiny": _TINY,
    "tiny-sdxl": {
        **_TINY,
        "transformer_depth": [0, 2],
        "transformer_depth_middle": 2,
        "transformer_depth_output": [0, 0, 2, 2],
        "num_heads": -1,
        "num_head_channels": 16,
        "use_linear_in_transformer": True,
        "num_classes": "sequential",
        "adm_in_channels": 48,
    },
    "sd15": {
        **_TINY,
        "model_channels": 320,
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "context_dim": 768,
        "num_heads": 8,
    },
}
UNETS["sd21"] = {
    **UNETS["sd15"],
    "context_dim": 1024,
    "num_heads": -1,
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
}
UNETS["sdxl"] = {
    **UNETS["sd21"],
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "context_dim": 2048,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
UNETS["tiny-v"] = {**_TINY, "use_linear_in_transformer": True, "num_heads": -1, "num_head_channels": 8}


def build_model(
    unet_config: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
    prediction: str = "epsilon",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    operations: Any = None,
) -> Any:
    """Build a ModelPatcher like a checkpoint loader's. Its parameters are inference tensors, as on a server.

    ``weights``: the UNet's state dict. None: random weights from ``seed``, scaled so that every layer has an effect.
    ``compute_dtype``: None for ``dtype``. ``operations``: layer classes in the place of the host's own choice, which
    take ``weights`` as they are.
    """
    with torch.inference_mode():
        config: Any = type(
            "Config",
            (comfy.supported_models_base.BASE,),
            {"unet_extra_config": {}, "latent_format": comfy.latent_formats.SD15},
        )({**unet_config, "dtype": dtype})
        config.manual_cast_dtype, config.custom_operations = compute_dtype, operations
        kinds = comfy.model_base.ModelType
        kind = kinds.V_PREDICTION if prediction == "v" else kinds.EPS
        base = comfy.model_base.SDXL if config.unet_config.get("adm_in_channels") else comfy.model_base.BaseModel
        model = _with_own_adm(base)(config, kind, device="cpu")
        if weights is None:
            randomize(model.diffusion_model, seed)
        else:
            cast = {k: v if operations else v.to(dtype) for k, v in weights.items()}
            model.diffusion_model.load_state_dict(cast)
        management = comfy.model_management
        return comfy.model_patcher.ModelPatcher(
            model, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
        )


def _with_own_adm(base: type) -> type:
    """Cut SDXL's vector conditioning, whose width is fixed, to the width that a small UNet takes."""
    if base is comfy.model_base.BaseModel:
        return base

    class Small(base):  # type: ignore[misc]
        def encode_adm(self, **kwargs: Any) -> Tensor:
            return super().encode_adm(**kwargs)[:, : self.adm_channels]

    return Small


def randomize(unet: torch.nn.Module, seed: int) -> None:
    """Draw weights in place, one layer at a time, so that a large UNet is never held twice."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in unet.state_dict().items():
        drawn = torch.randn(value.shape, generator=generator)
        if value.ndim > 1:
            drawn /= value[0].numel() ** 0.5
        else:
            drawn = 0.1 * drawn + (1.0 if name.endswith("weight") else 0.0)
        value.copy_(drawn)
