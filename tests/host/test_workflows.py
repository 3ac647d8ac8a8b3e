"""The workflow files on a running host: every stored value is accepted, and small versions of them run."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import imageio_ffmpeg
import pytest
from graphs import CHECKPOINT, FRAMES, PACK, SIZE, Node

import workflows

pytestmark = [pytest.mark.host, pytest.mark.shared]

FILES = sorted(workflows.FOLDER.glob("*.json"))
# What stands in the files for models that a user has, and the small ones of the tests.
OUR_MODELS = {"ckpt_name": CHECKPOINT, "lora_name": "style.safetensors", "control_net_name": "control.safetensors"}
SMALL = {"frame_count": FRAMES, "width": SIZE, "height": SIZE, "steps": 2}


@pytest.fixture(scope="module")
def definitions(server):
    return server.get("/object_info")


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def graph(request, definitions):
    """The workflow as the front end would queue it, with the tests' model files."""
    nodes = workflows.to_api(json.loads(request.param.read_text(encoding="utf-8")), definitions)
    return {node_id: {**node, "inputs": changed(node["inputs"], OUR_MODELS)} for node_id, node in nodes.items()}


def changed(inputs, values):
    return {name: values.get(name, value) for name, value in inputs.items()}


def accepted(value, kind, options):
    if kind == "COMBO":
        return value in options["options"]
    if kind in ("INT", "FLOAT"):
        whole = kind == "FLOAT" or isinstance(value, int)
        return whole and not isinstance(value, bool) and options["min"] <= value <= options["max"]
    return isinstance(value, {"STRING": str, "BOOLEAN": bool}[kind])


def test_every_value_is_accepted_and_every_required_input_is_given(graph, definitions):
    refused, checked = [], 0
    for node in graph.values():
        definition = definitions[node["class_type"]]
        missing = definition["input"]["required"].keys() - node["inputs"].keys()
        refused += [f"{node['class_type']}.{name} is not given" for name in missing]
        kinds = dict(workflows.widget_inputs(definition))
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                continue
            checked += 1
            if not accepted(value, kinds[name], workflows.widget_options(definition, name)):
                refused.append(f"{node['class_type']}.{name} = {value!r}")
    assert refused == []
    assert checked > 20


def test_it_runs(server, graph, exercised, request):
    small = {node_id: {**node, "inputs": changed(node["inputs"], SMALL)} for node_id, node in graph.items()}
    result = server.run(small).raise_for_error()
    assert not result.errors
    written = []
    for node_id, node in small.items():
        kind, inputs = node["class_type"], node["inputs"]
        if kind == "TAV_SaveVideo":
            path = server.saved_file(result, Node(node_id), "images")
            assert imageio_ffmpeg.count_frames_and_secs(str(path))[0] == FRAMES
            assert path.parent.name + "/" + path.name.rsplit("_", 2)[0] == inputs["filename_prefix"]
            written.append(path.name)
        elif kind == "TAV_SaveMotion":
            path = Path(result.outputs[node_id]["text"][0])
            assert path.is_file() and path.is_relative_to(server.models_folder("tav"))
            written.append(path.name)
        elif kind == "PreviewImage":
            source = small[inputs["images"][0]]["class_type"]
            assert len(result.outputs[node_id]["images"]) == (1 if source == "TAV_OneShotTune" else FRAMES)
    assert len(written) >= 2
    exercised.append(f"{request.node.callspec.id}: {result.seconds:.1f} s, {', '.join(written)}")


def test_the_host_offers_them_as_templates(server):
    offered = server.get("/workflow_templates")[PACK]
    assert sorted(offered) == [path.stem for path in FILES]


def test_the_help_pages_are_served_where_the_front_end_looks(server, definitions):
    """It asks for docs/<node>/<language>.md first, which is not there, and then for docs/<node>.md."""
    ours = [name for name, node in definitions.items() if name.startswith("TAV_")]
    assert len(ours) == 8
    for name in ours:
        folder = definitions[name]["python_module"].removeprefix("custom_nodes.")
        address = f"http://127.0.0.1:{server._port}/extensions/{folder}/docs/{name}.md"
        with urllib.request.urlopen(address) as answer:  # noqa: S310
            page = answer.read().decode()
        assert page == (workflows.ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
