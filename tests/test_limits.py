"""Nodes check every argument of execute against their schema, because a link can bring any value."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pack_nodes
import pytest
import torch
from tune_a_video.tav_core.errors import Refusal
from tune_a_video.tav_core.motion.file import Motion

pytestmark = pytest.mark.comfyui

GOOD: dict[str, Any] = {"count": 3, "strength": 0.5, "mode": "fast", "exact": True}


@pytest.fixture
def node() -> Any:
    from comfy_api.latest import io
    from tune_a_video.nodes.support.limits import within_limits
    from tune_a_video.nodes.support.memory import memory_explained

    class Node(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(
                node_id="TAV_Test",
                inputs=[
                    io.Latent.Input("image"),
                    io.Int.Input("count", min=1, max=8),
                    io.Float.Input("strength", min=0.0, max=1.0),
                    io.Combo.Input("mode", options=["fast", "slow"]),
                    io.Boolean.Input("exact"),
                    io.Combo.Input("file", options=["a.mp4"], upload=io.UploadType.video, optional=True),
                    io.Int.Input("rank", default=0, min=0, max=64, optional=True),
                ],
            )

        @classmethod
        @memory_explained("image", "Use fewer frames.")
        @within_limits
        def execute(
            cls, image: Any, count: int, strength: float, mode: str, exact: bool, file: str = "", rank: int = 0
        ) -> io.NodeOutput:
            """Return the arguments."""
            if image == "too large":
                raise MemoryError
            return io.NodeOutput(cls, count, strength, mode, exact, file, rank)

    return Node


def test_good_values_arrive_by_name_and_by_position(node: Any) -> None:
    assert node.execute(None, **GOOD).args == (node, 3, 0.5, "fast", True, "", 0)
    assert node.execute(None, 8, 0, "slow", False, "new.mp4", 64).args == (node, 8, 0, "slow", False, "new.mp4", 64)
    assert node.execute(None, **{**GOOD, "count": np.int64(1), "strength": np.float32(1)}).args[1:3] == (1, 1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 0}, "^count: 0 is outside 1 to 8. Give a value between those.$"),
        ({"count": 2.5}, "^count: '2.5' is not a whole number"),
        ({"count": None}, "^count: 'None' is not a whole number"),
        ({"strength": float("nan")}, "^strength: nan is outside 0.0 to 1.0"),
        ({"strength": float("inf")}, "^strength: inf is outside"),
        ({"strength": "0.5"}, "^strength: '0.5' is not a number"),
        ({"mode": "x" * 500}, f"^mode: '{'x' * 100}' is not one of fast, slow. Choose one of those.$"),
        ({"mode": torch.zeros(2)}, "^mode: .* is not one of fast, slow"),
        ({"exact": "no"}, "^exact: 'no' is neither true nor false"),
        ({"rank": 65}, "^rank: 65 is outside 0 to 64"),
    ],
)
def test_values_that_the_widget_would_refuse(node: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal, match=message) as refusal:
        node.execute(None, **{**GOOD, **given})
    assert refusal.value.input == next(iter(given))


def test_the_decorated_function_keeps_its_signature_and_its_memory_errors(node: Any) -> None:
    assert list(inspect.signature(node.execute).parameters)[:3] == ["image", "count", "strength"]
    assert node.execute.__doc__ == "Return the arguments."
    with pytest.raises(RuntimeError, match="^image: out of memory. Use fewer frames."):
        node.execute("too large", **GOOD)
    with pytest.raises(TypeError, match="count"):
        node.execute(None)


def test_the_host_runs_a_decorated_node(node: Any) -> None:
    """The executor calls a copy of the class that holds the hidden inputs."""
    copy = node.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    assert node.FUNCTION == "EXECUTE_NORMALIZED"
    assert copy.EXECUTE_NORMALIZED(image=None, **GOOD).args[1:5] == (3, 0.5, "fast", True)
    with pytest.raises(Refusal, match="^count: 9 is outside"):
        copy.EXECUTE_NORMALIZED(image=None, **{**GOOD, "count": 9})


SOCKETS = {"IMAGE": torch.zeros(1, 8, 8, 3), "MASK": torch.zeros(1, 8, 8), "STRING": "text", "TAV_MOTION": Motion({})}


def test_a_socket_without_its_kind_of_value_is_named() -> None:
    """A switch of another pack hands on None, or anything."""
    import asyncio

    import tune_a_video
    from tune_a_video.nodes.support.limits import check_limits

    async def nodes() -> list[Any]:
        return await (await tune_a_video.comfy_entrypoint()).get_node_list()

    seen = set()
    for node in asyncio.run(nodes()):
        for socket in node.define_schema().inputs:
            kind = socket.io_type
            if kind not in (*SOCKETS, "TAV_CONTROL"):
                continue
            seen.add(kind)
            with pytest.raises(Refusal, match=f"^{socket.id}: a dict is connected. Connect a"):
                check_limits(node, **{socket.id: {}})
            if kind in SOCKETS:
                check_limits(node, **{socket.id: SOCKETS[kind]})
            if socket.optional:
                check_limits(node, **{socket.id: None})
            else:
                with pytest.raises(Refusal, match=f"^{socket.id}: nothing arrives at this input. Connect a"):
                    check_limits(node, **{socket.id: None})
    assert seen == {*SOCKETS, "TAV_CONTROL"}


FRAMES = torch.rand(2, 16, 16, 3)


@pytest.mark.parametrize(
    ("node", "given"),
    [
        ("SaveVideo", (8.0, "clip", "mp4", 80)),
        ("EvaluateVideo", (FRAMES,)),
        ("CompareVideos", (FRAMES,)),
        ("ShowMask", (torch.ones(1, 8, 8),)),
    ],
)
@pytest.mark.parametrize("images", [(255 * FRAMES).byte(), FRAMES > 0.5, FRAMES.long()])
def test_frames_in_whole_numbers_are_refused(node: str, given: tuple[Any, ...], images: torch.Tensor) -> None:
    """They would come out white, or fail without a word."""
    hidden = {"hidden": SimpleNamespace(prompt=None, extra_pnginfo=None)}
    with pytest.raises(Refusal, match=r"^(images|source): its values are whole numbers .* divide by 255\.$"):
        type(node, (getattr(pack_nodes, node),), hidden).execute(images, *given)


@pytest.mark.parametrize("mask", [255 * torch.ones(1, 8, 8), -torch.ones(1, 8, 8), torch.full((8, 8), 2)])
def test_a_mask_goes_from_0_to_1_everywhere(mask: torch.Tensor) -> None:
    for work in (
        lambda: pack_nodes.ShowMask.execute(FRAMES, mask),
        lambda: pack_nodes.EvaluateVideo.execute(FRAMES, FRAMES, mask=mask),
        lambda: pack_nodes.EditControl.execute("object", 0.5, mask=mask),
    ):
        with pytest.raises(Refusal, match=r"^mask: it holds values from .*scale its values to 0\.\.1\.$"):
            work()
