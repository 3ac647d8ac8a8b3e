"""The subgraph files as they lie there: whole, readable, the nodes of their templates, and in step with the schemas."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import canvas
import pytest
from workflow_files import (
    SUBGRAPH_FILES,
    Json,
    all_nodes,
    box,
    frame,
    gap,
    host_definitions,
    inside,
    overlaps,
    read,
    tall_box,
)

import subgraphs
import workflows

ROOT = Path(__file__).resolve().parent.parent
NAMES = [path.stem for path in SUBGRAPH_FILES]
# Widgets that the front end and web/js add; the node has no input of that name.
ADDED_WIDGETS = {"TAV_LoadVideo": {"upload"}, "TAV_OneShotTune": {"stop"}}
PICTURES = {"$$tav-preview"}


@pytest.fixture(params=SUBGRAPH_FILES, ids=NAMES)
def file(request: pytest.FixtureRequest) -> Json:
    return read(request.param)


@pytest.fixture
def held(file: Json) -> Json:
    (subgraph,) = file["definitions"]["subgraphs"]
    return subgraph


@pytest.fixture(scope="module")
def definitions(comfyui: Path | None) -> canvas.Definitions:
    assert comfyui is not None
    return host_definitions(comfyui)


def recorded_links(held: Json) -> Iterator[tuple[Any, ...]]:
    """(link, "from" or "to", node, slot, type) for every end of a link that a node or a subgraph's end records."""
    for node in held["nodes"]:
        for slot, output in enumerate(node["outputs"]):
            yield from ((link, "from", node["id"], slot, output["type"]) for link in output["links"] or [])
        for slot, entry in enumerate(node["inputs"]):
            if entry["link"] is not None:
                yield entry["link"], "to", node["id"], slot, entry["type"]
    for end, side, sockets in (("inputNode", "from", held["inputs"]), ("outputNode", "to", held["outputs"])):
        for slot, socket in enumerate(sockets):
            yield from ((link, side, held[end]["id"], slot, socket["type"]) for link in socket["linkIds"])


def test_the_files_are_those_that_the_tool_describes() -> None:
    assert len(NAMES) == 3
    assert set(NAMES) == set(subgraphs.SUBGRAPHS)


def test_a_file_shows_one_node_under_the_name_of_the_file(file: Json, held: Json, request: Any) -> None:
    """The front end refuses others, and lists them by the files' names."""
    (node,) = file["nodes"]
    assert node["type"] == held["id"] and node["title"] == held["name"]
    assert held["name"] in NAMES and held["name"] in request.node.callspec.id
    assert held["category"] == "Tune-A-Video" and len(held["description"]) > 100
    assert file["extra"]["BlueprintDescription"] == held["description"]
    assert node["id"] not in {inner["id"] for inner in held["nodes"]} and file["last_node_id"] == node["id"]


def test_links_agree_with_both_of_their_ends(held: Json) -> None:
    declared = []
    for link in held["links"]:
        kind = link["type"]
        declared.append((link["id"], "from", link["origin_id"], link["origin_slot"], kind))
        declared.append((link["id"], "to", link["target_id"], link["target_slot"], kind))
    assert sorted(recorded_links(held)) == sorted(declared)
    ids = [link["id"] for link in held["links"]]
    assert len(set(ids)) == len(ids) and max(ids) == held["state"]["lastLinkId"]
    assert held["state"]["lastNodeId"] == max(node["id"] for node in held["nodes"])


def test_every_input_and_output_leads_somewhere_and_the_node_shows_them(file: Json, held: Json) -> None:
    (node,) = file["nodes"]
    for shown, sockets in ((node["inputs"], held["inputs"]), (node["outputs"], held["outputs"])):
        assert [(each["name"], each["type"]) for each in shown] == [(each["name"], each["type"]) for each in sockets]
        assert all(each["linkIds"] for each in sockets)
        assert len({each["id"] for each in sockets}) == len(sockets)
    assert [each["name"] for each in held["inputs"][:3]] == ["model", "clip", "vae"]
    assert len(held["inputs"]) <= 12


