"""The main job on a real clip: one tuning, two edits, files that decode to what was asked for."""

from __future__ import annotations

import imageio_ffmpeg
import numpy as np
import pytest
from graphs import (
    CLIP_FILE,
    EDIT_PROMPT,
    FRAMES,
    HEIGHT,
    SOURCE_PROMPT,
    STEPS,
    WIDTH,
    Graph,
    checkpoint,
    inflate,
    invert,
    load_video,
    sample,
    text,
    tune,
)
from PIL import Image

pytestmark = [pytest.mark.host, pytest.mark.shared]

OTHER_EDIT = "wonder woman, wearing a cowboy hat, is skiing"


def edit_graph(prompt, prefix):
    """Clip to video: the graph of the quick start. Returns it with the ids of the nodes that are looked at."""
    graph = Graph()
    loaded = checkpoint(graph)
    video = load_video(graph)
    latent = graph.add("VAEEncode", pixels=video[0], vae=loaded.vae)[0]
    source = text(graph, loaded.clip, SOURCE_PROMPT)
    empty = text(graph, loaded.clip, "")
    tuning = tune(graph, inflate(graph, loaded.model), latent, source)
    inverted = invert(graph, tuning[0], latent, source)
    edited = sample(graph, tuning[0], text(graph, loaded.clip, prompt), empty, inverted)
    frames = graph.add("VAEDecode", samples=edited, vae=loaded.vae)[0]
    saved = graph.add("TAV_SaveVideo", images=frames, fps=video[1], filename_prefix=prefix, format="mp4", quality=80)
    curve = graph.add("PreviewImage", images=tuning[2])
    still = graph.add("SaveImage", images=frames, filename_prefix=prefix)
    return graph, {"tune": tuning, "save": saved, "curve": curve, "sample": edited, "still": still}


def decode(path):
    """Frames [F, H, W, 3] as uint8, and the frame rate."""
    reader = imageio_ffmpeg.read_frames(path)
    information = next(reader)
    width, height = information["size"]
    frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
    return np.stack(frames), information["fps"]


def expected_fps(server):
    reader = imageio_ffmpeg.read_frames(server.input_folder / CLIP_FILE)
    return next(reader)["fps"] / 2  # every second frame is taken


def saved_video(server, result, node):
    """The saved file. The node must show a playing preview: for a gif it is a temporary mp4."""
    shown = server.saved_file(result, node, "images")
    assert result.outputs[node.id]["animated"] == [True]
    assert decode(shown)[0].shape == (FRAMES, HEIGHT, WIDTH, 3)
    return server.saved_file(result, node, "gifs") if "gifs" in result.outputs[node.id] else shown


def test_two_edits_from_one_tuning(server, exercised):
    graph, nodes = edit_graph(EDIT_PROMPT, "edits/first")
    first = server.run(graph.nodes).raise_for_error()
    assert nodes["tune"].id in first.executed

    tuning = [p for p in first.progress if p.node == nodes["tune"].id]
    assert (tuning[-1].value, tuning[-1].maximum) == (3, 3)
    sampling = [p for p in first.progress if p.node == nodes["sample"][0]]
    assert (sampling[-1].value, sampling[-1].maximum) == (STEPS, STEPS)
    assert first.previews
    with Image.open(server.saved_file(first, nodes["curve"], "images")) as curve:
        assert min(curve.size) >= 64
        assert len(curve.getcolors(1 << 20)) > 1, "the loss curve is a blank picture"

    graph, second_nodes = edit_graph(OTHER_EDIT, "edits/second")
    second = server.run(graph.nodes).raise_for_error()
    assert second_nodes["tune"].id in second.cached
    assert second_nodes["tune"].id not in second.executed
    assert second_nodes["sample"][0] in second.executed

    for result, saved in ((first, nodes["save"]), (second, second_nodes["save"])):
        frames, fps = decode(saved_video(server, result, saved))
        assert frames.shape == (FRAMES, HEIGHT, WIDTH, 3)
        assert fps == pytest.approx(expected_fps(server), abs=0.01)
    stills = [
        np.asarray(Image.open(server.saved_file(result, still, "images")), np.float32)
        for result, still in ((first, nodes["still"]), (second, second_nodes["still"]))
    ]
    difference = np.abs(stills[0] - stills[1]).mean()
    assert difference > 1, "two prompts gave the same video"
    exercised.append(
        f"full run on {CLIP_FILE}: first edit {first.seconds:.1f} s, second {second.seconds:.1f} s with the cached "
        f"tuning; frames differ by {difference:.1f}/255"
    )


@pytest.mark.parametrize("container", ["webm", "gif"])
def test_other_containers(server, container):
    graph = Graph()
    video = load_video(graph)
    saved = graph.add("TAV_SaveVideo", images=video[0], fps=10.0, filename_prefix="loop", format=container, quality=80)
    path = saved_video(server, server.run(graph.nodes).raise_for_error(), saved)
    frames, fps = decode(path)
    assert path.suffix == f".{container}"
    assert frames.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert fps == pytest.approx(10, abs=0.1)
