"""The workflow files on a running host: every stored value is accepted, and small versions of them run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import canvas
import imageio_ffmpeg
import pytest
import tiny_checkpoint
from graphs import CHECKPOINT, PACK, Node

import workflows

pytestmark = [pytest.mark.host, pytest.mark.shared]

# As in demo/tiny_sd.py, which only a host can import.
FILES = sorted(workflows.FOLDER.glob("*.json"))
DREAMBOOTH, TWO_BLOCKS = "dreambooth.safetensors", "two-blocks.safetensors"
# Names of a user's models in the files -> the tests' small ones.
OUR_MODELS = {
    workflows.CHECKPOINT: CHECKPOINT,
    workflows.DREAMBOOTH: DREAMBOOTH,
    workflows.OTHER_CHECKPOINT: DREAMBOOTH,
    workflows.LORA: "style.safetensors",
    workflows.CHARACTER_LORA: "style.safetensors",
    workflows.CONTROLNET: "control.safetensors",
    workflows.T2I_ADAPTER: "t2i.safetensors",
    workflows.CLIP_VISION: "vision.safetensors",
    workflows.CLIP_TEXT: "clip_l.safetensors",
}
# All of them differ: what is mixed up must not fit by chance.
FRAMES, WIDTH, HEIGHT, STEPS = 5, 96, 64, 2
DEMO_FRAMES = 8
SMALL = {
    "frame_count": FRAMES,
    "width": WIDTH,
    "height": HEIGHT,
    "steps": STEPS,
    # Tuned on two frames, sampled in windows of two.
    "length": 2,
    "context_length": 2,
    "context_overlap": 1,
    "x": WIDTH // 4,
    "y": HEIGHT // 4,
}


@pytest.fixture(scope="module", autouse=True)
def stand_ins(server):
    """Model files of kinds that only workflows need, and the demo's clip."""
    models, write = server.base / "models", tiny_checkpoint.save
    files = {
        "checkpoints": {
            DREAMBOOTH: tiny_checkpoint.checkpoint_weights(tiny_checkpoint.SD1, seed=20),
            TWO_BLOCKS: tiny_checkpoint.checkpoint_weights(tiny_checkpoint.SD1_TWO_BLOCKS, seed=21),
        },
        "controlnet": {"t2i.safetensors": tiny_checkpoint.t2i_adapter_weights(seed=22)},
        "clip_vision": {"vision.safetensors": tiny_checkpoint.clip_vision_weights(seed=23)},
        "text_encoders": {"clip_l.safetensors": tiny_checkpoint.text_encoder_weights(seed=25)},
    }
    written = [
        write(weights, models / folder / name) for folder, entries in files.items() for name, weights in entries.items()
    ]
    shutil.copy(workflows.ROOT / "demo" / workflows.DRAWN.file, server.input_folder)
    yield
    for path in written:
        path.unlink()


@pytest.fixture(scope="module")
def definitions(server, stand_ins, motion_file):
    return server.get("/object_info")


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def graph(request, definitions, motion_file):
    """The workflow's graph for scripts, with the tests' model files."""
    nodes = json.loads((workflows.API_FOLDER / request.param.name).read_text(encoding="utf-8"))
    ours = OUR_MODELS | {workflows.MOTION: motion_file}
    if request.param.stem == "tune-a-video-t2i-adapter":
        ours[workflows.CHECKPOINT] = TWO_BLOCKS
    return {
        node_id: {
            **node,
            "inputs": {
                name: ours.get(value, value) if isinstance(value, str) else value
                for name, value in node["inputs"].items()
            },
        }
        for node_id, node in nodes.items()
    }


def changed(inputs, values):
    return {name: values.get(name, value) for name, value in inputs.items()}


def accepted(value, kind, options):
    if kind == "COMBO":
        return value in options["options"]
    if kind in ("INT", "FLOAT"):
        whole = kind == "FLOAT" or isinstance(value, int)
        return whole and not isinstance(value, bool) and options.get("min", value) <= value <= options.get("max", value)
    return isinstance(value, {"STRING": str, "BOOLEAN": bool}[kind])


