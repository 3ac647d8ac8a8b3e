"""Lay out graphs on ComfyUI's canvas: the workflow that the front end would save for a graph in API format.

Nodes are described by their definitions, a host's answer to /object_info.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

Json = dict[str, Any]
Definitions = Mapping[str, Json]

# The oldest supported ComfyUI. The files name it whatever host wrote them.
CORE_VERSION = "0.3.64"
# Inputs of core nodes that newer hosts require and older ones ignore. Graphs for scripts give them; the front end
# fills in the same defaults by itself.
ADDED_INPUTS: dict[str, Json] = {
    "ContextWindowsManual": {
        "freenoise": False,
        "cond_retain_index_list": "",
        "split_conds_to_windows": False,
        "latent_retain_index_list": "",
        "causal_window_fix": True,
    }
}
# Nodes that only the front end knows.
NOTES = ("MarkdownNote", "Note")
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")

# A group takes the colour of the first of these nodes that it holds, else the last colour.
COLOURS = {
    "TAV_OneShotTune": "#8A8",
    "TAV_LoadMotion": "#8A8",
    "TAV_DDIMInvert": "#a1309b",
    "TAV_Sample": "#b58b2a",
    "TAV_LoadVideo": "#3f789e",
    "": "#8AA",
}

# The layout, in pixels. A group is a column of nodes, in the order of their ids. Nodes 2.0 draws nodes taller than the
# classic canvas: `size` is the classic one, and TALL_* reserve the room.
TITLE, SLOT, WIDGET = 30, 20, 24
TALL_SLOT, TALL_WIDGET, TALL_REST, TALL_MEDIA = 28, 40, 40, 1.25
WIDTH, NOTE_WIDTH, GAP = 320, 420, 60
GROUP_PADDING, GROUP_TITLE = 10, 44
NOTE_LINE, NOTE_CHARACTERS = 21, 50
# Room below the widgets: players, pictures, text boxes.
MEDIA = {
    "CLIPTextEncode": 80,
    "PreviewImage": 240,
    "TAV_CompareVideos": 230,
    "TAV_DDIMInvert": 300,
    "TAV_EditPrompt": 160,
    "TAV_EvaluateVideo": 240,
    "TAV_LoadVideo": 340,
    "TAV_OneShotTune": 300,
    "TAV_Sample": 300,
    "TAV_SaveVideo": 340,
}
# Widgets that the pack's scripts (web/js) add below a node's own. They are neither stored nor sent.
BUTTONS = {"TAV_OneShotTune": 1}


def widget_inputs(definition: Json) -> list[tuple[str, str]]:
    """List (name, type) of a node's widgets, in the order in which a workflow stores their values.

    Two widgets are the front end's own: the control that follows a seed and the button of an upload. A workflow stores
    both, a queued graph has neither.
    """
    widgets = []
    for section in ("required", "optional"):
        inputs = list(_inputs(definition, section))
        for name, kind, options in inputs:
            if kind not in WIDGET_TYPES:
                continue
            widgets.append((name, kind))
            if kind == "INT" and options.get("control_after_generate", name in ("seed", "noise_seed")):
                widgets.append((f"{name}:control", "CONTROL"))
        uploads = ("image_upload", "video_upload", "animated_image_upload")
        if section == "required" and any(options.get(key) for _, _, options in inputs for key in uploads):
            widgets.append(("upload", "IMAGEUPLOAD"))
    return widgets


def socket_inputs(definition: Json) -> list[tuple[str, str, bool]]:
    """List (name, type, optional) of a node's inputs that are no widgets, in the order of their dots."""
    return [
        (name, kind, section == "optional")
        for section in ("required", "optional")
        for name, kind, _ in _inputs(definition, section)
        if kind not in WIDGET_TYPES
    ]


def widget_options(definition: Json, name: str) -> Json:
    """Return a definition's options of one widget: default, min, max, options, ..."""
    sections = ("required", "optional")
    return next(options for section in sections for each, _, options in _inputs(definition, section) if each == name)


