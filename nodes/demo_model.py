"""Load Demo Model: the tiny Stable Diffusion that comes with the pack, and a clip for it."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from ..tav_core.media.clip import load_clip
from ..tav_core.tiny_sd.model import WEIGHTS, load

_CLIP = Path(__file__).resolve().parents[1] / "demo" / "bounce.mp4"
_SIDE = 64


class LoadDemoModel(io.ComfyNode):
    """The pack's tiny Stable Diffusion and its clip -> MODEL, CLIP, VAE, IMAGE, FLOAT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TAV_LoadDemoModel",
            display_name="Load Demo Model (Tune-A-Video)",
            category="Tune-A-Video/demo",
            description="A tiny Stable Diffusion that comes with this pack, and a clip, to try Tune-A-Video without a "
            "download. It knows drawings of 64x64 pixels: circles, squares, triangles, stars, hearts and crosses.",
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="UNet of 7 million parameters, epsilon-prediction."),
                io.Clip.Output(display_name="clip", tooltip="For CLIP Text Encode; at most 22 words."),
                io.Vae.Output(display_name="vae", tooltip="Its latents are a quarter of the picture's size."),
                io.Image.Output(
                    display_name="images",
                    tooltip="A clip of 8 frames for it: a blue heart on the sand, painting style.",
                ),
                io.Float.Output(display_name="fps", tooltip="The clip's frames a second."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        clip = load_clip(_CLIP, frame_count=0, width=_SIDE, height=_SIDE)
        return io.NodeOutput(*load(WEIGHTS), clip.images, clip.fps)


NODES = [LoadDemoModel]
