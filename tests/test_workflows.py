"""The workflow files as they lie there: whole, readable on the canvas, and in step with the nodes."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import canvas
import pack_nodes
import pytest
import run_workflow
import torch
from workflow_files import (
    FILES,
    Json,
    all_nodes,
    box,
    frame,
    gap,
    host_definitions,
    inside,
    overlaps,
    queued,
    read,
    tall_box,
)

import workflows

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def workflow(request: pytest.FixtureRequest) -> Json:
    return read(request.param)


@pytest.fixture(scope="module")
def definitions(comfyui: Path | None) -> canvas.Definitions:
    assert comfyui is not None  # tests marked `comfyui` are left out where there is none
    return host_definitions(comfyui)


def recorded_links(workflow: Json) -> Iterator[tuple[Any, ...]]:
    """(link id, "from" or "to", node, slot, type) for every end of a link that a node records."""
    for node in workflow["nodes"]:
        for slot, output in enumerate(node["outputs"]):
            for link in output["links"] or []:
                yield link, "from", node["id"], slot, output["type"]
        for slot, entry in enumerate(node["inputs"]):
            if entry["link"] is not None:
                yield entry["link"], "to", node["id"], slot, entry["type"]


def test_the_files_are_those_that_the_tool_describes() -> None:
    assert {path.stem for path in FILES} == set(workflows.WORKFLOWS)


def test_ids_are_unique_and_counted(workflow: Json) -> None:
    nodes = [node["id"] for node in workflow["nodes"]]
    links = [link[0] for link in workflow["links"]]
    assert len(set(nodes)) == len(nodes) and max(nodes) == workflow["last_node_id"]
    assert len(set(links)) == len(links) and max(links) == workflow["last_link_id"]
    assert workflow["version"] == 0.4


def test_links_agree_with_both_of_their_ends(workflow: Json) -> None:
    declared = []
    for link, source, source_slot, target, target_slot, kind in workflow["links"]:
        declared += [(link, "from", source, source_slot, kind), (link, "to", target, target_slot, kind)]
    assert sorted(recorded_links(workflow)) == sorted(declared)


def test_the_order_is_one_to_run_the_nodes_in(workflow: Json) -> None:
    order = {node["id"]: node["order"] for node in workflow["nodes"]}
    assert sorted(order.values()) == list(range(len(order)))
    assert all(order[link[1]] < order[link[3]] for link in workflow["links"])


def test_our_nodes_exist(workflow: Json) -> None:
    sources = "".join(path.read_text() for path in (ROOT / "nodes").glob("*.py"))
    ours = {node["type"] for node in all_nodes(workflow) if node["type"].startswith("TAV_")}
    assert ours and ours <= set(re.findall(r'node_id="(\w+)"', sources))


def test_nodes_do_not_overlap(workflow: Json) -> None:
    assert overlaps({str(node["id"]): box(node) for node in workflow["nodes"]}) == []


def test_nodes_do_not_overlap_in_nodes_2_0(workflow: Json) -> None:
    """Nodes 2.0 keeps positions and widths, and draws titles, slots and widgets taller."""
    assert overlaps({str(node["id"]): tall_box(node) for node in workflow["nodes"]}) == []


def test_nodes_that_touch_are_found() -> None:
    upper, lower = (0.0, 0.0, 10.0, 100.0), (5.0, 105.0, 15.0, 200.0)
    assert overlaps({"upper": upper, "lower": lower}) == [("upper", "lower")]
    assert overlaps({"upper": upper, "lower": (5.0, 110.0, 15.0, 200.0)}) == []


def test_groups_frame_their_nodes_and_nothing_else(workflow: Json) -> None:
    frames = [frame(group) for group in workflow["groups"]]
    assert all(gap(a, b) > 0 for a, b in itertools.combinations(frames, 2))
    for node in workflow["nodes"]:
        for drawn in (box(node), tall_box(node)):
            around = [each for each in frames if gap(each, drawn) < 0]
            if node["type"] in canvas.NOTES:
                assert around == []
            else:
                assert len(around) == 1 and inside(drawn, around[0]), node["type"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_note_is_its_markdown_file(path: Path) -> None:
    """Without a ComfyUI too. If not, run tools/workflows.py."""
    notes = [node["widgets_values"][0] for node in read(path)["nodes"] if node["type"] in canvas.NOTES]
    assert (workflows.NOTE_FOLDER / f"{path.stem}.md").read_text() in notes


def test_there_is_a_note_and_every_prompt_has_a_title(workflow: Json) -> None:
    assert any(node["type"] in canvas.NOTES for node in workflow["nodes"])
    assert all(node.get("title") for node in workflow["nodes"] if node["type"] == "CLIPTextEncode")


@pytest.mark.comfyui
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_what_the_tool_makes_of_this_comfyuis_nodes(path: Path, definitions: canvas.Definitions) -> None:
    """If not, run tools/workflows.py."""
    written, (made, graph) = read(path), workflows.build(path.stem, definitions)
    for workflow in (written, made):
        for node in all_nodes(workflow):
            # A newer ComfyUI may have given a node one more output, as it did with PreviewImage.
            node["outputs"] = [output for output in node["outputs"] if output["links"]]
    assert written == made
    assert json.dumps(graph) == json.dumps(read(workflows.API_FOLDER / path.name))


@pytest.mark.comfyui
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_queues_its_graph_for_scripts(path: Path, definitions: canvas.Definitions) -> None:
    assert queued(read(path), definitions) == read(workflows.API_FOLDER / path.name)


@pytest.mark.comfyui
def test_graphs_for_scripts_give_all_that_this_comfyui_requires(definitions: canvas.Definitions) -> None:
    """Inputs that newer hosts have added too, whatever host wrote the files."""
    missing = [
        f"{path.stem}: {node['class_type']}.{name}"
        for path in FILES
        for node in read(workflows.API_FOLDER / path.name).values()
        for name in definitions[node["class_type"]]["input"].get("required", {})
        if name not in node["inputs"]
    ]
    assert missing == []


def test_every_workflow_has_a_graph_for_scripts_and_a_note_and_none_is_left_over() -> None:
    for folder in (workflows.API_FOLDER, workflows.NOTE_FOLDER):
        assert sorted(path.stem for path in folder.iterdir()) == sorted(path.stem for path in FILES)


def test_every_workflow_has_a_picture_for_the_template_browser() -> None:
    """If not, run tools/template_pictures.py."""
    pictures = sorted((ROOT / "workflows").glob("*.jpg"))
    assert sorted(path.stem for path in pictures) == sorted(path.stem for path in FILES)
    assert all(path.read_bytes()[:3] == b"\xff\xd8\xff" for path in pictures)


def test_the_readme_lists_every_workflow() -> None:
    listed = re.findall(r"^\| `(tune-a-video-[\w-]+)` \|", (ROOT / "README.md").read_text(), re.M)
    assert listed == list(workflows.WORKFLOWS)


def test_notes_point_to_templates_that_exist() -> None:
    named = {
        name
        for path in FILES
        for node in read(path)["nodes"]
        if node["type"] in canvas.NOTES
        for name in re.findall(r"\(template \*([\w-]+)\*\)", node["widgets_values"][0])
    }
    assert len(named) >= 4
    assert {f"tune-a-video-{name}" for name in named} <= set(workflows.WORKFLOWS)


def test_the_demo_workflows_clip_is_the_demos(monkeypatch: pytest.MonkeyPatch) -> None:
    """If not, copy what `make demo` leaves as demo-output/source.mp4."""
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    from clips import CLIPS
    from tune_a_video.tav_core.media.clip import load_clip

    drawn = next(clip for clip in CLIPS if clip.name == Path(workflows.DRAWN.file).stem)
    assert drawn.prompt == workflows.DRAWN.prompt
    loaded = load_clip(ROOT / "demo" / workflows.DRAWN.file, frame_count=0, width=64, height=64)
    expected = drawn.images()
    assert loaded.images.shape == expected.shape
    assert (loaded.images - expected).abs().mean() < 0.02


@pytest.mark.comfyui
def test_the_demo_workflow_needs_no_file() -> None:
    """A new user has neither a checkpoint nor a clip in ComfyUI's folders."""
    from tune_a_video.tav_core.media.clip import load_clip

    graph = read(workflows.API_FOLDER / "tune-a-video-demo-model.json")
    values = [value for node in graph.values() for value in node["inputs"].values() if isinstance(value, str)]
    assert [value for value in values if re.search(r"\.\w{3,11}$", value)] == []
    images, fps = pack_nodes.LoadDemoModel.execute().result[3:]
    expected = load_clip(ROOT / "demo" / workflows.DRAWN.file, frame_count=0, width=64, height=64)
    assert torch.equal(images, expected.images) and fps == expected.fps