def _inputs(definition: Json, section: str) -> Iterator[tuple[str, str, Json]]:
    for name, (kind, *rest) in definition["input"].get(section, {}).items():
        options = rest[0] if rest else {}
        if isinstance(kind, (list, tuple)):  # a list of choices in the place of the type
            yield name, "COMBO", {**options, "options": list(kind)}
        else:
            yield name, kind, options


def without_added(kind: str, definition: Json) -> Json:
    """Return the definition as the oldest supported host gives it."""
    added = ADDED_INPUTS.get(kind, {})
    inputs = {
        section: {name: spec for name, spec in definition["input"].get(section, {}).items() if name not in added}
        for section in ("required", "optional")
    }
    return {**definition, "input": inputs}


def completed(graph: Json, definitions: Definitions) -> Json:
    """Return an API graph with every widget's value given, a node's inputs in the order of its definition.

    Raises ValueError for an input that the node does not have.
    """
    done = {}
    for node_id, node in graph.items():
        kind, given = node["class_type"], node["inputs"]
        definition = without_added(kind, definitions[kind])
        widgets = [name for name, type_ in widget_inputs(definition) if type_ in WIDGET_TYPES]
        order = [*widgets, *(name for name, _, _ in socket_inputs(definition))]
        added = ADDED_INPUTS.get(kind, {})
        unknown = given.keys() - {*order, *added}
        if unknown:
            raise ValueError(f"{kind} has no input {', '.join(sorted(unknown))}")
        values = {
            name: given[name] if name in given else widget_options(definition, name)["default"]
            for name in order
            if name in given or name in widgets
        }
        meta = node.get("_meta", {"title": kind})
        done[node_id] = {"class_type": kind, "inputs": {**added, **values}, "_meta": meta}
    return done


class Columns(NamedTuple):
    """Nodes, the groups that frame them, and links as [id, source, its slot, target, its slot, type]."""

    nodes: list[Json]
    groups: list[Json]
    links: list[list[Any]]


def canvas(name: str, graph: Json, note: str, groups: Mapping[int, str], definitions: Definitions) -> Json:
    """Return the workflow that the front end would save for a completed API graph.

    groups: id of a group's first node -> its title; the ids of a group follow each other. The note has id 1 and a
    column of its own, on the left. Raises ValueError for a link between outputs and inputs of different types.
    """
    lines = sum(max(1, math.ceil(len(line) / NOTE_CHARACTERS)) for line in note.splitlines())
    written: Json = {
        **_node(1, "MarkdownNote", [0, TITLE], [NOTE_WIDTH, NOTE_LINE * lines + 40]),
        **{"inputs": [], "outputs": [], "properties": {}, "widgets_values": [note]},
        **{"color": "#432", "bgcolor": "#653"},
    }
    laid = columns(graph, groups, definitions, NOTE_WIDTH + GAP)
    nodes = [written, *laid.nodes]
    # A graph names a node after those that it is linked from, so this is an order to run the nodes in.
    for order, node in enumerate(nodes):
        node["order"] = order
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_DNS, name)),
        "revision": 0,
        "last_node_id": max(node["id"] for node in nodes),
        "last_link_id": len(laid.links),
        "nodes": nodes,
        "links": laid.links,
        "groups": laid.groups,
        "config": {},
        "extra": {"ds": {"scale": 0.6, "offset": [80, 120]}},
        "version": 0.4,
    }


