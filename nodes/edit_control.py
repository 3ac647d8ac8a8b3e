"""Edit Control: how much of the clip an edit keeps, as an input of TAV Sample or as a guider; and its mask, shown."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..tav_core import host
from ..tav_core.control.blend import frame_masks
from ..tav_core.control.settings import LAYERS, PRESETS, Control, at_strength
from ..tav_core.media.pictures import check_frames, check_mask, shaded
from ..tav_core.pipeline import controlled, guider
from .support.limits import within_limits
from .support.memory import memory_explained
from .support.types import CATEGORY, TRAJECTORY_KEY, ControlType, search_aliases

_PRESETS_OWN = "preset's"
_IN_MASK = ("the clip's", "the edit's")
# From where a mask that the user gives takes effect in presets that would find none.
_BLEND_START = 0.2


def _lever(name: str, tooltip: str) -> io.Float.Input:
    """Return a widget of 0 to 1 whose default, -1, stands for the preset's value."""
    return io.Float.Input(
        name, default=-1.0, min=-1.0, max=1.0, step=0.05, optional=True, tooltip=f"{tooltip} -1: the preset's value."
    )


class EditControl(io.ComfyNode):
    """A preset and a strength -> the control of an edit."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="TAV_EditControl",
            display_name="Edit Control (Tune-A-Video)",
            category=CATEGORY,
            **search_aliases("attention injection", "plug and play", "local blend", "keep background"),
            description="Says how much of the clip an edit keeps. Choose what kind of edit it is, then move the "
            "strength. The other inputs change single parts of the preset.",
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="object",
                    tooltip="The kind of edit: style, colour, object, background, add or remove. free: nothing but the "
                    "values that are set below.",
                ),
                io.Float.Input(
                    "strength",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="0 = change freely, as TAV Sample without control. 0.5 = as the preset. 1 = keep as much "
                    "as possible.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the clip may change: one for all frames, or one each. Without it the place is "
                    "found where the two sentences differ.",
                ),
                _lever("self_share", "Share of the steps in which frames attend to each other as in the clip."),
                _lever("cross_share", "Share of the steps in which words that stay act as in the clip."),
                _lever("feature_share", "Share of the steps in which one layer's output is the clip's."),
                _lever("blend_start", "Share of the steps after which the clip returns outside the mask. 1: never."),
                _lever(
                    "fresh_noise", "Share of the initial noise that is replaced by new noise: frees colours and places."
                ),
                _lever("proximal", "Share of the guidance, the weaker part, that is dropped."),
                io.Float.Input(
                    "threshold",
                    default=0.2,
                    min=0.05,
                    max=0.95,
                    step=0.05,
                    optional=True,
                    tooltip="How much the two sentences must differ at a place for it to be in the found mask. Lower: "
                    "larger.",
                ),
                io.Combo.Input(
                    "layers",
                    options=[_PRESETS_OWN, *LAYERS],
                    default=_PRESETS_OWN,
                    optional=True,
                    tooltip="Where self_share acts. up blocks take 0.7 GB at 24 frames of 512x512 in fp16, all 1.1 GB.",
                ),
                io.Combo.Input(
                    "attention_in_mask",
                    options=[_PRESETS_OWN, *_IN_MASK],
                    default=_PRESETS_OWN,
                    optional=True,
                    tooltip="Whose attention acts in the mask while self_share acts. the edit's: shapes can change.",
                ),
            ],
            outputs=[ControlType.Output(display_name="control", tooltip="For TAV Sample or Edit Guider.")],
        )

    @classmethod
    @within_limits
    def execute(
        cls,
        preset: str,
        strength: float,
        mask: Tensor | None = None,
        self_share: float = -1.0,
        cross_share: float = -1.0,
        feature_share: float = -1.0,
        blend_start: float = -1.0,
        fresh_noise: float = -1.0,
        proximal: float = -1.0,
        threshold: float = 0.2,
        layers: str = _PRESETS_OWN,
        attention_in_mask: str = _PRESETS_OWN,
    ) -> io.NodeOutput:
        """Check widgets and mask; the mask is held against the clip when it is sampled."""
        levers = {
            "self_share": self_share,
            "cross_share": cross_share,
            "feature_share": feature_share,
            "blend_start": blend_start,
            "fresh_noise": fresh_noise,
            "proximal": proximal,
        }
        changes: dict[str, Any] = {name: value for name, value in levers.items() if value >= 0}
        if changes.get("blend_start") == 1:
            changes["blend_start"] = None
        if layers != _PRESETS_OWN:
            changes["layers"] = layers
        if attention_in_mask != _PRESETS_OWN:
            changes["free_inside"] = attention_in_mask == _IN_MASK[1]
        if mask is not None:
            mask = check_mask(mask)
            if PRESETS[preset].blend_start is None:
                changes.setdefault("blend_start", _BLEND_START)
        control = replace(PRESETS[preset], mask=mask, threshold=threshold, **changes)
        return io.NodeOutput(at_strength(control, strength))


class EditGuider(io.ComfyNode):
    """A control, a model and prompts -> a GUIDER for SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="TAV_EditGuider",
            display_name="Edit Guider (Tune-A-Video)",
            category=CATEGORY,
            **search_aliases("guider"),
            description="Brings Edit Control to SamplerCustomAdvanced, for other samplers than DDIM. Connect "
            "DisableNoise and the output of DDIM Invert there.",
            inputs=[
                io.Model.Input("model", tooltip="The tuned model, the same as in DDIM Invert."),
                io.Conditioning.Input("positive", tooltip="The edit's sentence, from Edit Prompt."),
                io.Conditioning.Input("negative", tooltip="The negative prompt, from Edit Prompt."),
                io.Latent.Input("latent", tooltip="The inverted clip, from DDIM Invert, with its trajectory."),
                ControlType.Input("control", tooltip="From Edit Control."),
                io.Float.Input(
                    "guidance",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Classifier-free guidance scale.",
                ),
            ],
            outputs=[
                io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced."),
                io.Mask.Output(
                    display_name="mask",
                    tooltip="Where the clip may change, a frame each, of the latent's size: given or found. Without "
                    "any it is 1 everywhere.",
                ),
            ],
        )

    @classmethod
    @memory_explained("latent", "Use fewer frames or a smaller size.")
    @within_limits
    def execute(
        cls, model: Any, positive: Any, negative: Any, latent: dict[str, Any], control: Control, guidance: float
    ) -> io.NodeOutput:
        """Refuses inputs that don't fit together before any work (ValueError)."""
        host.check_model(model)
        samples = host.check_latent(model, latent)
        for name, conditioning in (("positive", positive), ("negative", negative)):
            host.check_conditioning(model, name, conditioning, len(samples))
        run = controlled(model, control, latent.get(TRAJECTORY_KEY), samples, positive, latent.get("noise_mask"))
        made = guider(model, positive, negative, guidance, run)
        return io.NodeOutput(made, frame_masks(run.mask, samples))


class ShowMask(io.ComfyNode):
    """Frames and a MASK -> frames that are dark outside the mask."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="TAV_ShowMask",
            display_name="Show Mask (Tune-A-Video)",
            category=CATEGORY,
            **search_aliases("mask overlay"),
            description="Shows a mask over a clip: outside it the frames are dark and grey.",
            inputs=[
                io.Image.Input("images", tooltip="Frames, of the clip or of the edit."),
                io.Mask.Input("mask", tooltip="One mask for all frames or one each, of any size."),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="The frames, dark outside the mask.")],
        )

    @classmethod
    @memory_explained("images", "Use fewer frames or a smaller size.")
    @within_limits
    def execute(cls, images: Tensor, mask: Tensor) -> io.NodeOutput:
        """Refuses a mask of another number of frames (ValueError)."""
        check_frames("images", images)
        return io.NodeOutput(shaded(images, mask))


NODES = [EditControl, EditGuider, ShowMask]
