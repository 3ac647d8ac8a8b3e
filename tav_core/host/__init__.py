"""Everything the pack asks of ComfyUI; no other folder but ``tiny_sd`` imports ``comfy``.

Written against ComfyUI 0.3.64 and 0.26.0. The engine of November 2024 that PyPI carries (without wrappers or
attachments) runs the same code through ``set_model_unet_function_wrapper``.
"""

from .clip import (
    encode_edit,
    image_embeddings,
    text_embedding,
)
from .controlled import (
    controlled_guider,
    find_mask,
)
from .inflated_model import (
    InflationRecord,
    carried_motion,
    check_motion,
    inflate_model,
    inflation_of,
    without_inflation,
)
from .inputs import (
    check_conditioning,
    check_latent,
    check_prediction,
    check_single_prompt,
    left_out_of_tuning,
    small_clip,
)
from .lend import (
    WeightAndBias,
    check_lending,
    lent,
    resident_dtype,
)
from .memory import (
    computes_bfloat16,
    evictable_memory,
    free_memory,
    is_ram,
    offload_weights,
    put_models_aside,
    release_cached_memory,
    weights_on_device,
)
from .model import (
    Conditioning,
    ModelPatcher,
    check_model,
    context_width,
    current_device,
    family,
    inference_dtype,
    model_scale,
    prediction_type,
    query_shapes,
    sigma_table,
    unet_of,
)
from .progress import (
    progress_bar,
    raise_if_cancelled,
    saves_workflows,
)
from .sampling import (
    StepCallback,
    paste_masked,
    run_sampler,
)
from .stored import (
    is_coarse,
    stored_tensors,
    weight_shape,
)
from .training import (
    UNetConditions,
    latents_in,
    load_for_training,
    unet_conditions,
    without_injections,
)

__all__ = [
    "Conditioning",
    "InflationRecord",
    "ModelPatcher",
    "StepCallback",
    "UNetConditions",
    "WeightAndBias",
    "carried_motion",
    "check_conditioning",
    "check_latent",
    "check_lending",
    "check_model",
    "check_motion",
    "check_prediction",
    "check_single_prompt",
    "computes_bfloat16",
    "context_width",
    "controlled_guider",
    "current_device",
    "find_mask",
    "encode_edit",
    "evictable_memory",
    "family",
    "free_memory",
    "image_embeddings",
    "inference_dtype",
    "inflate_model",
    "inflation_of",
    "is_coarse",
    "is_ram",
    "latents_in",
    "left_out_of_tuning",
    "lent",
    "load_for_training",
    "model_scale",
    "offload_weights",
    "paste_masked",
    "prediction_type",
    "progress_bar",
    "put_models_aside",
    "query_shapes",
    "raise_if_cancelled",
    "release_cached_memory",
    "resident_dtype",
    "run_sampler",
    "saves_workflows",
    "sigma_table",
    "small_clip",
    "stored_tensors",
    "text_embedding",
    "unet_conditions",
    "unet_of",
    "weight_shape",
    "weights_on_device",
    "without_inflation",
    "without_injections",
]