EXAMPLE = {
    "Load": {"input": {}, "output": ["MODEL"], "output_name": ["m"]},
    "Some": {
        "input": {
            "required": {
                "image": [["a.png", "b.png"], {"image_upload": True}],
                "model": ["MODEL"],
                "seed": ["INT", {"default": 3, "control_after_generate": True}],
                "plain_seed": ["INT", {"default": 4}],
            },
            "optional": {"scale": ["FLOAT", {"default": 0.5}], "mask": ["MASK"]},
        },
        "output": ["IMAGE"],
        "output_name": ["picture"],
    },
}


def example(**inputs: Any) -> Json:
    load = {"class_type": "Load", "inputs": {}}
    return canvas.completed({"2": load, "3": {"class_type": "Some", "inputs": inputs}}, EXAMPLE)


def test_the_controls_of_seeds_and_uploads_are_stored_and_not_sent() -> None:
    graph = example(model=["2", 0], image="b.png")
    assert graph["3"]["inputs"] == {"image": "b.png", "seed": 3, "plain_seed": 4, "scale": 0.5, "model": ["2", 0]}
    workflow = canvas.canvas("some", graph, "A note.", {2: "group"}, EXAMPLE)
    node = workflow["nodes"][2]
    assert node["widgets_values"] == ["b.png", 3, "fixed", 4, "image", 0.5]
    assert [entry["name"] for entry in node["inputs"]] == [
        "model", "mask", "image", "seed", "plain_seed", "upload", "scale"
    ]  # fmt: skip
    assert queued(workflow, EXAMPLE) == graph


