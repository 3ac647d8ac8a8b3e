"""Inflate UNet: a model that sees its batch as frames of video."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..tav_core import host
from ..tav_core.attention import SPATIAL_MODES
from ..tav_core.inflate import Inflation
from ..tav_core.motion.file import Motion
from .support.limits import within_limits
from .support.memory import memory_explained
from .support.types import CATEGORY, MotionType, search_aliases

GROUP_NORM_MODES = ("over frames", "per frame")


class InflateUNet(io.ComfyNode):
    """MODEL of an image -> MODEL that sees its batch as the frames of a video."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="TAV_InflateUNet",
            display_name="Inflate UNet (Tune-A-Video)",
            category=CATEGORY,
            **search_aliases("apply motion", "sparse-causal attention", "temporal attention"),
            description="Makes a Stable Diffusion model see a batch of latents as the frames of one video. With a "
            "motion it samples like the tuned model. LoRAs may come before or after it.",
            inputs=[
                io.Model.Input("model", tooltip="A Stable Diffusion 1.x, 2.x or SDXL model."),
                io.Combo.Input(
                    "attention",
                    options=list(SPATIAL_MODES),
                    default="sparse-causal",
                    tooltip="Which frames a frame attends to. The method uses sparse-causal: the first and the "
                    "previous one. self, first and previous adds the frame itself; shuffled groups takes four, new "
                    "groups in each step. The other modes are for comparison.",
                ),
                io.Combo.Input(
                    "group_norm",
                    options=list(GROUP_NORM_MODES),
                    default="over frames",
                    tooltip="Statistics of the residual blocks' norms: pooled over all frames, as the released "
                    "code does, or per frame.",
                ),
                io.Float.Input(
                    "query_strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How strongly the motion's changes to the query projections apply. 1 = as tuned.",
                ),
                io.Float.Input(
                    "temporal_strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How much the motion's temporal layers add. 1 = as tuned, 0 = off.",
                ),
                MotionType.Input("motion", optional=True, tooltip="Tuned weights, from One-Shot Tune or Load Motion."),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The inflated model, for any sampler.")],
        )

    @classmethod
    @memory_explained("model", "Close what else takes memory and queue again.")
    @within_limits
    def execute(
        cls,
        model: Any,
        attention: Any,
        group_norm: str,
        query_strength: float,
        temporal_strength: float,
        motion: Motion | None = None,
    ) -> io.NodeOutput:
        """Refuses models without a Stable Diffusion UNet and motions of another model (ValueError)."""
        host.check_model(model)
        inflation = Inflation(attention, group_norm == "over frames", temporal_strength)
        return io.NodeOutput(host.inflate_model(model, inflation, motion, query_strength))


NODES = [InflateUNet]
