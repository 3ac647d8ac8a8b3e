"""Write small model files with random weights, in the layouts that ComfyUI's stock loaders recognise.

The stock checkpoint loader takes a UNet for SD 1.x only with 320 base channels and a 768 wide context; its
depth is free. The autoencoder slot accepts a TAESD, and a TAESD's weights can be set by hand so that encoding
and decoding keep a frame's 8x8 block means: the frames stay recognisable without a trained autoencoder. The
text encoder has to be a full CLIP-L, which is most of the file.

    python tools/tiny_checkpoint.py models/checkpoints/tiny.safetensors

Nothing here needs ComfyUI.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

BASE_CHANNELS = 320
TIME_CHANNELS = 1280
CLIP_WIDTH = 768
CLIP_LAYERS = 12
CLIP_VOCABULARY = 49408
CLIP_POSITIONS = 77
TAESD_CHANNELS = 64

Shapes = dict[str, tuple[int, ...]]
Weights = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class UNetLayout:
    """A UNet in the LDM layout.

    channel_mult: channels of each level in units of 320.
    attention: per level, whether it has a transformer (the middle block always has one).
    context: width of the text conditioning: 768 for SD 1.x, 1024 for SD 2.x.
    linear: transformers projected by linear layers (SD 2.x) instead of 1x1 convolutions (SD 1.x).
    res_blocks: residual blocks a level.
    """

    channel_mult: tuple[int, ...] = (1, 2)
    attention: tuple[bool, ...] = (True, False)
    context: int = 768
    linear: bool = False
    res_blocks: int = 1


SD1 = UNetLayout()
# As many blocks a level as SD 1.x has: the skip connections that a T2I-Adapter adds to are counted from the first.
SD1_TWO_BLOCKS = UNetLayout(res_blocks=2)
SD1_SHALLOW = UNetLayout(channel_mult=(1,), attention=(True,))
SD2_SHALLOW = UNetLayout(channel_mult=(1,), attention=(True,), context=1024, linear=True)


def _layer(name: str, out_features: int, in_features: int, kernel: int = 0, bias: bool = True) -> Shapes:
    kernel_shape = (kernel, kernel) if kernel else ()
    shapes: Shapes = {f"{name}.weight": (out_features, in_features, *kernel_shape)}
    if bias:
        shapes[f"{name}.bias"] = (out_features,)
    return shapes


def _norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def _res_block(name: str, channels_in: int, channels_out: int) -> Shapes:
    shapes = {
        **_norm(f"{name}.in_layers.0", channels_in),
        **_layer(f"{name}.in_layers.2", channels_out, channels_in, kernel=3),
        **_layer(f"{name}.emb_layers.1", channels_out, TIME_CHANNELS),
        **_norm(f"{name}.out_layers.0", channels_out),
        **_layer(f"{name}.out_layers.3", channels_out, channels_out, kernel=3),
    }
    if channels_in != channels_out:
        shapes |= _layer(f"{name}.skip_connection", channels_out, channels_in, kernel=1)
    return shapes


def _attention(name: str, channels: int, context: int) -> Shapes:
    return {
        **_layer(f"{name}.to_q", channels, channels, bias=False),
        **_layer(f"{name}.to_k", channels, context, bias=False),
        **_layer(f"{name}.to_v", channels, context, bias=False),
        **_layer(f"{name}.to_out.0", channels, channels),
    }


def _transformer(name: str, channels: int, layout: UNetLayout) -> Shapes:
    block = f"{name}.transformer_blocks.0"
    kernel = 0 if layout.linear else 1
    return {
        **_norm(f"{name}.norm", channels),
        **_layer(f"{name}.proj_in", channels, channels, kernel=kernel),
        **_norm(f"{block}.norm1", channels),
        **_attention(f"{block}.attn1", channels, channels),
        **_norm(f"{block}.norm2", channels),
        **_attention(f"{block}.attn2", channels, layout.context),
        **_norm(f"{block}.norm3", channels),
        **_layer(f"{block}.ff.net.0.proj", 8 * channels, channels),
        **_layer(f"{block}.ff.net.2", channels, 4 * channels),
        **_layer(f"{name}.proj_out", channels, channels, kernel=kernel),
    }


def _encoder_half(layout: UNetLayout) -> tuple[Shapes, list[int]]:
    """Shapes of the down and middle blocks, and the channels of every skip connection."""
    shapes: Shapes = {
        **_layer("time_embed.0", TIME_CHANNELS, BASE_CHANNELS),
        **_layer("time_embed.2", TIME_CHANNELS, TIME_CHANNELS),
        **_layer("input_blocks.0.0", BASE_CHANNELS, 4, kernel=3),
    }
    channels = BASE_CHANNELS
    skips = [channels]
    for level, mult in enumerate(layout.channel_mult):
        if level > 0:
            shapes |= _layer(f"input_blocks.{len(skips)}.0.op", channels, channels, kernel=3)
            skips.append(channels)
        for _ in range(layout.res_blocks):
            block = f"input_blocks.{len(skips)}"
            shapes |= _res_block(f"{block}.0", channels, BASE_CHANNELS * mult)
            channels = BASE_CHANNELS * mult
            if layout.attention[level]:
                shapes |= _transformer(f"{block}.1", channels, layout)
            skips.append(channels)
    shapes |= _res_block("middle_block.0", channels, channels)
    shapes |= _transformer("middle_block.1", channels, layout)
    shapes |= _res_block("middle_block.2", channels, channels)
    return shapes, skips


def unet_shapes(layout: UNetLayout) -> Shapes:
    """Names and shapes of the UNet's parameters, without a checkpoint's prefix."""
    shapes, skips = _encoder_half(layout)
    channels = skips[-1]
    index = 0
    for level in reversed(range(len(layout.channel_mult))):
        level_channels = BASE_CHANNELS * layout.channel_mult[level]
        for position in range(layout.res_blocks + 1):
            block = f"output_blocks.{index}"
            shapes |= _res_block(f"{block}.0", channels + skips.pop(), level_channels)
            channels = level_channels
            if layout.attention[level]:
                shapes |= _transformer(f"{block}.1", channels, layout)
            if level > 0 and position == layout.res_blocks:
                upsample = 2 if layout.attention[level] else 1
                shapes |= _layer(f"{block}.{upsample}.conv", channels, channels, kernel=3)
            index += 1
    shapes |= _norm("out.0", channels)
    shapes |= _layer("out.2", 4, channels, kernel=3)
    return shapes


def controlnet_shapes(layout: UNetLayout) -> Shapes:
    """Names and shapes of a ControlNet for a UNet of this layout."""
    shapes, skips = _encoder_half(layout)
    hint_channels = [(3, 16), (16, 16), (16, 32), (32, 32), (32, 96), (96, 96), (96, 256), (256, BASE_CHANNELS)]
    for index, (channels_in, channels_out) in enumerate(hint_channels):
        shapes |= _layer(f"input_hint_block.{2 * index}", channels_out, channels_in, kernel=3)
    for index, channels in enumerate(skips):
        shapes |= _layer(f"zero_convs.{index}.0", channels, channels, kernel=1)
    shapes |= _layer("middle_block_out.0", skips[-1], skips[-1], kernel=1)
    return shapes


def clip_shapes() -> Shapes:
    """Names and shapes of the CLIP-L text encoder."""
    shapes: Shapes = {
        "embeddings.token_embedding.weight": (CLIP_VOCABULARY, CLIP_WIDTH),
        "embeddings.position_embedding.weight": (CLIP_POSITIONS, CLIP_WIDTH),
        **_norm("final_layer_norm", CLIP_WIDTH),
    }
    for index in range(CLIP_LAYERS):
        layer = f"encoder.layers.{index}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _layer(f"{layer}.self_attn.{projection}", CLIP_WIDTH, CLIP_WIDTH)
        shapes |= _norm(f"{layer}.layer_norm1", CLIP_WIDTH)
        shapes |= _layer(f"{layer}.mlp.fc1", 4 * CLIP_WIDTH, CLIP_WIDTH)
        shapes |= _layer(f"{layer}.mlp.fc2", CLIP_WIDTH, 4 * CLIP_WIDTH)
        shapes |= _norm(f"{layer}.layer_norm2", CLIP_WIDTH)
    return shapes


def random_weights(shapes: Shapes, seed: int, gains: dict[str, float] | None = None) -> Weights:
    """Weights that keep the signal's variance: normal with std gain / sqrt(fan in), biases 0, norms 1.

    gains: factors by a part of the parameter's name; 1 for the others.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            weights[name] = torch.full(shape, 0.0 if name.endswith(".bias") else 1.0)
            continue
        gain = math.prod(factor for part, factor in (gains or {}).items() if part in name)
        std = gain / math.sqrt(math.prod(shape[1:]))
        weights[name] = torch.randn(shape, generator=generator) * std
    return {name: weight.half() for name, weight in weights.items()}