def test_every_value_is_accepted_and_every_required_input_is_given(graph, definitions):
    refused, checked = [], 0
    for node in graph.values():
        definition = definitions[node["class_type"]]
        missing = definition["input"]["required"].keys() - node["inputs"].keys()
        refused += [f"{node['class_type']}.{name} is not given" for name in missing]
        kinds = dict(canvas.widget_inputs(definition))
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                continue
            if name not in kinds and name in canvas.ADDED_INPUTS.get(node["class_type"], {}):
                continue  # for newer hosts
            checked += 1
            if not accepted(value, kinds[name], canvas.widget_options(definition, name)):
                refused.append(f"{node['class_type']}.{name} = {value!r}")
    assert refused == []
    assert checked > 20


def test_it_runs(server, graph, exercised, request):
    small = {node_id: {**node, "inputs": changed(node["inputs"], SMALL)} for node_id, node in graph.items()}
    result = server.run(small).raise_for_error()
    assert not result.errors
    written = []
    # The demo's model brings its clip.
    frames = FRAMES if any(node["class_type"] == "TAV_LoadVideo" for node in small.values()) else DEMO_FRAMES
    for node_id, node in small.items():
        kind, inputs = node["class_type"], node["inputs"]
        if kind == "TAV_SaveVideo":
            path = server.saved_file(result, Node(node_id), "images")
            assert imageio_ffmpeg.count_frames_and_secs(str(path))[0] == frames
            assert path.parent.name + "/" + path.name.rsplit("_", 2)[0] == inputs["filename_prefix"]
            written.append(path.name)
        elif kind == "TAV_SaveMotion":
            path = Path(result.outputs[node_id]["text"][0])
            assert path.is_file() and path.is_relative_to(server.models_folder("tav"))
            written.append(path.name)
        elif kind == "PreviewImage":
            source = small[inputs["images"][0]]["class_type"]
            assert len(result.outputs[node_id]["images"]) == (FRAMES if source in ("Canny", "TAV_ShowMask") else 1)
        elif kind == "TAV_EvaluateVideo":
            assert "| warp error" in result.outputs[node_id]["text"][0]
    assert written
    exercised.append(f"{request.node.callspec.id}: {result.seconds:.1f} s, {', '.join(written)}")


SCRIPT = workflows.ROOT / "tools" / "run_workflow.py"
STEP_BY_STEP = workflows.API_FOLDER / "tune-a-video-step-by-step.json"


def run_script(server, **changes):
    arguments = [f"--set={name}={value}" for name, value in changes.items()]
    command = [sys.executable, SCRIPT, STEP_BY_STEP, "--server", f"127.0.0.1:{server.port}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_script_runs_one_with_progress(server, definitions):
    changes = {name: value for name, value in SMALL.items() if name in ("frame_count", "width", "height", "steps")}
    done = run_script(server, **changes, ckpt_name=CHECKPOINT, filename_prefix="by-script")
    assert done.returncode == 0, done.stderr
    assert f"TAV_OneShotTune: {STEPS}/{STEPS}" in done.stdout and f"TAV_Sample: {STEPS}/{STEPS}" in done.stdout
    (path,) = [line for line in done.stdout.splitlines() if line.startswith("output/")]
    assert imageio_ffmpeg.count_frames_and_secs(str(server.base / path))[0] == FRAMES


def test_a_script_says_what_the_server_refuses(server):
    done = run_script(server, ckpt_name="missing.safetensors")
    assert done.returncode == 1
    assert "CheckpointLoaderSimple: " in done.stderr and "missing.safetensors" in done.stderr


def test_the_host_offers_them_as_templates(server):
    offered = server.get("/workflow_templates")[PACK]
    assert sorted(offered) == sorted(path.stem for path in FILES)


def test_the_help_pages_are_served_where_the_front_end_looks(server, definitions):
    """It asks for docs/<node>/<language>.md first, which is not there, and then for docs/<node>.md."""
    ours = [name for name in definitions if name.startswith("TAV_")]
    assert set(ours) == {page.stem for page in (workflows.ROOT / "web" / "docs").glob("*.md")}
    for name in ours:
        folder = definitions[name]["python_module"].removeprefix("custom_nodes.")
        address = f"http://127.0.0.1:{server.port}/extensions/{folder}/docs/{name}.md"
        with urllib.request.urlopen(address) as answer:  # noqa: S310
            page = answer.read().decode()
        assert page == (workflows.ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
