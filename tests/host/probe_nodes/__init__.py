"""Nodes for the host tests only: they make inputs that no stock node makes, and look at what a model is given."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import folder_paths
import torch


class ProbeHints:
    """F different pictures of noise, for a ControlNet."""

    CATEGORY = "probe"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "count": ("INT",),
                "width": ("INT",),
                "height": ("INT",),
                "seed": ("INT",),
                "first": ("INT", {"default": 0}),
            }
        }

    def run(self, count, width, height, seed, first):
        """Hint i of seed s is the same whichever others are asked for."""
        hints = [
            torch.rand(height, width, 3, generator=torch.Generator().manual_seed(1000 * seed + i))
            for i in range(first, first + count)
        ]
        return (torch.stack(hints),)


class ProbeFramePrompts:
    """A prompt with an embedding for each frame, as packs that schedule prompts by the frame make them."""

    CATEGORY = "probe"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"conditioning": ("CONDITIONING",), "count": ("INT",)}}

    def run(self, conditioning, count):
        strengths = torch.linspace(0.2, 1.8, count)[:, None, None]
        return ([[embedding * strengths, dict(options)] for embedding, options in conditioning],)


class ProbeSeparateConds:
    """The model as a host that is short of memory runs it: one conditioning at a time."""

    CATEGORY = "probe"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def run(self, model):
        separate = model.clone()
        separate.add_object_patch("memory_required", lambda *args, **kwargs: 1e30)
        return (separate,)


class ProbeRecord:
    """Notes every call of the UNet: its chunks, and what ControlNet adds for each row of the batch."""

    CATEGORY = "probe"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "name": ("STRING",)}}

    @classmethod
    def IS_CHANGED(cls, **kwargs):
        return float("nan")

    def run(self, model, name):
        path = Path(folder_paths.get_output_directory()) / f"{name}.json"
        calls = []

        def record(apply_model, arguments):
            control = arguments["c"].get("control") or {}
            calls.append(
                {
                    "chunks": list(arguments["cond_or_uncond"]),
                    "rows": arguments["input"].shape[0],
                    "control": {
                        block: [added.flatten(1)[:, :64].tolist() for added in layers if added is not None]
                        for block, layers in control.items()
                    },
                }
            )
            path.write_text(json.dumps(calls))
            return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

        recorded = model.clone()
        recorded.set_model_unet_function_wrapper(record)
        return (recorded,)


class ProbeImagePrompt:
    """Patches every cross-attention as IPAdapter does: attention to further tokens is added to the text's."""

    CATEGORY = "probe"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "strength": ("FLOAT",), "seed": ("INT",)}}

    def run(self, model, strength, seed):
        from comfy.ldm.modules.attention import optimized_attention

        patched = model.clone()

        def attend(q, k, v, extra_options):
            out = optimized_attention(q, k, v, extra_options["n_heads"])
            rows = q.shape[0] // len(extra_options["cond_or_uncond"])
            generator = torch.Generator().manual_seed(seed)
            tokens = torch.randn(2, 1, 4, q.shape[-1], generator=generator).to(q)
            for position, chunk in enumerate(extra_options["cond_or_uncond"]):
                if chunk == 0:  # the positive prompt
                    part = slice(position * rows, (position + 1) * rows)
                    ip_k, ip_v = (each.expand(rows, -1, -1) for each in tokens)
                    out[part] += strength * optimized_attention(q[part], ip_k, ip_v, extra_options["n_heads"])
            return out

        for block, count in (("input", 12), ("middle", 1), ("output", 12)):
            for number in range(count):
                patched.set_model_attn2_replace(attend, block, number)
        return (patched,)


class ProbeOffloaded:
    """The model as it runs where no memory is left for it: weights stay offloaded, fetched layer by layer."""

    CATEGORY = "probe"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def run(self, model):
        offloaded = model.clone()
        load = type(offloaded).partially_load

        class Offloaded(type(offloaded)):
            def partially_load(self, device_to, extra_memory=0, *args, **kwargs):
                return load(self, device_to, 1, *args, **kwargs)

        offloaded.__class__ = Offloaded
        return (offloaded,)


