"""The demo's own Stable Diffusion: ComfyUI's UNet, autoencoder and text encoder, only smaller.

64x64 pixels, latents of 4 channels at a quarter of the size, 24 tokens of text. It is no checkpoint for the
stock loader, which knows an SD1-layout UNet by its 320 base channels only; `load` builds the same objects.
This file imports nothing of the pack, so that the demo, its training and a node can all use it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.clip_vision
import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.taesd.taesd
import comfy.utils
import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent / "weights"
WEIGHTS = FOLDER / "tiny-sd.safetensors"

PIXELS_PER_LATENT = 4
TOKENS = 24
TEXT_WIDTH = 128
# The host's text model has room for CLIP's vocabulary; the file holds the rows that this tokenizer uses.
CLIP_VOCABULARY = 49408
EMBEDDING = "text_model.embeddings.token_embedding.weight"

UNET: dict[str, Any] = {
    "image_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_checkpoint": False,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "model_channels": 64,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 2, 2],
    "transformer_depth": [1, 1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1],
    "context_dim": TEXT_WIDTH,
    "num_heads": 4,
    "num_head_channels": -1,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
}
_TEXT: dict[str, Any] = {
    "hidden_size": TEXT_WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 4 * TEXT_WIDTH,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": TOKENS,
    "eos_token_id": 1,
}
VISION: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "image_size": 64,
    "patch_size": 8,
    "num_channels": 3,
    "hidden_size": TEXT_WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 4 * TEXT_WIDTH,
    "hidden_act": "quick_gelu",
    "projection_dim": TEXT_WIDTH,
}
_SPECIAL_TOKENS = {"start": 0, "end": 1, "pad": 1}


def coarser_groups(unet: torch.nn.Module) -> None:
    """Norm over at least four channels at a time.

    The host's 32 groups are for 320 channels and more: of 64 each group would be two, and the absolute colours,
    which a norm takes away from each group, would be hard to keep.
    """
    for module in unet.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = min(module.num_groups, module.num_channels // 4)


class Autoencoder(torch.nn.Module):
    """Pictures [n, 3, h, w] in -1..1 to latents [n, 4, h/4, w/4] in SD 1.5's scale, and back; blocks of TAESD.

    No norms: with as few channels as this they would cost the absolute colours.
    """

    def __init__(self) -> None:
        super().__init__()
        block, conv, width = comfy.taesd.taesd.Block, comfy.taesd.taesd.conv, 64

        def blocks(count: int) -> list[torch.nn.Module]:
            return [block(width, width) for _ in range(count)]

        self.encoder = torch.nn.Sequential(
            torch.nn.PixelUnshuffle(2),
            conv(12, width),
            *blocks(1),
            conv(width, width, stride=2),
            *blocks(3),
            conv(width, 8),
        )
        self.decoder = torch.nn.Sequential(
            conv(4, width),
            torch.nn.ReLU(),
            *blocks(3),
            torch.nn.Upsample(scale_factor=2),
            conv(width, width),
            *blocks(2),
            conv(width, 12),
            torch.nn.PixelShuffle(2),
        )

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents, each [n, 4, h/4, w/4]."""
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        return mean, logvar

    def encode(self, x: Tensor) -> Tensor:
        """The latents' mean."""
        return self.posterior(x)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """The pictures."""
        return self.decoder(latents)


class TinyLatents(comfy.latent_formats.SD15):
    """SD 1.5's scale, and the colours of these latents for previews: a least squares fit to 400 drawings."""

    def __init__(self) -> None:
        super().__init__()
        self.latent_rgb_factors = [
            [-0.1805, -0.1740, -0.3992],
            [-0.1296, 0.1310, 0.0138],
            [-0.0353, -0.0500, 0.0513],
            [-0.2655, -0.1663, 0.0818],
        ]
        self.latent_rgb_factors_bias = [0.0484, 0.0807, 0.0125]
        # A TAESD for Stable Diffusion's own latents would show something else.
        self.taesd_decoder_name = None


