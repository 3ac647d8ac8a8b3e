"""Context windows on a real server: what is given for each frame follows its window.

Attention and norms are per frame here, so that a clip in windows must be the clip in one piece.
"""

from __future__ import annotations

import pytest
import tiny_checkpoint
from graphs import (
    EDIT_PROMPT,
    Graph,
    checkpoint,
    context_windows,
    inflate,
    invert,
    random_hints,
    random_latent,
    relative_error,
    sample,
    text,
)

pytestmark = pytest.mark.host

FRAMES, STEPS = 4, 2
SCHEDULES = ("standard_static", "looped_uniform")


class Scene:
    """A model whose frames do not see each other, two prompts and different frames."""

    def __init__(self, unet: str | None = None) -> None:
        graph = self.graph = Graph()
        loaded = checkpoint(graph)
        plain = graph.add("UNETLoader", unet_name=unet, weight_dtype="default")[0] if unet else loaded.model
        self.model = inflate(graph, plain, attention="per frame", group_norm="per frame")
        self.positive, self.negative = text(graph, loaded.clip, EDIT_PROMPT), text(graph, loaded.clip, "")
        self.latent = random_latent(graph, FRAMES)

    def hinted(self, net, count=FRAMES, conds=None, seed=3):
        """Both prompts with a hint for each frame."""
        positive, negative = conds or (self.positive, self.negative)
        node = self.graph.add(
            "ControlNetApplyAdvanced",
            positive=positive,
            negative=negative,
            control_net=self.graph.add("ControlNetLoader", control_net_name=net)[0],
            image=random_hints(self.graph, count, seed=seed),
            strength=1.0,
            start_percent=0.0,
            end_percent=1.0,
        )
        return node[0], node[1]

    def masked(self):
        """The prompt inside a mask that differs from frame to frame, beside the prompt everywhere."""
        image = random_hints(self.graph, FRAMES)
        mask = self.graph.add("ImageToMask", image=image, channel="red")[0]
        inside = self.graph.add(
            "ConditioningSetMask", conditioning=self.positive, mask=mask, strength=1.0, set_cond_area="default"
        )[0]
        return self.graph.add("ConditioningCombine", conditioning_1=inside, conditioning_2=self.negative)[0]


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
    scene = Scene()
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
    scene = Scene(names[0])
    conds = scene.hinted(names[1], conds=scene.hinted("control.safetensors", 1))
    assert_windows_equal_the_whole(server, scene, conds, exercised, "T2I-Adapter hints")
    for path in paths:
        path.unlink()


def test_masks_and_prompts_for_each_frame_follow_their_window(server, exercised):
    scene = Scene()
    assert_windows_equal_the_whole(server, scene, (scene.masked(), scene.negative), exercised, "masks")
    scene = Scene()
    prompts = scene.graph.add("ProbeFramePrompts", conditioning=scene.positive, count=FRAMES)[0]
    assert_windows_equal_the_whole(server, scene, (prompts, scene.negative), exercised, "prompts for each frame")


def test_an_inversion_with_hints_follows_its_windows(server):
    scene = Scene()
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
