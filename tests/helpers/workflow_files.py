"""The files of workflows and subgraphs, as the tests of both read them."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import canvas

ROOT = Path(__file__).resolve().parents[2]
Json = dict[str, Any]
# Every .json at the top level is offered as a template.
FILES = sorted((ROOT / "workflows").glob("*.json"))
# Newer hosts list every .json of this folder as a subgraph.
SUBGRAPH_FILES = sorted((ROOT / "subgraphs").glob("*.json"))

DEFINITIONS = """
import asyncio, json, pathlib, sys, tempfile
sys.path.insert(0, sys.argv[1])
import engine
with tempfile.TemporaryDirectory() as base:
    engine.load_engine(pathlib.Path(sys.argv[2]), pathlib.Path(base))
    import nodes
    asyncio.run(nodes.init_builtin_extra_nodes())
    extension = asyncio.run(engine.load_pack().comfy_entrypoint())
    ours = {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}
    found = {}
    for name, node in {**nodes.NODE_CLASS_MAPPINGS, **ours}.items():
        if name in sys.argv[3:]:
            kinds = list(node.RETURN_TYPES)
            names = list(getattr(node, "RETURN_NAMES", None) or kinds)
            found[name] = {"input": node.INPUT_TYPES(), "output": kinds, "output_name": names}
print(json.dumps(found))
"""


def read(path: Path) -> Json:
    return json.loads(path.read_text(encoding="utf-8"))


def subgraphs_of(workflow: Json) -> list[Json]:
    """The subgraphs that a workflow defines."""
    return workflow.get("definitions", {}).get("subgraphs", [])


def all_nodes(workflow: Json) -> Iterator[Json]:
    """A workflow's nodes and those in its subgraphs, without those that show a subgraph."""
    held = subgraphs_of(workflow)
    known = {each["id"] for each in held}
    for graph in (workflow, *held):
        yield from (node for node in graph["nodes"] if node["type"] not in known)


@cache
def host_definitions(comfyui: Path) -> canvas.Definitions:
    """ComfyUI's description of the nodes that the files use, as in its /object_info."""
    files = [*FILES, *SUBGRAPH_FILES]
    used = {node["type"] for path in files for node in all_nodes(read(path))} - set(canvas.NOTES)
    command = [sys.executable, "-I", "-c", DEFINITIONS, ROOT / "tools", comfyui, *sorted(used)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def gap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Pixels between two boxes (left, top, right, bottom) along the axis that parts them; negative if they overlap."""
    return max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3])


def overlaps(boxes: dict[str, tuple[float, ...]]) -> list[tuple[str, str]]:
    """Pairs with less than 10 pixels between them."""
    return [(a, b) for a, b in itertools.combinations(boxes, 2) if gap(boxes[a], boxes[b]) < 10]


def box(node: Json) -> tuple[float, ...]:
    """(left, top, right, bottom) of a node on the classic canvas, its title included."""
    (left, top), (width, height) = node["pos"], node["size"]
    return left, top - 30, left + width, top + height


def tall_box(node: Json) -> tuple[float, ...]:
    """The box in Nodes 2.0: 24 pixels a slot and 36 a widget, where the classic canvas has 20 and 24."""
    left, top, right, bottom = box(node)
    sockets = sum("widget" not in entry for entry in node["inputs"])
    widgets = 0 if node["type"] in canvas.NOTES else len(node["widgets_values"])
    taller = 4 * max(sockets, len(node["outputs"])) + 12 * widgets
    return left, top, right, bottom + taller + 20


def queued(workflow: Json, definitions: canvas.Definitions) -> Json:
    """The API graph that the front end makes of a workflow: links and stored values, by input.

    Nodes within the subgraph that node 14 shows have ids "14:ID".
    """
    held = {each["id"]: each for each in subgraphs_of(workflow)}
    graph = {}

    def add(nodes: list[Json], links: dict[int, Any], prefix: str) -> None:
        for node in nodes:
            if node["type"] in held:
                inner, entered = held[node["type"]], {entry["name"]: entry["link"] for entry in node["inputs"]}
                add(inner["nodes"], _links_inside(inner, f"{node['id']}:", entered, links), f"{prefix}{node['id']}:")
            elif node["type"] not in canvas.NOTES:
                graph[f"{prefix}{node['id']}"] = _entry(node, links, definitions)

    add(workflow["nodes"], {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}, "")
    return graph


def _links_inside(subgraph: Json, prefix: str, entered: dict[str, int | None], outer: dict[int, Any]) -> dict[int, Any]:
    """Where each link comes from; those of inputs that are not linked outside are left out."""
    found = {}
    for link in subgraph["links"]:
        if link["origin_id"] != subgraph["inputNode"]["id"]:
            found[link["id"]] = [f"{prefix}{link['origin_id']}", link["origin_slot"]]
            continue
        outside = entered[subgraph["inputs"][link["origin_slot"]]["name"]]
        if outside is not None:
            found[link["id"]] = outer[outside]
    return found


def _entry(node: Json, links: dict[int, Any], definitions: canvas.Definitions) -> Json:
    widgets = canvas.widget_inputs(canvas.without_added(node["type"], definitions[node["type"]]))
    stored = zip(widgets, node["widgets_values"], strict=True)
    inputs = {name: value for (name, kind), value in stored if kind in canvas.WIDGET_TYPES}
    inputs |= {entry["name"]: links[entry["link"]] for entry in node["inputs"] if entry["link"] in links}
    return {
        "class_type": node["type"],
        "inputs": {**canvas.ADDED_INPUTS.get(node["type"], {}), **inputs},
        "_meta": {"title": node.get("title", node["type"])},
    }


def frame(group: Json) -> tuple[float, float, float, float]:
    left, top, width, height = group["bounding"]
    return left, top, left + width, top + height


def inside(inner: tuple[float, ...], outer: tuple[float, ...]) -> bool:
    return inner[0] >= outer[0] and inner[1] >= outer[1] and inner[2] <= outer[2] and inner[3] <= outer[3]