class ProbeConditioning:
    """Random conditioning: `entries` of `batch` texts each, `width` wide, with a pooled vector of `pooled`."""

    CATEGORY = "probe"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"entries": ("INT",), "batch": ("INT",), "width": ("INT",), "pooled": ("INT",)}}

    def run(self, entries, batch, width, pooled):
        generator = torch.Generator().manual_seed(9)
        return (
            [
                [
                    torch.randn(batch, 77, width, generator=generator),
                    {"pooled_output": torch.randn(batch, pooled, generator=generator)} if pooled else {},
                ]
                for _ in range(entries)
            ],
        )


class ProbeLatent:
    """Random latents of any number of channels, with `broken` values that are not numbers."""

    CATEGORY = "probe"
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "frames": ("INT",),
                "channels": ("INT",),
                "width": ("INT",),
                "height": ("INT",),
                "seed": ("INT",),
                "broken": ("INT",),
            }
        }

    def run(self, frames, channels, width, height, seed, broken):
        generator = torch.Generator().manual_seed(seed)
        samples = torch.randn(frames, channels, height, width, generator=generator) * 5
        samples.view(-1)[:broken] = float("nan")
        return ({"samples": samples},)


class ProbeSDXL:
    """A tiny UNet in the SDXL shape (several transformer blocks a level, ADM input) as the host's own SDXL model."""

    CATEGORY = "probe"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT",)}}

    def run(self, seed):
        import comfy.model_base
        import comfy.model_management
        import comfy.model_patcher
        import comfy.supported_models

        config = comfy.supported_models.SDXL(
            {
                "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 64, "num_res_blocks": [1, 1],
                "channel_mult": [1, 2], "transformer_depth": [0, 2], "transformer_depth_output": [0, 0, 2, 2],
                "transformer_depth_middle": 2, "use_linear_in_transformer": True, "context_dim": 2048,
                "num_classes": "sequential", "adm_in_channels": 2816, "use_temporal_attention": False,
                "use_spatial_transformer": True, "legacy": False, "use_temporal_resblock": False,
                "num_head_channels": 64, "num_heads": -1,
            }
        )  # fmt: skip
        config.set_inference_dtype(torch.float32, None)
        device = torch.device("cpu")
        model = comfy.model_base.SDXL(config, device=device)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.diffusion_model.parameters():
            if parameter.ndim == 1:
                parameter.zero_().add_(1)
            else:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
        return (comfy.model_patcher.ModelPatcher(model.eval(), load_device=device, offload_device=device),)


class ProbePackedUNet:
    """A file of plain weights, loaded as ComfyUI-GGUF loads its own; `secret`: layers keep them to themselves."""

    CATEGORY = "probe"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"unet_name": ("STRING",), "secret": ("BOOLEAN",)}}

    def run(self, unet_name, secret):
        import comfy.sd
        import comfy.utils

        path = Path(__file__).resolve().parents[2] / "helpers" / "packed_layers.py"
        spec = importlib.util.spec_from_file_location("probe_packed_layers", path)
        layers = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(layers)
        weights = comfy.utils.load_torch_file(folder_paths.get_full_path("diffusion_models", unet_name))
        operations = layers.SecretOps if secret else layers.PackedOps
        model = comfy.sd.load_diffusion_model_state_dict(
            weights if secret else layers.pack_all(weights), model_options={"custom_operations": operations}
        )
        if secret:
            layers.keep_secret(model.model.diffusion_model)
        return (model,)


NODE_CLASS_MAPPINGS = {
    node.__name__: node
    for node in (
        ProbeHints, ProbeSeparateConds, ProbeRecord, ProbeImagePrompt, ProbeOffloaded, ProbeConditioning, ProbeLatent,
        ProbeSDXL, ProbeFramePrompts, ProbePackedUNet,
    )
}  # fmt: skip
