"""API-format graphs for the host tests, written as functions that add nodes to a graph."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch

PACK = "Tune-A-Video"
CHECKPOINT = "tiny-sd1.safetensors"
CLIP_FILE = "man-skiing.mp4"
SOURCE_PROMPT = "a man is skiing"
EDIT_PROMPT = "spider man is skiing on the beach, cartoon style"
FRAMES = 3
# All numbers differ: what is mixed up must not fit by chance. Sampling has one sigma more than steps.
WIDTH, HEIGHT = 96, 64
STEPS = 4

Link = list[Any]


class Node:
    """A node of a graph: `node[i]` is a link to its output i."""

    def __init__(self, node_id: str) -> None:
        self.id = node_id

    def __getitem__(self, output: int) -> Link:
        return [self.id, output]


class Graph:
    """An API-format graph that is built up node by node."""

    def __init__(self) -> None:
        self.nodes: dict[str, dict[str, Any]] = {}

    def add(self, class_type: str, **inputs: Any) -> Node:
        """Add a node. Its id says what it is, so that errors and cache messages can be read."""
        node_id = f"{class_type}-{len(self.nodes) + 1}"
        self.nodes[node_id] = {"class_type": class_type, "inputs": inputs}
        return Node(node_id)


@dataclasses.dataclass
class Checkpoint:
    """The links of a checkpoint loader's three outputs."""

    model: Link
    clip: Link
    vae: Link


def checkpoint(graph: Graph, name: str = CHECKPOINT) -> Checkpoint:
    node = graph.add("CheckpointLoaderSimple", ckpt_name=name)
    return Checkpoint(node[0], node[1], node[2])


def text(graph: Graph, clip: Link, prompt: str) -> Link:
    return graph.add("CLIPTextEncode", clip=clip, text=prompt)[0]


def load_video(graph: Graph, file: str = CLIP_FILE, **changes: Any) -> Node:
    """TAV_LoadVideo with every input named: FRAMES frames of WIDTH x HEIGHT, unless changed."""
    inputs = {
        "file": file,
        "start": 0.0,
        "start_unit": "seconds",
        "frame_count": FRAMES,
        "frame_step": 2,
        "width": WIDTH,
        "height": HEIGHT,
        "resize": "crop to fill",
    }
    return graph.add("TAV_LoadVideo", **(inputs | changes))


def clip_latent(graph: Graph, vae: Link, frames: int = FRAMES) -> Link:
    """The latents of the clip's first frames."""
    return graph.add("VAEEncode", pixels=load_video(graph, frame_count=frames)[0], vae=vae)[0]


