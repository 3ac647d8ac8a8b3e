"""Quantised checkpoints on a running host: the whole job is that of the weights which they stand for."""

from __future__ import annotations

import pytest
import tiny_checkpoint
import torch
from graphs import (
    EDIT_PROMPT,
    SOURCE_PROMPT,
    Graph,
    assert_refused,
    checkpoint,
    inflate,
    invert,
    random_latent,
    relative_error,
    sample,
    text,
    tune,
)
from packed_layers import Packed, pack_all, unpack
from quantised import FP8, as_mixed, as_scaled_fp8, mixed_formats

pytestmark = pytest.mark.host

PLAIN = "quantised-plain.safetensors"
STORED, MEANT = "quantised-stored.safetensors", "quantised-meant.safetensors"


def as_packed(weights):
    """ProbePackedUNet packs the plain file."""
    return weights, {
        k: unpack(v, torch.float32) if isinstance(v, Packed) else v.float() for k, v in pack_all(weights).items()
    }


def as_fp8(weights):
    """The loader stores the plain file in fp8, all of it."""
    return weights, {k: v.to(FP8).float() for k, v in weights.items()}


def as_scaled_file(weights):
    """Hosts know the file by an empty tensor."""
    stored, meant = as_scaled_fp8(weights)
    return stored | {"scaled_fp8": torch.empty(0, dtype=FP8)}, meant


FAMILIES = {"fp8": as_fp8, "scaled fp8": as_scaled_file, "gguf": as_packed} | {
    # The loader reads a model's family off attn2.to_k's shape, which nvfp4 halves.
    f"mixed {name}": lambda weights, name=name: as_mixed(weights, name, spared="attn2.to_k")
    for name in mixed_formats()
}


def file_of(family, name):
    """Each family has files of its own: the host keeps what it has loaded by the file's name."""
    return f"{family} {name}"


def loaded(graph, family, name):
    file = file_of(family, name)
    if family == "gguf" and name == STORED:
        return graph.add("ProbePackedUNet", unet_name=file, secret=False)[0]
    dtype = "fp8_e4m3fn" if family == "fp8" and name == STORED else "default"
    return graph.add("UNETLoader", unet_name=file, weight_dtype=dtype)[0]


def job(graph, family, name, clip):
    """The noise of a clip under the tuned model, its edit, and the edit by a model that was not tuned."""
    model = loaded(graph, family, name)
    latent = random_latent(graph)
    source, edit, nothing = (text(graph, clip, prompt) for prompt in (SOURCE_PROMPT, EDIT_PROMPT, ""))
    tuned = tune(graph, model, latent, source)[0]
    noise = invert(graph, tuned, latent, source)
    return noise, sample(graph, tuned, edit, nothing, noise), sample(graph, inflate(graph, model), edit, nothing, noise)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_job_is_that_of_the_dequantised_checkpoint(server, family):
    """Each family has a quantised file and a file of the dequantised weights; both give the same result."""
    weights = tiny_checkpoint.unet_weights(tiny_checkpoint.SD1_SHALLOW, seed=6)
    folder = server.models_folder("diffusion_models")
    for name, kind in zip((STORED, MEANT), FAMILIES[family](weights), strict=True):
        tiny_checkpoint.save(kind, folder / file_of(family, name))
    graph = Graph()
    clip = checkpoint(graph).clip
    noise, edit, untuned, *meant = server.latents(
        graph, *job(graph, family, STORED, clip), *job(graph, family, MEANT, clip)
    )
    # The host quantises the inputs of int8 layers, too: no two such models agree better.
    tolerance = 0.25 if family == "mixed int8_tensorwise" else 2e-3
    assert relative_error(noise, meant[0]) < tolerance
    assert relative_error(edit, meant[1]) < tolerance
    # The tuning is seen, and more of it than the tolerance leaves open.
    difference = relative_error(edit, untuned)
    assert difference > 1e-2
    assert relative_error(edit - untuned, meant[1] - meant[2]) < max(50 * tolerance / difference, tolerance)


def test_weights_that_cannot_be_read(server):
    weights = tiny_checkpoint.unet_weights(tiny_checkpoint.SD1_SHALLOW, seed=6)
    tiny_checkpoint.save(weights, server.models_folder("diffusion_models") / PLAIN)
    graph = Graph()
    model = graph.add("ProbePackedUNet", unet_name=PLAIN, secret=True)[0]
    prompt = text(graph, checkpoint(graph).clip, SOURCE_PROMPT)
    node = tune(graph, model, random_latent(graph), prompt)
    assert_refused(server, graph, node, r"model: its weights are quantised as int8 .*Load an fp16 or bf16 checkpoint")
