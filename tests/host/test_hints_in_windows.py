"""Context windows on a real server: what is given for each frame follows its window.

Attention and norms are per frame here, so that a clip in windows must be the clip in one piece.
"""

from __future__ import annotations

import pytest
import tiny_checkpoint
from graphs import PerFrame, context_windows, invert, relative_error, sample

pytestmark = pytest.mark.host

STEPS = 2
SCHEDULES = ("standard_static", "looped_uniform")


def assert_windows_equal_the_whole(server, scene, conds, exercised, kind, apart=False):
    """``apart``: one conditioning at a time in the windows, as on a host that is short of memory."""
    graph = scene.graph
    model = graph.add("ProbeSeparateConds", model=scene.model)[0] if apart else scene.model
    plain, whole, *others = server.latents(
        graph,
        sample(graph, scene.model, scene.positive, scene.negative, scene.latent, STEPS),
        sample(graph, scene.model, *conds, scene.latent, STEPS),
        *(sample(graph, context_windows(graph, model, each), *conds, scene.latent, STEPS) for each in SCHEDULES),
    )
    assert relative_error(plain, whole) > 1e-3
    errors = [relative_error(each, whole) for each in others]
    exercised.append(f"{kind} in context windows: relative difference {max(errors):.0e} from the clip in one piece")
    assert max(errors) < 1e-4


@pytest.mark.parametrize("apart", [False, True])
def test_controlnet_hints_follow_their_window(server, exercised, apart):
    """Two ControlNets, one of them with fewer hints than frames."""
    scene = PerFrame()
    conds = scene.hinted("control.safetensors", 2, scene.hinted("control.safetensors"), seed=5)
    assert_windows_equal_the_whole(server, scene, conds, exercised, "ControlNet hints", apart)


def test_t2i_adapter_hints_follow_their_window(server, exercised):
    names = "two-blocks.safetensors", "adapter.safetensors"
    paths = [
        tiny_checkpoint.save(weights, server.base / "models" / folder / name)
        for weights, folder, name in (
            (tiny_checkpoint.unet_weights(tiny_checkpoint.SD1_TWO_BLOCKS, seed=21), "diffusion_models", names[0]),
            (tiny_checkpoint.t2i_adapter_weights(seed=22), "controlnet", names[1]),
        )
    ]
    scene = PerFrame(names[0])
    conds = scene.hinted(names[1], conds=scene.hinted("control.safetensors", 1))
    assert_windows_equal_the_whole(server, scene, conds, exercised, "T2I-Adapter hints")
    for path in paths:
        path.unlink()


def test_masks_and_prompts_for_each_frame_follow_their_window(server, exercised):
    scene = PerFrame()
    assert_windows_equal_the_whole(server, scene, (scene.masked(), scene.negative), exercised, "masks")
    scene = PerFrame()
    prompts = scene.graph.add("ProbeFramePrompts", conditioning=scene.positive, count=scene.frames)[0]
    assert_windows_equal_the_whole(server, scene, (prompts, scene.negative), exercised, "prompts for each frame")


def test_an_inversion_with_hints_follows_its_windows(server):
    scene = PerFrame()
    graph = scene.graph
    positive, _ = scene.hinted("control.safetensors")
    models = scene.model, *(context_windows(graph, scene.model, schedule) for schedule in SCHEDULES)
    plain, whole, *others = server.latents(
        graph,
        invert(graph, scene.model, scene.latent, scene.positive, STEPS),
        *(invert(graph, model, scene.latent, positive, STEPS) for model in models),
    )
    assert relative_error(plain, whole) > 1e-3
    assert all(relative_error(each, whole) < 1e-4 for each in others)
