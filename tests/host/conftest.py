"""One ComfyUI for the whole session, with this pack, the probe nodes and small model files in it."""

from __future__ import annotations

import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import real_packs
import tiny_checkpoint
import torch
from host_server import HostServer, RunResult, host_version
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# Test modules of this folder share graphs.py; pytest's importlib mode adds no folder of tests to the path.
sys.path.insert(0, str(HERE))

import graphs  # noqa: E402
from graphs import Graph, Link, Node  # noqa: E402

PROBES = "probe-nodes"


def write_models(models: Path) -> None:
    """The small model files, where a user would put them."""
    write, layouts = tiny_checkpoint.save, tiny_checkpoint
    write(layouts.checkpoint_weights(layouts.SD1, seed=0), models / "checkpoints" / graphs.CHECKPOINT)
    write(layouts.unet_weights(layouts.SD1_SHALLOW, seed=6), models / "diffusion_models" / "sd1-shallow.safetensors")
    write(layouts.unet_weights(layouts.SD2_SHALLOW, seed=7), models / "diffusion_models" / "sd2.safetensors")
    write(layouts.sd3_weights(seed=8), models / "diffusion_models" / "sd3.safetensors")
    write(layouts.lora_weights(layouts.SD1, seed=1), models / "loras" / "style.safetensors")
    write(layouts.controlnet_weights(layouts.SD1, seed=2), models / "controlnet" / "control.safetensors")


class Host(HostServer):
    """The server with what the tests ask of it again and again."""

    def latents(self, graph: Graph, *links: Link) -> list[torch.Tensor]:
        """Run the graph and hand over these LATENT links' tensors, exactly as they are in the host."""
        nodes = [graphs.save_latent(graph, link) for link in links]
        result = self.run(graph.nodes).raise_for_error()
        return [self.saved_latent(result, node) for node in nodes]

    def saved_latent(self, result: RunResult, node: Node) -> torch.Tensor:
        return load_file(self.saved_file(result, node, "latents"))["latent_tensor"]

    def saved_file(self, result: RunResult, node: Node, kind: str) -> Path:
        """The first file of that kind which the node's UI output names."""
        entry = result.outputs[node.id][kind][0]
        return self.base / entry["type"] / entry["subfolder"] / entry["filename"]


@pytest.fixture(scope="session")
def server(comfyui: Path | None, shared_videos: list[Path], exercised: list[str]) -> Iterator[Host]:
    """A running ComfyUI. Tests may restart it."""
    assert comfyui is not None  # tests marked `host` are left out where there is none
    base = Path(tempfile.mkdtemp(prefix="tune-a-video-host-"))
    try:
        write_models(base / "models")
        (base / "input").mkdir()
        for video in shared_videos:
            shutil.copy(video, base / "input")
        beside = real_packs.found()
        packs = {graphs.PACK: ROOT, PROBES: HERE / "probe_nodes"} | beside
        # Threads that wait for each other asleep, not spinning: the tests share their cores with the server.
        environment = {"OMP_WAIT_POLICY": "PASSIVE"}
        with Host(comfyui, base, packs, environment, ["--preview-method", "latent2rgb"]) as running:
            exercised.append(f"host tests: ComfyUI {host_version(comfyui)} as a server on the CPU")
            exercised.extend(f"beside it: {name}" for name in beside)
            yield running
    finally:
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def random_step() -> int:
    """A step to cancel at; the number is in the test's output, should it fail."""
    step = 1 + secrets.randbelow(6)
    print(f"cancelled at step {step}")
    return step


@pytest.fixture
def new_log(server: Host) -> Callable[[], str]:
    """Called at the end of a test: what the server has logged since its start."""
    before = len(server.log())
    return lambda: server.log()[before:]


@pytest.fixture(scope="session")
def motion_file(server: Host) -> str:
    """A saved tuning of the clip on the small checkpoint, by the name that TAV_LoadMotion lists."""
    graph = Graph()
    loaded = graphs.checkpoint(graph)
    latent = graphs.clip_latent(graph, loaded.vae)
    source = graphs.text(graph, loaded.clip, graphs.SOURCE_PROMPT)
    tuning = graphs.tune(graph, graphs.inflate(graph, loaded.model), latent, source)
    graph.add("TAV_SaveMotion", motion=tuning[1], filename_prefix="shared")
    server.run(graph.nodes).raise_for_error()
    (path,) = server.models_folder("tav").glob("shared*.safetensors")
    return path.name
