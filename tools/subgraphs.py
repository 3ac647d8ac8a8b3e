"""The pack's subgraphs: part of a template as one node, for subgraphs/NAME.json and for templates that use it.

Newer hosts list the files of a pack's folder `subgraphs` beside the nodes, by their names. A subgraph holds nodes of a
template, so that unpacking it gives that template's graph.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from canvas import CORE_VERSION, Columns, Definitions, Json, columns, widget_inputs, widget_options

# Ids that the front end gives to the two ends of a subgraph.
INPUT_NODE, OUTPUT_NODE = -10, -20
CATEGORY = "Tune-A-Video"
END_WIDTH, END_GAP, SLOT = 120, 100, 20


class Subgraph(NamedTuple):
    """Which nodes of a template it holds, and what of them shows outside.

    nodes: ids in the template. What they take from other nodes becomes an input, named after the other's output.
    widgets: name of an input -> the widgets "NODE.INPUT" that it sets.
    outputs: name of an output -> (node, its output).
    shown: (node, widget) of buttons and pictures that also show outside.
    media: pixels to reserve for buttons and text boxes; the node grows when it shows pictures.
    """

    template: str
    nodes: Sequence[int]
    description: str
    search: tuple[str, ...]
    widgets: Mapping[str, tuple[str, ...]]
    outputs: Mapping[str, tuple[int, int]]
    shown: tuple[tuple[int, str], ...]
    media: int


_CLIP = {name: (f"3.{name}",) for name in ("file", "frame_count", "width", "height")}
# web/js/subgraph.js gives it to the nodes that show pictures.
_PICTURE = "$$tav-preview"
SUBGRAPHS = {
    "Edit a Video (Tune-A-Video)": Subgraph(
        "tune-a-video-edit-control",
        range(3, 15),
        "Tunes a Stable Diffusion checkpoint on one clip and edits the clip with a sentence. Connect model, clip and "
        "vae of Load Checkpoint, choose a video, say what it shows and what it should show. The video is saved and "
        "played; outputs: its frames, the saved video, clip and edit side by side, and where the clip changed.",
        ("tav", "tune a video", "edit video", "video to video", "video edit by prompt"),
        {
            **_CLIP,
            "clip_sentence": ("8.source", "5.text"),
            "new_sentence": ("8.edit",),
            "preset": ("9.preset",),
            "strength": ("9.strength",),
            "tuning_steps": ("6.steps",),
        },
        {"images": (12, 0), "video": (13, 0), "comparison": (14, 0), "mask": (10, 1)},
        ((3, "upload"), (6, "stop"), (14, _PICTURE), (6, _PICTURE), (10, _PICTURE)),
        240,
    ),
    "Learn a Motion (Tune-A-Video)": Subgraph(
        "tune-a-video-step-by-step",
        # Without the picture of the loss: the page would show an empty one on the subgraph's node before the first run.
        (3, 4, 5, 6, 8),
        "Tunes a Stable Diffusion checkpoint on one clip and saves what it learnt as a motion file in models/tav, for "
        "Apply a Motion. Connect model, clip and vae of Load Checkpoint, choose a video and say what it shows.",
        ("tav", "tune a video", "train on video", "one-shot video tuning"),
        {
            **_CLIP,
            "clip_sentence": ("5.text",),
            "tuning_steps": ("6.steps",),
            "filename_prefix": ("8.filename_prefix",),
        },
        {"motion": (6, 1), "path": (8, 0), "loss_curve": (6, 2)},
        ((3, "upload"), (6, "stop"), (6, _PICTURE)),
        120,
    ),
    "Apply a Motion (Tune-A-Video)": Subgraph(
        "tune-a-video-saved-motion",
        range(3, 13),
        "Edits a clip with a motion that was learnt from it, without tuning. Connect model, clip and vae of a "
        "checkpoint of the motion's family, choose the motion and its clip, and say what the video should show. The "
        "video is saved and played; outputs: its frames and the saved video.",
        ("tav", "tune a video", "saved motion", "video to video"),
        {**_CLIP, "motion": ("5.file",), "new_sentence": ("9.text",), "guidance": ("10.guidance",)},
        {"images": (11, 0), "video": (12, 0)},
        ((3, "upload"), (12, _PICTURE), (10, _PICTURE)),
        160,
    ),
}


def number(subgraph: Subgraph) -> int:
    """Return the id of the subgraph's node in a graph of its own: none of its nodes has it."""
    return subgraph.nodes[-1] + 1


def blueprint(name: str, graph: Json, groups: Mapping[int, str], definitions: Definitions) -> Json:
    """Return the file of a subgraph: a workflow of its node alone.

    graph, groups: of its template, the graph completed. Raises ValueError where the template has another shape.
    """
    subgraph, node_id = SUBGRAPHS[name], number(SUBGRAPHS[name])
    entry = {**instance(name, graph), "inputs": _values(subgraph, graph)}
    laid = columns({str(node_id): entry}, {node_id: ""}, definitions | definition(name, graph, definitions))
    (node,) = laid.nodes
    return {
        "revision": 0,
        "last_node_id": node_id,
        "last_link_id": 0,
        "nodes": [_dressed(node, subgraph)],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [inside(name, graph, groups, definitions)]},
        "extra": {"BlueprintDescription": subgraph.description, "BlueprintSearchAliases": list(subgraph.search)},
    }