def unet_weights(layout: UNetLayout, seed: int, noise_gain: float = 0.2) -> Weights:
    """A random UNet whose predictions differ clearly between prompts.

    noise_gain: standard deviation of the predicted noise. Small values make the model's field smooth enough
    for DDIM inversion to be invertible, which holds for trained models and not for a random one of gain 1.
    """
    gains = {"out.2": noise_gain, "attn2.to_q": 2.0, "attn2.to_out": 3.0}
    return random_weights(unet_shapes(layout), seed, gains)


def taesd_weights() -> Weights:
    """A TAESD whose latent is the 8x8 block mean of the frame: three colour channels and one of brightness.

    Block means in 0..1 become latents of -1.5..1.5 in the UNet's scale, and back.
    """
    contrast = 3.0
    weights: Weights = {}

    def convolution(name: str, channels_in: int, channels_out: int, bias: bool = True) -> torch.Tensor:
        weights[f"{name}.weight"] = torch.zeros(channels_out, channels_in, 3, 3)
        if bias:
            weights[f"{name}.bias"] = torch.zeros(channels_out)
        return weights[f"{name}.weight"]

    def residual_block(name: str) -> None:
        for index in (0, 2, 4):
            convolution(f"{name}.conv.{index}", TAESD_CHANNELS, TAESD_CHANNELS)

    colours = range(3)

    convolution("taesd_encoder.0", 3, TAESD_CHANNELS)[colours, colours, 1, 1] = 1.0
    residual_block("taesd_encoder.1")
    for level in range(3):
        first = 2 + 4 * level
        halve = convolution(f"taesd_encoder.{first}", TAESD_CHANNELS, TAESD_CHANNELS, bias=False)
        for colour in colours:
            halve[colour, colour, 1:, 1:] = 0.25
        for block in range(first + 1, first + 4):
            residual_block(f"taesd_encoder.{block}")
    last = convolution("taesd_encoder.14", TAESD_CHANNELS, 4)
    last[colours, colours, 1, 1] = contrast
    last[3, :3, 1, 1] = contrast / 3
    weights["taesd_encoder.14.bias"].fill_(-contrast / 2)

    convolution("taesd_decoder.1", 4, TAESD_CHANNELS)[colours, colours, 1, 1] = 1 / contrast
    weights["taesd_decoder.1.bias"][:3] = 0.5
    for level in range(3):
        first = 3 + 5 * level
        for block in range(first, first + 3):
            residual_block(f"taesd_decoder.{block}")
        double = convolution(f"taesd_decoder.{first + 4}", TAESD_CHANNELS, TAESD_CHANNELS, bias=False)
        double[colours, colours, 1, 1] = 1.0
    residual_block("taesd_decoder.18")
    convolution("taesd_decoder.19", TAESD_CHANNELS, 3)[colours, colours, 1, 1] = 1.0

    weights["vae_scale"] = torch.tensor(0.18215)
    weights["vae_shift"] = torch.tensor(0.0)
    return weights