def random_latent(graph: Graph, frames: int = FRAMES, seed: int = 4, channels: int = 4, broken: int = 0) -> Link:
    """Frames that have little in common; the first ``broken`` numbers are NaN."""
    size = {"width": WIDTH // 8, "height": HEIGHT // 8}
    return graph.add("ProbeLatent", frames=frames, channels=channels, seed=seed, broken=broken, **size)[0]


def random_hints(graph: Graph, count: int = FRAMES, seed: int = 3, first: int = 0) -> Link:
    """Pictures for a ControlNet, those of a longer row from ``first`` on."""
    return graph.add("ProbeHints", count=count, width=WIDTH, height=HEIGHT, seed=seed, first=first)[0]


def inflate(graph: Graph, model: Link, **changes: Any) -> Link:
    inputs = {
        "attention": "sparse-causal",
        "group_norm": "over frames",
        "query_strength": 1.0,
        "temporal_strength": 1.0,
    }
    return graph.add("TAV_InflateUNet", model=model, **(inputs | changes))[0]


def context_windows(graph: Graph, model: Link, schedule: str = "standard_static", frame_ahead: bool = True) -> Link:
    """The stock node: the model sees two frames at a time, in windows that overlap by one.

    ``frame_ahead``: newer hosts put the frame before a window in front of it.
    """
    inputs = {
        "context_length": 2,
        "context_overlap": 1,
        "context_schedule": schedule,
        "context_stride": 1,
        "closed_loop": False,
        "fuse_method": "pyramid",
        "dim": 0,
        "freenoise": False,
        "cond_retain_index_list": "",
        "split_conds_to_windows": False,
        "latent_retain_index_list": "",
        "causal_window_fix": frame_ahead,
    }
    return graph.add("ContextWindowsManual", model=model, **inputs)[0]


def tune(graph: Graph, model: Link, latent: Link, conditioning: Link, **changes: Any) -> Node:
    """TAV_OneShotTune, three steps with a learning rate that leaves a clear mark."""
    inputs = {
        "steps": 3,
        "learning_rate": 1e-3,
        "seed": 7,
        "train_scope": "all",
        "precision": "fp32",
        "warmup_steps": 0,
        "gradient_clip": 1.0,
    }
    return graph.add("TAV_OneShotTune", model=model, latent=latent, conditioning=conditioning, **(inputs | changes))


def invert(graph: Graph, model: Link, latent: Link, conditioning: Link, steps: int = STEPS) -> Link:
    return graph.add("TAV_DDIMInvert", model=model, latent=latent, conditioning=conditioning, steps=steps)[0]


def sample(
    graph: Graph, model: Link, positive: Link, negative: Link, latent: Link, steps: int = STEPS, **changes: Any
) -> Link:
    inputs = {"guidance": 7.5, "eta": 0.0, "seed": 0, "last_step": "clip noise level"}
    return graph.add(
        "TAV_Sample",
        model=model,
        positive=positive,
        negative=negative,
        latent=latent,
        steps=steps,
        **(inputs | changes),
    )[0]


def ksampler(
    graph: Graph, model: Link, positive: Link, negative: Link, latent: Link, steps: int = STEPS, **changes: Any
) -> Link:
    """The stock advanced sampler, Euler on the DDIM schedule, without noise of its own unless changed."""
    inputs = {
        "add_noise": "disable",
        "noise_seed": 0,
        "steps": steps,
        "cfg": 7.5,
        "sampler_name": "euler",
        "scheduler": "ddim_uniform",
        "start_at_step": 0,
        "end_at_step": 10000,
        "return_with_leftover_noise": "disable",
    }
    return graph.add(
        "KSamplerAdvanced",
        model=model,
        positive=positive,
        negative=negative,
        latent_image=latent,
        **(inputs | changes),
    )[0]


def text_to_image(graph: Graph, loaded: Checkpoint, end_at_step: int = 10000) -> tuple[Node, Node]:
    """The stock text-to-image graph: the nodes that save its latent and its image.

    Any end_at_step beyond the steps asks for the same picture; another one makes the host compute it again.
    """
    latent = ksampler(
        graph,
        loaded.model,
        text(graph, loaded.clip, "a photo of a lighthouse"),
        text(graph, loaded.clip, ""),
        graph.add("EmptyLatentImage", width=WIDTH, height=HEIGHT, batch_size=1)[0],
        add_noise="enable",
        noise_seed=11,
        end_at_step=end_at_step,
    )
    image = graph.add("VAEDecode", samples=latent, vae=loaded.vae)[0]
    return save_latent(graph, latent), graph.add("SaveImage", images=image, filename_prefix="stock")


class Edit:
    """A tuned model and all that an edit needs."""

    def __init__(self, motion_file: str, frames: int = FRAMES) -> None:
        graph = self.graph = Graph()
        self.loaded = checkpoint(graph)
        self.motion = graph.add("TAV_LoadMotion", file=motion_file)[0]
        self.model = inflate(graph, self.loaded.model, motion=self.motion)
        self.latent = clip_latent(graph, self.loaded.vae, frames)
        self.positive = text(graph, self.loaded.clip, EDIT_PROMPT)
        self.negative = text(graph, self.loaded.clip, "")

    def video(self, model: Link, positive: Link | None = None, negative: Link | None = None, **changes: Any) -> Link:
        """The edit's latents, with other conditionings if given."""
        return sample(self.graph, model, positive or self.positive, negative or self.negative, self.latent, **changes)


class PerFrame:
    """A model whose frames do not see each other, two prompts and different frames."""

    frames = 4

    def __init__(self, unet: str | None = None) -> None:
        graph = self.graph = Graph()
        loaded = checkpoint(graph)
        plain = graph.add("UNETLoader", unet_name=unet, weight_dtype="default")[0] if unet else loaded.model
        self.model = inflate(graph, plain, attention="per frame", group_norm="per frame")
        self.positive, self.negative = text(graph, loaded.clip, EDIT_PROMPT), text(graph, loaded.clip, "")
        self.latent = random_latent(graph, self.frames)

    def hinted(
        self, net: str, count: int = frames, conds: tuple[Link, Link] | None = None, seed: int = 3
    ) -> tuple[Link, Link]:
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

    def masked(self) -> Link:
        """The prompt inside a mask that differs from frame to frame, beside the prompt everywhere."""
        image = random_hints(self.graph, self.frames)
        mask = self.graph.add("ImageToMask", image=image, channel="red")[0]
        inside = self.graph.add(
            "ConditioningSetMask", conditioning=self.positive, mask=mask, strength=1.0, set_cond_area="default"
        )[0]
        return self.graph.add("ConditioningCombine", conditioning_1=inside, conditioning_2=self.negative)[0]


def save_latent(graph: Graph, latent: Link) -> Node:
    return graph.add("SaveLatent", samples=latent, filename_prefix="latent")


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return ((value - reference).norm() / reference.norm()).item()


def assert_refused(server: Any, graph: Graph, node: Node, message: str) -> None:
    """Only `node` fails, saying something that matches `message`, without having reported any progress."""
    graph.add("PreviewAny", source=node[0])  # the host runs only what an output node needs
    result = server.run(graph.nodes)
    assert result.status in ("error", "invalid"), f"{node.id} took it: {result}"
    assert set(result.errors) == {node.id}
    assert re.search(message, result.errors[node.id]), result.errors[node.id]
    assert not [p for p in result.progress if p.node == node.id]