def test_an_input_that_a_node_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="Some has no input size"):
        example(image="b.png", size=3)


def test_a_link_of_the_wrong_type_is_refused() -> None:
    graph = example(image="b.png", mask=["2", 0])
    with pytest.raises(ValueError, match="Load gives MODEL, Some takes MASK"):
        canvas.canvas("some", graph, "A note.", {2: "group"}, EXAMPLE)


def script_example() -> Json:
    return {
        "1": {"class_type": "TAV_LoadVideo", "inputs": {"file": "a.mp4", "width": 512}, "_meta": {"title": "clip"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["3", 1], "text": "a"}, "_meta": {"title": "source"}},
        "4": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["3", 1], "text": "b"}, "_meta": {"title": "edit"}},
    }


@pytest.mark.parametrize(
    ("assignment", "changed"),
    [
        ("file=b=c.mp4", {("1", "file"): "b=c.mp4"}),
        ("width=256", {("1", "width"): 256}),
        ("text=", {("2", "text"): "", ("4", "text"): ""}),
        ("edit.text=a panda. big", {("4", "text"): "a panda. big"}),
        ("2.text=x", {("2", "text"): "x"}),
        ("TAV_LoadVideo.file=x", {("1", "file"): "x"}),
    ],
)
def test_a_script_changes_inputs_by_name(assignment: str, changed: dict[tuple[str, str], Any]) -> None:
    graph, expected = script_example(), script_example()
    for (node, name), value in changed.items():
        expected[node]["inputs"][name] = value
    run_workflow.change(graph, assignment)
    assert graph == expected


@pytest.mark.parametrize("assignment", ["no_such=1", "edit.width=1", "clip=1", "width=wide"])
def test_a_change_that_changes_nothing_is_refused(assignment: str) -> None:
    with pytest.raises(ValueError):
        run_workflow.change(script_example(), assignment)
