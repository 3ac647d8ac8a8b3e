"""ControlNet on an inflated model: each frame gets its own hint, however the host groups the conditionings."""

from __future__ import annotations

import json

import pytest
import torch
from graphs import (
    EDIT_PROMPT,
    FRAMES,
    Graph,
    checkpoint,
    inflate,
    ksampler,
    random_hints,
    random_latent,
    relative_error,
    sample,
    text,
)

pytestmark = [pytest.mark.host, pytest.mark.shared]


class Scene:
    """An inflated model, two prompts and latents, with hints applied to both prompts."""

    def __init__(self, motion_file=None, **inflation):
        self.graph = Graph()
        self.loaded = checkpoint(self.graph)
        if motion_file:
            inflation["motion"] = self.graph.add("TAV_LoadMotion", file=motion_file)[0]
        self.model = inflate(self.graph, self.loaded.model, **inflation)
        self.positive = text(self.graph, self.loaded.clip, EDIT_PROMPT)
        self.negative = text(self.graph, self.loaded.clip, "")
        self.control_net = self.graph.add("ControlNetLoader", control_net_name="control.safetensors")[0]

    def hints(self, first=0, count=FRAMES):
        return random_hints(self.graph, count, first=first)

    def apply(self, hints, strength=1.0):
        """The stock node's two outputs: positive and negative."""
        node = self.graph.add(
            "ControlNetApplyAdvanced",
            positive=self.positive,
            negative=self.negative,
            control_net=self.control_net,
            image=hints,
            strength=strength,
            start_percent=0.0,
            end_percent=1.0,
        )
        return node[0], node[1]

    def same_latent(self, frames=FRAMES):
        """One random latent, repeated for every frame, so that frames differ by their hints alone."""
        one = random_latent(self.graph, 1)
        return self.graph.add("RepeatLatentBatch", samples=one, amount=frames)[0]

    def recorded(self, model, name):
        return self.graph.add("ProbeRecord", model=model, name=name)[0]

    def separate(self, model):
        return self.graph.add("ProbeSeparateConds", model=model)[0]


def recorded_calls(server, name):
    """The calls of the UNet, and (chunk, frame) -> what ControlNet adds at the first step."""
    calls = json.loads((server.output_folder / f"{name}.json").read_text())
    rows = {}
    for call in calls:
        frames = call["rows"] // len(call["chunks"])
        added = torch.tensor(call["control"]["output"][0]) if call["control"] else torch.zeros(call["rows"])
        for position, chunk in enumerate(call["chunks"]):
            for frame in range(frames):
                rows.setdefault((chunk, frame), added[position * frames + frame])
    return rows, calls


def test_frame_gets_its_own_hint(server, motion_file):
    """ControlNet adds the same to frame i as to a single image with hint i."""
    expected = []
    for frame in range(FRAMES):
        scene = Scene()
        positive, negative = scene.apply(scene.hints(first=frame, count=1))
        model = scene.recorded(scene.loaded.model, "image")
        server.latents(scene.graph, sample(scene.graph, model, positive, negative, scene.same_latent(1), steps=1))
        expected.append(recorded_calls(server, "image")[0])

    for separate in (False, True):
        scene = Scene(motion_file)
        positive, negative = scene.apply(scene.hints())
        model = scene.separate(scene.model) if separate else scene.model
        model = scene.recorded(model, "video")
        server.latents(scene.graph, sample(scene.graph, model, positive, negative, scene.same_latent(), steps=1))
        rows, calls = recorded_calls(server, "video")
        assert [len(call["chunks"]) for call in calls] == ([1, 1] if separate else [2])
        assert len(rows) == 2 * FRAMES
        for chunk in (0, 1):
            for frame in range(FRAMES):
                alone = expected[frame][chunk, 0]
                others = [rows[chunk, other] for other in range(FRAMES) if other != frame]
                assert relative_error(rows[chunk, frame], alone) < 1e-4
                assert all(relative_error(other, alone) > 1e-2 for other in others)


def test_frames_without_ties_equal_single_images(server):
    """With attention and norms per frame, a video is its frames sampled one by one, each with its hint."""
    scene = Scene(attention="per frame", group_norm="per frame")
    positive, negative = scene.apply(scene.hints())
    links = [sample(scene.graph, scene.model, positive, negative, scene.same_latent())]
    for frame in range(FRAMES):
        positive, negative = scene.apply(scene.hints(first=frame, count=1))
        links.append(sample(scene.graph, scene.loaded.model, positive, negative, scene.same_latent(1)))
    video, *images = server.latents(scene.graph, *links)
    for frame in range(FRAMES):
        assert relative_error(video[frame : frame + 1], images[frame]) < 1e-4


@pytest.mark.parametrize("hints", [1, FRAMES])
def test_batched_and_separate_conds_agree(server, motion_file, exercised, hints):
    """Together, kept apart by the host's memory estimate, and kept apart by a ControlNet object of their own."""
    scene = Scene(motion_file)
    latent = scene.same_latent()
    positive, negative = scene.apply(scene.hints(count=hints))
    graph = scene.graph
    # The host would reuse an equal node's result; a detour makes it a ControlNet object of its own.
    detour = graph.add("ImageFromBatch", image=scene.hints(count=hints), batch_index=0, length=hints)[0]
    _, other_negative = scene.apply(detour)
    together, apart, own_control, no_control = server.latents(
        graph,
        sample(graph, scene.model, positive, negative, latent),
        sample(graph, scene.separate(scene.model), positive, negative, latent),
        sample(graph, scene.recorded(scene.model, "own"), positive, other_negative, latent),
        sample(graph, scene.model, scene.positive, scene.negative, latent),
    )
    assert all(len(call["chunks"]) == 1 for call in recorded_calls(server, "own")[1])
    assert relative_error(together, no_control) > 1e-2, "the ControlNet changed nothing"
    errors = [relative_error(apart, together), relative_error(own_control, together)]
    assert max(errors) < 1e-4
    exercised.append(
        f"ControlNet with {hints} hint{'s' * (hints > 1)}: batched and separate conds differ by {max(errors):.0e}"
    )


def test_three_conds_together_and_apart(server, motion_file):
    """ConditioningCombine gives a third chunk."""
    scene = Scene(motion_file)
    graph = scene.graph
    both = graph.add(
        "ConditioningCombine", conditioning_1=scene.positive, conditioning_2=text(graph, scene.loaded.clip, "snow")
    )[0]
    latent = scene.same_latent()
    model = scene.recorded(scene.model, "three")
    together, apart, single = server.latents(
        graph,
        sample(graph, model, both, scene.negative, latent),
        sample(graph, scene.separate(scene.model), both, scene.negative, latent),
        sample(graph, scene.model, scene.positive, scene.negative, latent),
    )
    _, calls = recorded_calls(server, "three")
    assert {len(call["chunks"]) for call in calls} == {3}
    assert relative_error(apart, together) < 1e-4
    assert relative_error(together, single) > 1e-3


def test_ksampler_gets_the_hints_too(server, motion_file):
    scene = Scene(motion_file)
    graph = scene.graph
    latent = scene.same_latent()
    positive, negative = scene.apply(scene.hints())
    stock, ours = server.latents(
        graph,
        ksampler(graph, scene.model, positive, negative, latent),
        sample(graph, scene.model, positive, negative, latent, last_step="zero"),
    )
    assert relative_error(stock, ours) < 1e-5
