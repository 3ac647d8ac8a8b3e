"""Stock nodes fit at every joint. LoRA, ControlNet, samplers and ConditioningCombine have files of their own."""

from __future__ import annotations

import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from graphs import (
    CLIP_FILE,
    EDIT_PROMPT,
    FRAMES,
    HEIGHT,
    STEPS,
    WIDTH,
    Edit,
    Graph,
    checkpoint,
    inflate,
    load_video,
    relative_error,
    text,
)
from PIL import Image

pytestmark = [pytest.mark.host, pytest.mark.shared]


def test_ksampler_on_the_tuned_model(server, motion_file):
    edit = Edit(motion_file)
    graph = edit.graph
    frames = graph.add("EmptyLatentImage", width=WIDTH, height=HEIGHT, batch_size=FRAMES)[0]

    def ksampler(model):
        return graph.add(
            "KSampler",
            model=model,
            positive=edit.positive,
            negative=edit.negative,
            latent_image=frames,
            seed=1,
            steps=STEPS,
            cfg=7.5,
            sampler_name="dpmpp_2m",
            scheduler="karras",
            denoise=1.0,
        )[0]

    tuned, plain = server.latents(graph, ksampler(edit.model), ksampler(edit.loaded.model))
    assert tuned.shape == (FRAMES, 4, HEIGHT // 8, WIDTH // 8)
    assert torch.isfinite(tuned).all()
    assert relative_error(tuned, plain) > 1e-3


def test_model_merge(server, motion_file):
    """The merged model stays inflated; at ratio 0 all of the UNet's weights are the other model's."""
    edit = Edit(motion_file)
    graph = edit.graph

    def merged(ratio):
        return graph.add("ModelMergeSimple", model1=edit.model, model2=edit.loaded.model, ratio=ratio)[0]

    tuned, all_tuned, half, none_tuned, no_queries = server.latents(
        graph,
        edit.video(edit.model),
        edit.video(merged(1.0)),
        edit.video(merged(0.5)),
        edit.video(merged(0.0)),
        edit.video(inflate(graph, edit.loaded.model, motion=edit.motion, query_strength=0.0)),
    )
    assert relative_error(all_tuned, tuned) < 1e-5
    assert relative_error(none_tuned, no_queries) < 1e-5
    assert 0 < relative_error(half, tuned) < relative_error(none_tuned, tuned)


def test_clip_set_last_layer(server, motion_file):
    edit = Edit(motion_file)
    graph = edit.graph
    clip = graph.add("CLIPSetLastLayer", clip=edit.loaded.clip, stop_at_clip_layer=-2)[0]
    skipped, usual = server.latents(
        graph, edit.video(edit.model, text(graph, clip, EDIT_PROMPT)), edit.video(edit.model)
    )
    assert torch.isfinite(skipped).all()
    assert relative_error(skipped, usual) > 1e-3


@pytest.mark.parametrize("node", ["FreeU", "FreeU_V2"])
def test_free_u(server, motion_file, node):
    edit = Edit(motion_file)
    graph = edit.graph

    def free_u(model):
        return graph.add(node, model=model, b1=1.3, b2=1.4, s1=0.9, s2=0.2)[0]

    after, before, without = server.latents(
        graph,
        edit.video(free_u(edit.model)),
        edit.video(inflate(graph, free_u(edit.loaded.model), motion=edit.motion)),
        edit.video(edit.model),
    )
    assert torch.isfinite(after).all()
    assert relative_error(before, after) < 1e-5
    assert relative_error(after, without) > 1e-3


def test_vae_encode_and_decode_keep_frames_in_order(server):
    graph = Graph()
    loaded = checkpoint(graph)
    frames = load_video(graph)[0]
    latent = graph.add("VAEEncode", pixels=frames, vae=loaded.vae)[0]
    again = graph.add("VAEEncode", pixels=graph.add("VAEDecode", samples=latent, vae=loaded.vae)[0], vae=loaded.vae)[0]
    last = graph.add("ImageFromBatch", image=frames, batch_index=FRAMES - 1, length=1)[0]
    whole, there_and_back, last_alone = server.latents(
        graph, latent, again, graph.add("VAEEncode", pixels=last, vae=loaded.vae)[0]
    )
    assert whole.shape == (FRAMES, 4, HEIGHT // 8, WIDTH // 8)
    assert relative_error(there_and_back, whole) < 0.2
    assert relative_error(whole[-1:], last_alone) < 1e-5
    assert relative_error(whole[:1], last_alone) > 1e-2


def streams(path):
    """The lines in which ffmpeg describes a file's streams."""
    report = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(path)], capture_output=True, text=True
    ).stderr
    return [line for line in report.splitlines() if "Stream #" in line]


def test_core_video_nodes(server):
    """LoadVideo -> core CreateVideo -> core SaveVideo, with sound; SaveVideo -> core GetVideoComponents."""
    graph = Graph()
    clip = load_video(graph, frame_count=20)
    created = graph.add("CreateVideo", images=clip[0], fps=clip[1], audio=clip[3])
    core = graph.add("SaveVideo", video=created[0], filename_prefix="core", format="mp4", codec="h264")
    ours = graph.add(
        "TAV_SaveVideo", images=clip[0], fps=clip[1], audio=clip[3], filename_prefix="ours", format="mp4", quality=100
    )
    parts = graph.add("GetVideoComponents", video=ours[0])
    stills = graph.add("SaveImage", images=parts[0], filename_prefix="parts")
    again = graph.add("CreateVideo", images=parts[0], fps=parts[2], audio=parts[1])
    copied = graph.add("SaveVideo", video=again[0], filename_prefix="copied", format="mp4", codec="h264")
    originals = graph.add("SaveImage", images=clip[0], filename_prefix="originals")
    result = server.run(graph.nodes).raise_for_error()

    for node in (core, ours, copied):
        path = server.saved_file(result, node, "images")
        picture, sound = streams(path)
        assert f"{WIDTH}x{HEIGHT}" in picture and "h264" in picture
        assert "Audio: aac" in sound
        frames, seconds = imageio_ffmpeg.count_frames_and_secs(path)
        assert frames == 20
        # Half of 29.97 frames a second, as every second frame was taken.
        assert seconds == pytest.approx(20 / 14.985, abs=0.15)
    assert len(result.outputs[stills.id]["images"]) == 20
    with (
        Image.open(server.saved_file(result, stills, "images")) as decoded,
        Image.open(server.saved_file(result, originals, "images")) as original,
    ):
        difference = np.asarray(decoded, np.float32) - np.asarray(original, np.float32)
        assert np.abs(difference).mean() < 8


def test_clip_without_sound(server):
    """The audio output carries nothing, and every audio input takes that."""
    silent = server.input_folder / "silent.mp4"
    subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", "-i", str(server.input_folder / CLIP_FILE),
         "-an", "-c", "copy", str(silent)],
        check=True,
    )  # fmt: skip
    graph = Graph()
    clip = load_video(graph, file=silent.name)
    created = graph.add("CreateVideo", images=clip[0], fps=clip[1], audio=clip[3])
    core = graph.add("SaveVideo", video=created[0], filename_prefix="silent-core", format="mp4", codec="h264")
    ours = graph.add(
        "TAV_SaveVideo", images=clip[0], fps=clip[1], audio=clip[3], filename_prefix="silent", format="mp4", quality=80
    )
    result = server.run(graph.nodes).raise_for_error()
    for node in (core, ours):
        assert len(streams(server.saved_file(result, node, "images"))) == 1
