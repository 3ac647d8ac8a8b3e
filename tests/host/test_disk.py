"""A folder that cannot be written to is told when the graph is queued: nothing has run by then."""

from __future__ import annotations

import re

import pytest
from graphs import Graph, checkpoint, clip_latent, inflate, load_video, text, tune

pytestmark = [pytest.mark.host, pytest.mark.shared]


@pytest.mark.parametrize("node", ["TAV_SaveVideo", "TAV_SaveMotion"])
def test_a_folder_that_is_none_is_refused_before_anything_runs(server, node):
    graph = Graph()
    if node == "TAV_SaveVideo":
        (server.output_folder / "in-the-way").write_text("a file")
        video = load_video(graph)
        inputs = {"images": video[0], "fps": video[1], "format": "mp4", "quality": 80}
    else:
        server.models_folder("tav").mkdir(exist_ok=True)
        (server.models_folder("tav") / "in-the-way").write_text("a file")
        loaded = checkpoint(graph)
        latent, prompt = clip_latent(graph, loaded.vae), text(graph, loaded.clip, "a man is skiing")
        inputs = {"motion": tune(graph, inflate(graph, loaded.model), latent, prompt)[1]}
    saved = graph.add(node, filename_prefix="in-the-way/clip", **inputs)
    result = server.run(graph.nodes)
    assert result.status == "invalid" and not result.executed
    assert re.search("filename_prefix - .*in-the-way cannot be written to. Allow it", result.errors[saved.id])