def columns(graph: Json, groups: Mapping[int, str], definitions: Definitions, left: int = 0) -> Columns:
    """Lay out a completed API graph in one column for each group, the first one at ``left``.

    groups: as for `canvas`. Raises ValueError for a link between outputs and inputs of different types.
    """
    laid = Columns([], [], [])
    by_id: dict[int, Json] = {}
    left, top = left - WIDTH - GAP, 0.0
    for key, entry in graph.items():
        node_id, kind = int(key), entry["class_type"]
        definition = without_added(kind, definitions[kind])
        if node_id in groups:
            left, top = left + WIDTH + GAP, 0.0
            frame = {"id": len(laid.groups) + 1, "title": groups[node_id], "bounding": [], "color": "", "flags": {}}
            laid.groups.append(frame)
        height, tall = _heights(kind, definition)
        title = entry["_meta"]["title"]
        node = {
            **_node(node_id, kind, [left, math.ceil(top) + TITLE], [WIDTH, height]),
            **({} if title == kind else {"title": title}),
            **_slots(definition),
            "properties": {
                **({} if kind.startswith("TAV_") else {"cnr_id": "comfy-core", "ver": CORE_VERSION}),
                "Node name for S&R": kind,
            },
            "widgets_values": [
                _stored(definition, each, type_, entry["inputs"]) for each, type_ in widget_inputs(definition)
            ],
        }
        for slot, target in enumerate(node["inputs"]):
            value = entry["inputs"].get(target["name"])
            if isinstance(value, list):
                source = by_id[int(value[0])]
                output = source["outputs"][value[1]]
                if output["type"] != target["type"]:
                    raise ValueError(f"{source['type']} gives {output['type']}, {kind} takes {target['type']}")
                target["link"] = len(laid.links) + 1
                output["links"] = [*(output["links"] or []), target["link"]]
                laid.links.append([target["link"], source["id"], value[1], node_id, slot, target["type"]])
        laid.nodes.append(node)
        by_id[node_id] = node
        top += TITLE + tall
        bottom = math.ceil(top) + GROUP_PADDING
        frame = laid.groups[-1]
        frame["bounding"] = [left - GROUP_PADDING, -GROUP_TITLE, WIDTH + 2 * GROUP_PADDING, bottom + GROUP_TITLE]
        held = [each["type"] for each in laid.nodes if each["pos"][0] == left]
        frame["color"] = next(colour for each, colour in COLOURS.items() if each in (*held, ""))
    for order, node in enumerate(laid.nodes):
        node["order"] = order
    return laid


def _node(node_id: int, kind: str, position: list[int], size: list[int]) -> Json:
    return {
        **{"id": node_id, "type": kind, "pos": position, "size": size},
        **{"flags": {}, "order": 0, "mode": 0},
    }


def _slots(definition: Json) -> Json:
    sockets = [
        {"localized_name": name, "name": name, **({"shape": 7} if optional else {}), "type": kind, "link": None}
        for name, kind, optional in socket_inputs(definition)
    ]
    widgets = [
        {"localized_name": name, "name": name, "type": kind, "widget": {"name": name}, "link": None}
        for name, kind in widget_inputs(definition)
        if kind != "CONTROL"
    ]
    outputs = [
        {"localized_name": name, "name": name, "type": kind, "links": None}
        for name, kind in zip(definition["output_name"], definition["output"], strict=True)
    ]
    return {"inputs": sockets + widgets, "outputs": outputs}


def _heights(kind: str, definition: Json) -> tuple[int, float]:
    """Pixels below a node's title on the classic canvas, and the room to reserve for it."""
    slots = max(len(socket_inputs(definition)), len(definition["output"]))
    widgets = len(widget_inputs(definition)) + BUTTONS.get(kind, 0)
    media = definition.get("media", MEDIA.get(kind, 0))
    classic = slots * SLOT + (widgets * WIDGET + 14 if widgets else 6) + media
    return classic, slots * TALL_SLOT + widgets * TALL_WIDGET + TALL_REST + TALL_MEDIA * media


def _stored(definition: Json, name: str, kind: str, inputs: Json) -> Any:
    """The value that a workflow stores for a widget; the default where a link gives it."""
    if kind in ("IMAGEUPLOAD", "CONTROL"):
        return {"IMAGEUPLOAD": "image", "CONTROL": "fixed"}[kind]
    value = inputs[name]
    return widget_options(definition, name)["default"] if isinstance(value, list) else value