def folded(graph: Json, name: str) -> Json:
    """Return a template's graph with the subgraph's nodes as one."""
    subgraph = SUBGRAPHS[name]
    outer = {key: node for key, node in graph.items() if int(key) not in subgraph.nodes}
    return {**outer, str(number(subgraph)): instance(name, graph)}


def with_subgraph(workflow: Json, name: str, graph: Json, groups: Mapping[int, str], definitions: Definitions) -> Json:
    """Return the canvas workflow of a folded graph with the subgraph that its node names."""
    kind, subgraph = identity(name), SUBGRAPHS[name]
    nodes = [_dressed(node, subgraph) if node["type"] == kind else node for node in workflow["nodes"]]
    return {
        **{**workflow, "nodes": nodes},
        "definitions": {"subgraphs": [inside(name, graph, groups, definitions)]},
    }


def flattened(graph: Json, name: str) -> Json:
    """Return the graph that the front end queues for the folded one: the subgraph's nodes have ids "NODE:ID"."""
    subgraph = SUBGRAPHS[name]

    def renamed(key: str) -> str:
        return f"{number(subgraph)}:{key}" if int(key) in subgraph.nodes else key

    return {
        renamed(key): {
            **node,
            "inputs": {
                each: [renamed(value[0]), value[1]] if isinstance(value, list) else value
                for each, value in node["inputs"].items()
            },
        }
        for key, node in graph.items()
    }


def identity(name: str) -> str:
    """Return the id of a subgraph, which is the type of its node."""
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, f"tune-a-video subgraph {name}"))


def instance(name: str, graph: Json) -> Json:
    """Return a subgraph's node in API format, linked as its nodes are in the template."""
    subgraph = SUBGRAPHS[name]
    links = {socket: list(link) for link, socket in _sockets(subgraph, graph).items()}
    return {
        "class_type": identity(name),
        "inputs": {**links, **_values(subgraph, graph)},
        "_meta": {"title": name},
    }


def definition(name: str, graph: Json, definitions: Definitions) -> Definitions:
    """Return the definition of a subgraph's node, as a host gives those of nodes."""
    subgraph = SUBGRAPHS[name]
    inputs: Json = {}
    for (source, output), socket in _sockets(subgraph, graph).items():
        inputs[socket] = [definitions[graph[source]["class_type"]]["output"][output]]
    for each, targets in subgraph.widgets.items():
        kind, options = _widget(targets[0], graph, definitions)
        plain = {key: value for key, value in options.items() if not key.endswith("_upload")}
        inputs[each] = [kind, {**plain, "control_after_generate": False}]
    kinds = [
        definitions[graph[str(node)]["class_type"]]["output"][output] for node, output in subgraph.outputs.values()
    ]
    return {
        identity(name): {
            **{"input": {"required": inputs}, "output": kinds, "output_name": list(subgraph.outputs)},
            "media": subgraph.media,
        }
    }


def inside(name: str, graph: Json, groups: Mapping[int, str], definitions: Definitions) -> Json:
    """Return what a subgraph holds, as workflows and the files of subgraphs define it."""
    subgraph = SUBGRAPHS[name]
    held = {key: _without_outer(node, subgraph) for key, node in graph.items() if int(key) in subgraph.nodes}
    laid = columns(held, _groups_inside(subgraph, groups), definitions)
    nodes = {node["id"]: node for node in laid.nodes}
    links = [_link(*link) for link in laid.links]

    def connect(source: tuple[int, int], target: tuple[int, int], kind: str) -> int:
        links.append(_link(len(links) + 1, *source, *target, kind))
        return len(links)

    inputs = []
    for socket, targets in _inputs(subgraph, graph).items():
        ends = [(nodes[node], _slot(nodes[node], each)) for node, each in targets]
        kinds = {node["inputs"][slot]["type"] for node, slot in ends}
        if len(kinds) != 1:
            raise ValueError(f"{name}: the input {socket} sets inputs of different types")
        (kind,) = kinds
        made = []
        for node, slot in ends:
            node["inputs"][slot]["link"] = connect((INPUT_NODE, len(inputs)), (node["id"], slot), kind)
            made.append(node["inputs"][slot]["link"])
        inputs.append({**_end(name, "input", socket), "type": kind, "linkIds": made})
    outputs = []
    for socket, (node_id, slot) in subgraph.outputs.items():
        output = nodes[node_id]["outputs"][slot]
        made = [connect((node_id, slot), (OUTPUT_NODE, len(outputs)), output["type"])]
        output["links"] = [*(output["links"] or []), *made]
        outputs.append({**_end(name, "output", socket), "type": output["type"], "linkIds": made})
    return {
        "id": identity(name),
        "version": 1,
        "state": {
            "lastGroupId": len(laid.groups),
            "lastNodeId": max(nodes),
            "lastLinkId": len(links),
            "lastRerouteId": 0,
        },
        **{"revision": 0, "config": {}, "name": name},
        **{"category": CATEGORY, "description": subgraph.description},
        **_ends(laid, inputs, outputs),
        **{"inputs": inputs, "outputs": outputs, "widgets": []},
        **{"nodes": laid.nodes, "groups": laid.groups, "links": links, "extra": {}},
    }


