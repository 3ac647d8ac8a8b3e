"""LoRA and this pack's patches commute, and no key of either is rejected."""

from __future__ import annotations

import pytest
from graphs import (
    EDIT_PROMPT,
    SOURCE_PROMPT,
    Graph,
    checkpoint,
    clip_latent,
    inflate,
    relative_error,
    sample,
    text,
    tune,
)

pytestmark = [pytest.mark.host, pytest.mark.shared]

REJECTED = ("NOT LOADED", "lora key not loaded", "ERROR lora", "could not be loaded")
# Patches of one weight are added up in the order in which they were put on; the sums differ in the last digits.
ROUNDING = 1e-5


def lora(graph, model, clip):
    node = graph.add(
        "LoraLoader", model=model, clip=clip, lora_name="style.safetensors", strength_model=0.8, strength_clip=0.8
    )
    return node[0], node[1]


def video_from(graph, model, clip, latent):
    return sample(graph, model, text(graph, clip, EDIT_PROMPT), text(graph, clip, ""), latent)


def assert_nothing_rejected(log):
    assert not [line for line in log.splitlines() if any(message in line for message in REJECTED)]


@pytest.mark.parametrize("with_motion", [False, True], ids=["plain", "with MOTION"])
def test_order_of_lora_and_inflation_does_not_matter(server, motion_file, new_log, exercised, with_motion):
    graph = Graph()
    loaded = checkpoint(graph)
    latent = clip_latent(graph, loaded.vae)
    motion = {"motion": graph.add("TAV_LoadMotion", file=motion_file)[0]} if with_motion else {}

    model, clip = lora(graph, loaded.model, loaded.clip)
    before = video_from(graph, inflate(graph, model, **motion), clip, latent)

    model, clip = lora(graph, inflate(graph, loaded.model, **motion), loaded.clip)
    after = video_from(graph, model, clip, latent)

    without = video_from(graph, inflate(graph, loaded.model, **motion), clip, latent)
    lora_before, lora_after, no_lora = server.latents(graph, before, after, without)
    assert relative_error(lora_before, no_lora) > 1e-2, "the LoRA changed nothing"
    assert relative_error(lora_before, lora_after) < ROUNDING
    assert_nothing_rejected(new_log())
    difference = relative_error(lora_before, lora_after)
    exercised.append(
        f"LoRA before and after inflation, {'with' if with_motion else 'without'} MOTION: "
        + (f"to rounding ({difference:.0e} relative)" if difference else "bit-identical")
    )


def test_motion_changes_the_result_on_top_of_a_lora(server, motion_file, new_log):
    graph = Graph()
    loaded = checkpoint(graph)
    latent = clip_latent(graph, loaded.vae)
    model, clip = lora(graph, loaded.model, loaded.clip)
    motion = graph.add("TAV_LoadMotion", file=motion_file)[0]
    tuned, plain = server.latents(
        graph,
        video_from(graph, inflate(graph, model, motion=motion), clip, latent),
        video_from(graph, inflate(graph, model), clip, latent),
    )
    assert relative_error(tuned, plain) > 1e-3
    assert_nothing_rejected(new_log())


def test_tuning_a_model_with_a_lora(server, new_log):
    """The tuning sees the LoRA's weights, and what it gives carries the LoRA once, in either order."""
    graph = Graph()
    loaded = checkpoint(graph)
    latent = clip_latent(graph, loaded.vae)
    model, clip = lora(graph, loaded.model, loaded.clip)
    source = text(graph, clip, SOURCE_PROMPT)
    inside = tune(graph, inflate(graph, model), latent, source)
    outside = inflate(graph, model, motion=inside[1])
    without_lora = tune(graph, inflate(graph, loaded.model), latent, source)
    returned, rebuilt, other = server.latents(
        graph,
        video_from(graph, inside[0], clip, latent),
        video_from(graph, outside, clip, latent),
        video_from(graph, without_lora[0], clip, latent),
    )
    assert relative_error(returned, rebuilt) < ROUNDING
    assert relative_error(returned, other) > 1e-3
    assert_nothing_rejected(new_log())


def test_inflating_again_keeps_the_lora(server, motion_file):
    """A second inflation takes the first one's patches off, and those only, wherever the LoRA was put on."""
    graph = Graph()
    loaded = checkpoint(graph)
    latent = clip_latent(graph, loaded.vae)
    motion = graph.add("TAV_LoadMotion", file=motion_file)[0]
    model, clip = lora(graph, loaded.model, loaded.clip)
    once = inflate(graph, model, motion=motion)
    inflated_first, _ = lora(graph, inflate(graph, loaded.model, motion=motion), loaded.clip)
    plain_again = inflate(graph, once)
    expected, twice, between, without_motion, plain = server.latents(
        graph,
        video_from(graph, once, clip, latent),
        video_from(graph, inflate(graph, once, motion=motion), clip, latent),
        video_from(graph, inflate(graph, inflated_first, motion=motion), clip, latent),
        video_from(graph, plain_again, clip, latent),
        video_from(graph, inflate(graph, model), clip, latent),
    )
    assert relative_error(twice, expected) < ROUNDING
    assert relative_error(between, expected) < ROUNDING
    assert relative_error(without_motion, plain) < ROUNDING
    assert relative_error(plain, expected) > 1e-3
