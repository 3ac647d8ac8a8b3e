"""A tuning that was saved gives the same samples in another process."""

from __future__ import annotations

import pytest
import torch
from graphs import (
    EDIT_PROMPT,
    FRAMES,
    HEIGHT,
    SOURCE_PROMPT,
    WIDTH,
    Graph,
    checkpoint,
    clip_latent,
    inflate,
    invert,
    relative_error,
    sample,
    text,
    tune,
)
from safetensors import safe_open

pytestmark = [pytest.mark.host, pytest.mark.shared]


def edit(graph, loaded, model, latent):
    inverted = invert(graph, model, latent, text(graph, loaded.clip, SOURCE_PROMPT))
    return sample(graph, model, text(graph, loaded.clip, EDIT_PROMPT), text(graph, loaded.clip, ""), inverted)


def loaded_edit(server, file):
    graph = Graph()
    loaded = checkpoint(graph)
    model = inflate(graph, loaded.model, motion=graph.add("TAV_LoadMotion", file=file)[0])
    (video,) = server.latents(graph, edit(graph, loaded, model, clip_latent(graph, loaded.vae)))
    return video


def test_loaded_in_a_fresh_process(server, exercised):
    graph = Graph()
    loaded = checkpoint(graph)
    latent = clip_latent(graph, loaded.vae)
    tuning = tune(graph, inflate(graph, loaded.model), latent, text(graph, loaded.clip, SOURCE_PROMPT), seed=31)
    graph.add("TAV_SaveMotion", motion=tuning[1], filename_prefix="fresh/restart")
    plain = edit(graph, loaded, inflate(graph, loaded.model), latent)
    tuned, untuned = server.latents(graph, edit(graph, loaded, tuning[0], latent), plain)
    assert relative_error(tuned, untuned) > 1e-3, "the tuning changed nothing"

    (path,) = (server.models_folder("tav") / "fresh").glob("restart*.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert (metadata["base_family"], metadata["prediction_type"]) == ("SD1", "epsilon")
    assert (metadata["prompt"], metadata["frame_count"]) == (SOURCE_PROMPT, str(FRAMES))
    assert (metadata["width"], metadata["height"]) == (str(WIDTH), str(HEIGHT))
    assert (metadata["steps"], metadata["seed"]) == ("3", "31")

    name = path.relative_to(server.models_folder("tav")).as_posix()
    same_process = loaded_edit(server, name)
    server.restart()
    fresh_process = loaded_edit(server, name)
    assert torch.equal(tuned, same_process)
    assert torch.equal(tuned, fresh_process)
    exercised.append(f"saved motion ({path.stat().st_size / 1e6:.1f} MB) in a fresh process: bit-identical samples")


def test_tuning_goes_on_from_a_motion(server, motion_file):
    graph = Graph()
    loaded = checkpoint(graph)
    latent = clip_latent(graph, loaded.vae)
    source = text(graph, loaded.clip, SOURCE_PROMPT)
    motion = graph.add("TAV_LoadMotion", file=motion_file)[0]
    model = inflate(graph, loaded.model)
    continued = tune(graph, model, latent, source, motion=motion, steps=1, learning_rate=1e-6)
    retuned = tune(graph, model, latent, source, steps=1, learning_rate=1e-6)
    given, gone_on, started = server.latents(
        graph,
        edit(graph, loaded, inflate(graph, loaded.model, motion=motion), latent),
        edit(graph, loaded, continued[0], latent),
        edit(graph, loaded, retuned[0], latent),
    )
    assert relative_error(gone_on, given) < relative_error(started, given) / 10
    assert not torch.equal(gone_on, given)