def _sockets(subgraph: Subgraph, graph: Json) -> dict[tuple[str, int], str]:
    """Name what the nodes take from others, by (node, output), in the order of the outputs."""
    links = {
        (value[0], value[1])
        for key, node in graph.items()
        for value in node["inputs"].values()
        if int(key) in subgraph.nodes and isinstance(value, list) and int(value[0]) not in subgraph.nodes
    }
    if {graph[source]["class_type"] for source, _ in links} != {"CheckpointLoaderSimple"}:
        raise ValueError("a subgraph takes nothing but the parts of one checkpoint")
    return {link: ("model", "clip", "vae")[link[1]] for link in sorted(links)}


def _inputs(subgraph: Subgraph, graph: Json) -> dict[str, list[tuple[int, str]]]:
    """List the (node, input) that each input of the subgraph sets, sockets first."""
    sockets = {
        socket: [
            (int(key), each)
            for key, node in graph.items()
            for each, value in node["inputs"].items()
            if int(key) in subgraph.nodes and value == list(link)
        ]
        for link, socket in _sockets(subgraph, graph).items()
    }
    return {**sockets, **{each: [_target(target) for target in targets] for each, targets in subgraph.widgets.items()}}


def _target(target: str) -> tuple[int, str]:
    node, _, each = target.partition(".")
    return int(node), each


def _widget(target: str, graph: Json, definitions: Definitions) -> tuple[str, Json]:
    """Return the type and the options of a widget "NODE.INPUT"."""
    node, each = _target(target)
    found = definitions[graph[str(node)]["class_type"]]
    return dict(widget_inputs(found))[each], widget_options(found, each)


def _values(subgraph: Subgraph, graph: Json) -> Json:
    """Return the template's value of each widget. Raises ValueError where one input sets widgets that differ."""
    values = {}
    for each, targets in subgraph.widgets.items():
        given = [graph[str(node)]["inputs"][name] for node, name in map(_target, targets)]
        if any(value != given[0] for value in given):
            raise ValueError(f"the template {subgraph.template} gives {each} as {given}")
        values[each] = given[0]
    return values


def _without_outer(node: Json, subgraph: Subgraph) -> Json:
    inputs = {
        each: value
        for each, value in node["inputs"].items()
        if not isinstance(value, list) or int(value[0]) in subgraph.nodes
    }
    return {**node, "inputs": inputs}


def _groups_inside(subgraph: Subgraph, groups: Mapping[int, str]) -> dict[int, str]:
    """Return the template's groups that frame nodes of the subgraph, by the first of these."""
    starts = sorted(groups)
    ends = [*starts[1:], subgraph.nodes[-1] + 1]
    framed = {
        first: [node for node in subgraph.nodes if first <= node < end] for first, end in zip(starts, ends, strict=True)
    }
    return {held[0]: groups[first] for first, held in framed.items() if held}


def _slot(node: Json, each: str) -> int:
    return next(slot for slot, entry in enumerate(node["inputs"]) if entry["name"] == each)


def _link(link: int, source: int, source_slot: int, target: int, target_slot: int, kind: str) -> Json:
    return {
        **{"id": link, "origin_id": source, "origin_slot": source_slot},
        **{"target_id": target, "target_slot": target_slot, "type": kind},
    }


def _end(name: str, side: str, socket: str) -> Json:
    return {"id": str(uuid.uuid5(uuid.UUID(identity(name)), f"{side} {socket}")), "name": socket}


def _ends(laid: Columns, inputs: list[Json], outputs: list[Json]) -> Json:
    """Place the two ends of a subgraph left and right of its groups."""
    left = min(group["bounding"][0] for group in laid.groups) - END_GAP - END_WIDTH
    right = max(group["bounding"][0] + group["bounding"][2] for group in laid.groups) + END_GAP
    return {
        "inputNode": {"id": INPUT_NODE, "bounding": [left, 0, END_WIDTH, SLOT * (len(inputs) + 2)]},
        "outputNode": {"id": OUTPUT_NODE, "bounding": [right, 0, END_WIDTH, SLOT * (len(outputs) + 2)]},
    }


def _dressed(node: Json, subgraph: Subgraph) -> Json:
    """Return a subgraph's node with the properties that the front end keeps for it."""
    first = [_target(targets[0]) for targets in subgraph.widgets.values()]
    proxies = [[str(source), each] for source, each in (*first, *subgraph.shown)]
    return {**node, "properties": {"proxyWidgets": proxies, "ver": CORE_VERSION}}
