"""Tuning leaves the loaded checkpoint as it was: stock text-to-image is bit-identical before and after."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graphs import SOURCE_PROMPT, Graph, checkpoint, clip_latent, inflate, invert, sample, text, text_to_image, tune
from PIL import Image

pytestmark = [pytest.mark.host, pytest.mark.shared]


class StockPicture:
    """The stock text-to-image result, computed again from the checkpoint that the host has in memory."""

    def __init__(self, server):
        self.server = server
        self.end_at_step = 10000

    def __call__(self):
        graph = Graph()
        loaded = checkpoint(graph)
        latent, image = text_to_image(graph, loaded, self.end_at_step)
        self.end_at_step -= 1
        result = self.server.run(graph.nodes).raise_for_error()
        assert any(node.startswith("KSampler") for node in result.executed)
        with Image.open(self.server.saved_file(result, image, "images")) as picture:
            return self.server.saved_latent(result, latent), np.asarray(picture), result


def tuning_graph(steps, seed, **changes):
    graph = Graph()
    loaded = checkpoint(graph)
    model = inflate(graph, loaded.model)
    tuning = tune(
        graph,
        model,
        clip_latent(graph, loaded.vae),
        text(graph, loaded.clip, SOURCE_PROMPT),
        steps=steps,
        seed=seed,
        **changes,
    )
    graph.add("PreviewImage", images=tuning[2])
    return graph, tuning


def assert_same_picture(before, after):
    # The loader must not have run again: a fresh load would hide weights that the tuning changed in place.
    assert any(node.startswith("CheckpointLoaderSimple") for node in after[2].cached)
    assert torch.equal(before[0], after[0])
    assert np.array_equal(before[1], after[1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_before_and_after_tuning(server, precision):
    stock = StockPicture(server)
    before = stock()
    graph, tuning = tuning_graph(steps=2, seed=1, precision=precision)
    assert tuning.id in server.run(graph.nodes).raise_for_error().executed
    assert_same_picture(before, stock())


def test_after_cancelling_at_a_random_step(server, random_step, exercised):
    stock = StockPicture(server)
    before = stock()
    graph, tuning = tuning_graph(steps=200, seed=2)
    after_interrupt = []

    def cancel(progress):
        if progress.node != tuning.id:
            return
        if after_interrupt or progress.value >= random_step:
            if not after_interrupt:
                server.interrupt()
            after_interrupt.append(progress)

    result = server.run(graph.nodes, cancel)
    assert result.status == "interrupted", result.errors
    # The step that is under way when the interrupt arrives may still report.
    assert len(after_interrupt) <= 2
    assert_same_picture(before, stock())

    graph, tuning = tuning_graph(steps=2, seed=3)
    assert tuning.id in server.run(graph.nodes).raise_for_error().executed
    assert_same_picture(before, stock())
    exercised.append(
        f"cancelled at step {random_step} of 200: ended within {len(after_interrupt) - 1} more; "
        "text-to-image bit-identical"
    )


def test_after_cancelling_inversion_and_sampling(server):
    """Cancelled in the middle of a sampler, the inflated forwards are taken out again as well."""
    stock = StockPicture(server)
    before = stock()
    graph = Graph()
    loaded = checkpoint(graph)
    model = inflate(graph, loaded.model)
    prompt = text(graph, loaded.clip, SOURCE_PROMPT)
    inverted = invert(graph, model, clip_latent(graph, loaded.vae), prompt, steps=100)
    graph.add("SaveLatent", samples=sample(graph, model, prompt, prompt, inverted, steps=4), filename_prefix="latent")
    result = server.run(graph.nodes, lambda progress: server.interrupt() if progress.value == 2 else None)
    assert result.status == "interrupted", result.errors
    assert_same_picture(before, stock())
