"""Build the queued graphs, by kind, and digest their results for comparison."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "host"))

import graphs  # noqa: E402
from graphs import Graph, Link, Node  # noqa: E402

KINDS = ("stock", "lora", "inflated", "inverted", "tuned")
CHECKPOINTS = ("first.safetensors", "second.safetensors")
CLIPS = ("disc.mp4", "bars.mp4")
PROMPTS = ("a disc that rolls over a lawn", "bars that wander in the dark")
LORA = "style.safetensors"
STRENGTHS = (0.0, 0.4, 0.9)
EDITED = "a balloon, watercolour"
TUNING_STEPS = 4


@dataclass(frozen=True)
class Job:
    """One graph. Equal jobs must give equal results, whatever ran before them."""

    kind: str
    checkpoint: int = 0
    clip: int = 0
    strength: float = 0.0
    seed: int = 1

    def __str__(self) -> str:
        return f"{self.kind} of {CHECKPOINTS[self.checkpoint]}, {CLIPS[self.clip]}, LoRA {self.strength}, {self.seed}"


def random_job(rng: Random) -> Job:
    """Draw a job. There are few different ones, so that jobs repeat."""
    kind = rng.choice(KINDS)
    checkpoint, clip = rng.randrange(len(CHECKPOINTS)), rng.randrange(len(CLIPS))
    if kind == "tuned":
        return Job(kind, checkpoint, clip, rng.choice(STRENGTHS[:2]) if checkpoint else 0.0)
    if kind == "lora":
        return Job(kind, checkpoint, strength=rng.choice(STRENGTHS[1:]))
    return Job(kind, checkpoint, checkpoint if kind in ("inflated", "inverted") else 0)


def stock_of(job: Job) -> Job:
    """Return the job that makes a job's stock image and nothing else."""
    return Job("lora" if job.strength else "stock", job.checkpoint, strength=job.strength, seed=job.seed)


def graph_of(job: Job, salt: int) -> tuple[Graph, dict[str, Node]]:
    """Return the graph, and its saving nodes by name.

    ``salt``: goes into inputs that do not change the result, so that the host does not reuse cached results.
    """
    graph = Graph()
    loaded = graphs.checkpoint(graph, CHECKPOINTS[job.checkpoint])
    model, clip = loaded.model, loaded.clip
    if job.strength:
        lora = graph.add(
            "LoraLoader",
            model=model,
            clip=clip,
            lora_name=LORA,
            strength_model=job.strength,
            strength_clip=job.strength,
        )
        model, clip = lora[0], lora[1]
    saved: dict[str, Node] = {}
    # Every graph makes a stock image, beside an inflated model of the same checkpoint.
    stock = graphs.ksampler(
        graph,
        model,
        graphs.text(graph, clip, "a photo of a lighthouse"),
        graphs.text(graph, clip, ""),
        graph.add("EmptyLatentImage", width=64, height=64, batch_size=1)[0],
        add_noise="enable",
        noise_seed=job.seed,
        end_at_step=10000 - salt,
    )
    _save(graph, saved, "stock", stock, loaded.vae)
    if job.kind in ("stock", "lora"):
        return graph, saved
    video = graphs.load_video(graph, CLIPS[job.clip], frame_step=1)
    latent = graph.add("VAEEncode", pixels=video[0], vae=loaded.vae)[0]
    source, empty = graphs.text(graph, clip, PROMPTS[job.clip]), graphs.text(graph, clip, "")
    edited = graphs.text(graph, clip, EDITED)
    if job.kind == "tuned":
        tuning = graphs.tune(graph, model, latent, source, steps=TUNING_STEPS, seed=job.seed)
        model = tuning[0]
        saved["tuned weights"] = graph.add("TAV_SaveMotion", motion=tuning[1], filename_prefix="soak/motion")
        graph.add("PreviewImage", images=tuning[2])
    else:
        model = graphs.inflate(graph, model)
    if job.kind == "inflated":
        edit = graphs.ksampler(
            graph, model, edited, empty, latent, add_noise="enable", noise_seed=3, end_at_step=10000 - salt
        )
    else:
        inverted = graphs.invert(graph, model, latent, source)
        edit = graphs.sample(graph, model, edited, empty, inverted, seed=salt)
    frames = _save(graph, saved, job.kind, edit, loaded.vae)
    graph.add("TAV_SaveVideo", images=frames, fps=8.0, filename_prefix="soak/clip", format="mp4", quality=80)
    return graph, saved


def _save(graph: Graph, saved: dict[str, Node], name: str, latent: Link, vae: Link) -> Link:
    images = graph.add("VAEDecode", samples=latent, vae=vae)[0]
    saved[f"{name} latent"] = graphs.save_latent(graph, latent)
    saved[f"{name} picture"] = graph.add("SaveImage", images=images, filename_prefix=f"soak/{name}")
    return images


def digests(outputs: dict[str, Any], saved: dict[str, Node], base: Path) -> dict[str, str]:
    """Hash the numbers of every saved file, without its metadata, which holds the graph."""
    found = {}
    for name, node in saved.items():
        output = outputs[node.id]
        if "text" in output:
            path = Path(output["text"][0])
        else:
            entry = output[next(iter(output.keys() & {"latents", "images"}))][0]
            path = base / entry["type"] / entry["subfolder"] / entry["filename"]
        digest = hashlib.sha256()
        for part in _numbers(path):
            digest.update(part)
        found[name] = digest.hexdigest()
    return found


def _numbers(path: Path) -> Iterator[bytes]:
    if path.suffix == ".png":
        with Image.open(path) as picture:
            yield np.asarray(picture).tobytes()
        return
    with safe_open(path, framework="np") as file:
        for key in sorted(file.keys()):
            yield key.encode()
            yield file.get_tensor(key).tobytes()