def test_what_shows_outside_is_there_inside(file: Json, held: Json) -> None:
    """Every input that is a widget, in the same order, then buttons and pictures."""
    (node,) = file["nodes"]
    by_id = {str(inner["id"]): inner for inner in held["nodes"]}
    targets = {link["id"]: (str(link["target_id"]), link["target_slot"]) for link in held["links"]}
    firsts = []
    for socket in held["inputs"][3:]:
        inner, slot = targets[socket["linkIds"][0]]
        firsts.append([inner, by_id[inner]["inputs"][slot]["widget"]["name"]])
    proxies = node["properties"]["proxyWidgets"]
    assert proxies[: len(firsts)] == firsts
    for inner, name in proxies[len(firsts) :]:
        assert name in PICTURES | ADDED_WIDGETS.get(by_id[inner]["type"], set())


def test_the_button_that_stops_shows_wherever_something_is_tuned(file: Json, held: Json) -> None:
    tunes = [[str(node["id"]), "stop"] for node in held["nodes"] if node["type"] == "TAV_OneShotTune"]
    shown = [entry for entry in file["nodes"][0]["properties"]["proxyWidgets"] if entry[1] == "stop"]
    assert shown == tunes
    assert '"button", "stop"' in (ROOT / "web" / "js" / "stop.js").read_text(encoding="utf-8")


def test_it_runs_by_itself(held: Json) -> None:
    """A graph without a node that saves or shows something is refused."""
    assert {node["type"] for node in held["nodes"]} & {"TAV_SaveVideo", "TAV_SaveMotion"}


def test_nodes_lie_apart_and_in_their_groups(held: Json) -> None:
    frames = [frame(group) for group in held["groups"]]
    assert all(gap(a, b) > 0 for a, b in itertools.combinations(frames, 2))
    for drawn in (box, tall_box):
        boxes = {str(node["id"]): drawn(node) for node in held["nodes"]}
        assert overlaps(boxes) == []
        assert all(sum(inside(each, around) for around in frames) == 1 for each in boxes.values())
    ends = [held[end]["bounding"] for end in ("inputNode", "outputNode")]
    outer = [(left, top, left + width, top + height) for left, top, width, height in ends]
    assert all(gap(end, around) > 0 for end in outer for around in frames)


def plain(node: Json) -> Json:
    """A node without its place, and without which links it has."""
    return {
        **{key: node.get(key) for key in ("type", "title", "size", "properties", "widgets_values", "mode")},
        "inputs": [(each["name"], each["type"]) for each in node["inputs"]],
        "outputs": [(each["name"], each["type"]) for each in node["outputs"]],
    }


