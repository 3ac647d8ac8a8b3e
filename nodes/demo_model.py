"""Load Demo Model: the tiny Stable Diffusion that comes with the pack."""

from __future__ import annotations

from comfy_api.latest import io

from ..tav_core.tiny_sd.model import WEIGHTS, load


class LoadDemoModel(io.ComfyNode):
    """The pack's tiny Stable Diffusion -> MODEL, CLIP, VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TAV_LoadDemoModel",
            display_name="Load Demo Model (Tune-A-Video)",
            category="Tune-A-Video/demo",
            description="A tiny Stable Diffusion that comes with this pack, to try Tune-A-Video without a download. "
            "It knows drawings of 64x64 pixels: circles, squares, triangles, stars, hearts and crosses.",
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="UNet of 6 million parameters, epsilon-prediction."),
                io.Clip.Output(display_name="clip", tooltip="For CLIP Text Encode; at most 22 words."),
                io.Vae.Output(display_name="vae", tooltip="Its latents are a quarter of the picture's size."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load(WEIGHTS))


NODES = [LoadDemoModel]