def lora_weights(layout: UNetLayout, seed: int, rank: int = 4, strength: float = 0.3) -> Weights:
    """A LoRA for every attention, feed-forward and projection layer of the UNet, and CLIP's first layers.

    strength: size of the change relative to the layer's own random weight.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = {
        f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}": shape
        for name, shape in unet_shapes(layout).items()
        if name.endswith(".weight") and (".transformer_blocks." in name or ".proj_" in name) and len(shape) > 1
    } | {
        f"lora_te_text_model_{name.removesuffix('.weight').replace('.', '_')}": shape
        for name, shape in clip_shapes().items()
        if name.endswith(".weight") and name.startswith("encoder.layers.0.") and len(shape) > 1
    }
    weights = {}
    for name, shape in layers.items():
        ones = (1,) * (len(shape) - 2)
        scale = math.sqrt(strength / math.sqrt(rank * shape[1]))
        weights[f"{name}.lora_down.weight"] = torch.randn(rank, shape[1], *ones, generator=generator) * scale
        weights[f"{name}.lora_up.weight"] = torch.randn(shape[0], rank, *ones, generator=generator) * scale
        weights[f"{name}.alpha"] = torch.tensor(float(rank))
    return {name: weight.half() for name, weight in weights.items()}


def controlnet_weights(layout: UNetLayout, seed: int) -> Weights:
    """A random ControlNet that has not been zero-initialised, so that hints make a difference at once."""
    # SiLU without norms in between would let the hint fade on its way through eight convolutions.
    return random_weights(controlnet_shapes(layout), seed, {"input_hint_block": 1.8})


def t2i_adapter_weights(seed: int) -> Weights:
    """A random T2I-Adapter of the light kind, which ComfyUI knows in one size only: that of SD 1.x."""
    shapes: Shapes = {}
    channels_in = 3 * 8 * 8
    for level, channels in enumerate((320, 640, 1280, 1280)):
        inner = channels // 4
        shapes |= _layer(f"body.{level}.in_conv", inner, channels_in, kernel=1)
        for block in range(4):
            for convolution in ("block1", "block2"):
                shapes |= _layer(f"body.{level}.body.{block}.{convolution}", inner, inner, kernel=3)
        shapes |= _layer(f"body.{level}.out_conv", channels, inner, kernel=1)
        channels_in = channels
    return random_weights(shapes, seed)


def text_encoder_weights(seed: int) -> Weights:
    """A random CLIP-L text encoder with its projection, in the layout of clip_l.safetensors."""
    shapes = {f"text_model.{name}": shape for name, shape in clip_shapes().items()}
    return random_weights({**shapes, **_layer("text_projection", CLIP_WIDTH, CLIP_WIDTH, bias=False)}, seed)


def clip_vision_weights(seed: int) -> Weights:
    """A random CLIP ViT-L/14, the smallest that ComfyUI's loader knows (600 MB): layers are each other's copies."""
    width, layers = 1024, 24
    layer: Shapes = {
        **_norm("layer_norm1", width),
        **_layer("mlp.fc1", 4 * width, width),
        **_layer("mlp.fc2", width, 4 * width),
        **_norm("layer_norm2", width),
    }
    for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer |= _layer(f"self_attn.{projection}", width, width)
    ends: Shapes = {
        "vision_model.embeddings.position_embedding.weight": (257, width),
        **_layer("vision_model.embeddings.patch_embedding", width, 3, kernel=14, bias=False),
        **_norm("vision_model.pre_layrnorm", width),
        **_norm("vision_model.post_layernorm", width),
        **_layer("visual_projection", CLIP_WIDTH, width, bias=False),
    }
    weights = random_weights(ends, seed)
    weights["vision_model.embeddings.class_embedding"] = weights["vision_model.embeddings.position_embedding.weight"][
        0
    ].clone()
    for name, weight in random_weights(layer, seed + 1).items():
        for index in range(layers):
            weights[f"vision_model.encoder.layers.{index}.{name}"] = weight.clone()
    return weights


def embedding_weights(tokens: int, seed: int) -> Weights:
    """A textual inversion embedding of some tokens for CLIP-L."""
    return {"emb_params": torch.randn(tokens, CLIP_WIDTH, generator=torch.Generator().manual_seed(seed)) * 0.5}


def sd3_weights(seed: int) -> Weights:
    """A diffusion transformer (SD 3 layout, one block 64 wide): a model without a UNet."""
    width, context, pooled = 64, 4096, 2048
    shapes: Shapes = {
        "pos_embed": (1, 36864, width),
        **_layer("x_embedder.proj", width, 16, kernel=2),
        **_layer("t_embedder.mlp.0", width, 256),
        **_layer("t_embedder.mlp.2", width, width),
        **_layer("y_embedder.mlp.0", width, pooled),
        **_layer("y_embedder.mlp.2", width, width),
        **_layer("context_embedder", width, context),
        **_layer("final_layer.linear", 64, width),
        **_layer("final_layer.adaLN_modulation.1", 2 * width, width),
    }
    for side, modulation in (("x_block", 6), ("context_block", 2)):
        block = f"joint_blocks.0.{side}"
        shapes |= _layer(f"{block}.attn.qkv", 3 * width, width)
        shapes |= _layer(f"{block}.adaLN_modulation.1", modulation * width, width)
    shapes |= _layer("joint_blocks.0.x_block.attn.proj", width, width)
    shapes |= _layer("joint_blocks.0.x_block.mlp.fc1", 4 * width, width)
    shapes |= _layer("joint_blocks.0.x_block.mlp.fc2", width, 4 * width)
    return random_weights(shapes, seed)


def checkpoint_weights(layout: UNetLayout, seed: int, noise_gain: float = 0.2) -> Weights:
    """UNet, autoencoder and text encoder under the names of an SD 1.x checkpoint."""
    weights = {f"model.diffusion_model.{k}": v for k, v in unet_weights(layout, seed, noise_gain).items()}
    weights |= {f"first_stage_model.{k}": v.half() for k, v in taesd_weights().items()}
    clip = random_weights(clip_shapes(), seed + 1)
    weights |= {f"cond_stage_model.transformer.text_model.{k}": v for k, v in clip.items()}
    return weights


def save(weights: Weights, path: str | Path) -> Path:
    """Write a safetensors file; the finished file appears under its name in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    save_file(weights, partial)
    os.replace(partial, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a small SD 1.x checkpoint with random weights.")
    parser.add_argument("path", type=Path, help="the .safetensors file to write (about 400 MB)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(save(checkpoint_weights(SD1, options.seed), options.path))


if __name__ == "__main__":
    main()