def test_unpacked_it_is_its_template(held: Json) -> None:
    """Its nodes and the links between them; what comes from the checkpoint there enters here."""
    described = subgraphs.SUBGRAPHS[held["name"]]
    template = read(workflows.FOLDER / f"{described.template}.json")
    inner = {node["id"]: node for node in held["nodes"]}
    assert list(inner) == list(described.nodes)
    expected = {node["id"]: plain(node) for node in template["nodes"] if node["id"] in inner}
    assert {key: plain(node) for key, node in inner.items()} == expected
    between = {tuple(link[1:]) for link in template["links"] if link[1] in inner and link[3] in inner}
    ends = {held["inputNode"]["id"], held["outputNode"]["id"]}
    keys = ("origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [tuple(link[key] for key in keys) for link in held["links"]]
    assert {link for link in links if not ends & {link[0], link[2]}} == between
    entering = {(*link[3:5], link[5]) for link in template["links"] if link[1] not in inner and link[3] in inner}
    from_checkpoint = {
        (link[2], link[3], link[4]) for link in links if link[0] == held["inputNode"]["id"] and link[1] < 3
    }
    assert from_checkpoint == entering


def test_templates_hold_the_subgraphs_of_the_files() -> None:
    for name, held in workflows.FOLDED.items():
        workflow = read(workflows.FOLDER / f"{name}.json")
        file = read(workflows.SUBGRAPH_FOLDER / f"{held}.json")
        assert workflow["definitions"] == file["definitions"]
        (shown,) = (node for node in workflow["nodes"] if node["type"] == file["nodes"][0]["type"])
        assert shown["properties"] == file["nodes"][0]["properties"]
        assert not {node["id"] for node in workflow["nodes"]} & {node["id"] for node in all_nodes(file)}


@pytest.mark.comfyui
@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_what_the_tool_makes_of_this_comfyuis_nodes(name: str, definitions: canvas.Definitions) -> None:
    """If not, run tools/workflows.py."""
    written, made = read(workflows.SUBGRAPH_FOLDER / f"{name}.json"), workflows.build_subgraph(name, definitions)
    for workflow in (written, made):
        for node in all_nodes(workflow):
            node["outputs"] = [output for output in node["outputs"] if output["links"]]
    assert written == made


@pytest.mark.comfyui
def test_every_widget_that_shows_outside_explains_itself(
    file: Json, held: Json, definitions: canvas.Definitions
) -> None:
    """The front end shows the tooltip of the widget inside."""
    by_id = {str(node["id"]): node["type"] for node in held["nodes"]}
    asked = [entry for entry in file["nodes"][0]["properties"]["proxyWidgets"] if not PICTURES & {entry[1]}]
    named = [(by_id[inner], name) for inner, name in asked if name not in ADDED_WIDGETS.get(by_id[inner], ())]
    assert len(named) >= 6
    assert [each for each in named if not canvas.widget_options(definitions[each[0]], each[1]).get("tooltip")] == []


def test_the_packed_archive_holds_them() -> None:
    """Neither git nor the registry's packer leaves out the folder, its files or all of a kind."""
    left_out = {
        line.strip("/") for name in (".comfyignore", ".gitignore") for line in (ROOT / name).read_text().split()
    }
    assert not left_out & {"subgraphs", "workflows", "*", "*.json", *(path.name for path in SUBGRAPH_FILES)}


EXAMPLE = {
    "CheckpointLoaderSimple": {"input": {}, "output": ["MODEL"], "output_name": ["MODEL"]},
    "Text": {
        "input": {"required": {"text": ["STRING", {"default": "", "tooltip": "t"}]}},
        "output": [],
        "output_name": [],
    },
    "Size": {
        "input": {"required": {"model": ["MODEL"], "size": ["INT", {"default": 3}]}},
        "output": ["IMAGE"],
        "output_name": ["IMAGE"],
    },
}


def example(monkeypatch: pytest.MonkeyPatch, **widgets: tuple[str, ...]) -> Json:
    described = subgraphs.Subgraph("some", range(3, 6), "", (), widgets, {"images": (4, 0)}, (), 0)
    monkeypatch.setitem(subgraphs.SUBGRAPHS, "Some", described)
    graph = canvas.completed(
        {
            "2": {"class_type": "CheckpointLoaderSimple", "inputs": {}},
            "3": {"class_type": "Text", "inputs": {"text": "a"}},
            "4": {"class_type": "Size", "inputs": {"model": ["2", 0]}},
            "5": {"class_type": "Size", "inputs": {"model": ["2", 0], "size": 4}},
        },
        EXAMPLE,
    )
    return subgraphs.blueprint("Some", graph, {2: "one", 5: "two"}, EXAMPLE)


def test_an_input_sets_all_widgets_that_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    file = example(monkeypatch, text=("3.text",), size=("4.size",))
    (held,) = file["definitions"]["subgraphs"]
    assert [(each["name"], len(each["linkIds"])) for each in held["inputs"]] == [("model", 2), ("text", 1), ("size", 1)]
    assert [group["title"] for group in held["groups"]] == ["one", "two"]
    assert file["nodes"][0]["widgets_values"] == ["a", 3]


def test_one_input_cannot_stand_for_different_values_or_types(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="gives size as"):
        example(monkeypatch, size=("4.size", "5.size"))
    with pytest.raises(ValueError, match="gives both as"):
        example(monkeypatch, both=("3.text", "4.size"))