class TinySD(comfy.supported_models.SD15):
    """SD 1.5 in every respect but the UNet's size and what its latents mean."""

    unet_config = UNET
    latent_format = TinyLatents
    unet_extra_config: dict[str, Any] = {}


class TextModel(comfy.sd1_clip.SDClipModel):
    """CLIP's text model with 2 layers and 24 positions."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None) -> None:
        with _json_file(_TEXT) as config:
            super().__init__(
                device=device,
                max_length=TOKENS,
                textmodel_json_config=config,
                dtype=dtype,
                special_tokens=_SPECIAL_TOKENS,
                return_projected_pooled=False,
                model_options=model_options or {},
            )


@contextmanager
def _json_file(values: dict[str, Any]) -> Iterator[str]:
    """Path of a file with these values: older hosts take no others."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(values))
        yield str(path)


class Tokenizer(comfy.sd1_clip.SD1Tokenizer):
    """CLIP's tokenizer with the files of a folder."""

    def __init__(self, folder: Path, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        tokenizer = partial(
            comfy.sd1_clip.SDTokenizer,
            tokenizer_path=str(folder),
            max_length=TOKENS,
            embedding_size=TEXT_WIDTH,
        )
        super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=tokenizer)


def load(path: Path = WEIGHTS) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE as the stock checkpoint loader returns them."""
    weights = comfy.utils.load_torch_file(str(path))

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v.float() for k, v in weights.items() if k.startswith(prefix)}

    unet = part("unet.")
    config = TinySD(dict(UNET))
    config.set_inference_dtype(torch.float32, None)
    base = config.get_model(unet, "")
    base.load_model_weights(unet, "")
    coarser_groups(base.diffusion_model)
    management = comfy.model_management
    model = comfy.model_patcher.ModelPatcher(
        base, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )

    target = SimpleNamespace(
        params={},
        clip=partial(comfy.sd1_clip.SD1ClipModel, clip_model=TextModel),
        tokenizer=partial(Tokenizer, path.parent / "tokenizer"),
    )
    clip = comfy.sd.CLIP(target)
    text = part("text.")
    rows = text[EMBEDDING]
    text[EMBEDDING] = torch.cat([rows, rows.new_zeros(CLIP_VOCABULARY - len(rows), TEXT_WIDTH)])
    clip.load_sd(text)

    # The host's VAE object knows no autoencoder of this size: it is made with another and given ours.
    vae = comfy.sd.VAE(sd=comfy.taesd.taesd.TAESD().state_dict(), dtype=torch.float32)
    vae.first_stage_model = Autoencoder().eval()
    vae.first_stage_model.load_state_dict(part("vae."))
    vae.patcher = comfy.model_patcher.ModelPatcher(
        vae.first_stage_model, load_device=vae.device, offload_device=management.vae_offload_device()
    )
    vae.downscale_ratio = vae.upscale_ratio = PIXELS_PER_LATENT
    return model, clip, vae


def load_vision(path: Path = WEIGHTS) -> Any:
    """The CLIP_VISION that belongs to the CLIP of ``load``: both put pictures and sentences into one space."""
    weights = comfy.utils.load_torch_file(str(path))
    with _json_file(VISION) as config:
        vision = comfy.clip_vision.ClipVisionModel(config)
    part = {k.removeprefix("vision."): v.float() for k, v in weights.items() if k.startswith("vision.")}
    vision.load_sd(part)
    return vision


def encode(clip: Any, text: str) -> Any:
    """A prompt as CONDITIONING, on hosts old and new."""
    cond, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
    return [[cond, {"pooled_output": pooled}]]


def embedder(path: Path = WEIGHTS) -> Callable[[Tensor], Tensor]:
    """A function from frames [frames, h, w, 3] in 0..1 to their CLIP embeddings [frames, width]."""
    vision = load_vision(path)
    return lambda frames: vision.encode_image(frames)["image_embeds"]
