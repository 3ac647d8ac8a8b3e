"""Run one of the workflows on a running ComfyUI, with progress.

    python tools/run_workflow.py workflows/api/tune-a-video-step-by-step.json \\
        --set file=skiing.mp4 --set "source prompt.text=a man is skiing" --set "edit prompt.text=a panda is skiing"

Takes any graph in API format. `--set INPUT=VALUE` changes the input of all nodes that have it, `--set NODE.INPUT=VALUE`
those of one node, by its title, class or id. Needs aiohttp, which ComfyUI's own Python has.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import uuid
from pathlib import Path
from typing import Any

import aiohttp

Graph = dict[str, dict[str, Any]]


class RefusedError(Exception):
    """The server refused the graph, or a node failed. The text names the node and the reason."""


def change(graph: Graph, assignment: str) -> None:
    """Set inputs by `INPUT=VALUE` or `NODE.INPUT=VALUE`. Raises ValueError if no node has that input."""
    name, _, text = assignment.partition("=")
    node_name, _, input_name = name.rpartition(".")
    nodes = [
        node
        for node_id, node in graph.items()
        if node_name in ("", node_id, node["class_type"], node.get("_meta", {}).get("title"))
        and input_name in node["inputs"]
        and not isinstance(node["inputs"][input_name], list)  # a link
    ]
    if not nodes:
        raise ValueError(f"--set {assignment}: no node has the input {name}")
    for node in nodes:
        old = node["inputs"][input_name]
        node["inputs"][input_name] = text if isinstance(old, str) else json.loads(text)


def title(graph: Graph, node_id: str) -> str:
    """Return a node's title on the canvas."""
    return graph[node_id].get("_meta", {}).get("title", graph[node_id]["class_type"])


async def run(graph: Graph, server: str) -> list[str]:
    """Queue the graph, report its progress, and return the paths of its saved files below the server's folders."""
    client = uuid.uuid4().hex
    saved = []
    async with (
        aiohttp.ClientSession(f"http://{server}") as session,
        session.ws_connect(f"/ws?clientId={client}", max_msg_size=0) as socket,
    ):
        async with session.post("/prompt", json={"prompt": graph, "client_id": client}) as answer:
            queued = await answer.json()
        if queued.get("node_errors") or "prompt_id" not in queued:
            raise RefusedError(refusal(graph, queued))
        async for message in socket:
            if message.type != aiohttp.WSMsgType.TEXT:
                continue  # a preview picture
            event = json.loads(message.data)
            kind, data = event["type"], event["data"]
            if data.get("prompt_id") != queued["prompt_id"]:
                continue
            if kind == "executing" and data["node"] is not None:
                print(f"\n{title(graph, data['node'])}", end="", flush=True)
            elif kind == "progress":
                print(f"\r{title(graph, data['node'])}: {data['value']}/{data['max']}", end="", flush=True)
            elif kind == "executed":
                saved += files(data.get("output") or {})
            elif kind == "execution_error":
                raise RefusedError(f"{title(graph, data['node_id'])}: {data['exception_message']}")
            elif kind == "execution_interrupted":
                raise RefusedError("it was cancelled")
            elif kind == "execution_success":
                return saved
    raise RefusedError("the server has closed the connection")


def files(output: dict[str, Any]) -> list[str]:
    """List the paths of a node's saved files, without previews."""
    entries = [entry for values in output.values() if isinstance(values, list) for entry in values]
    return [
        str(Path(entry["type"], entry["subfolder"], entry["filename"]))
        for entry in entries
        if isinstance(entry, dict) and entry.get("type") == "output"
    ]


def refusal(graph: Graph, answer: dict[str, Any]) -> str:
    """Return the server's reasons, a line for each input."""
    lines = [
        f"{title(graph, node_id)}: {error['message']}: {error['details']}"
        for node_id, report in answer.get("node_errors", {}).items()
        for error in report["errors"]
    ]
    return "\n".join(lines) or str(answer.get("error"))


def main() -> None:
    """Read the arguments, run, print the files."""
    parser = argparse.ArgumentParser(description="Run a workflow in API format on a running ComfyUI.")
    parser.add_argument("workflow", type=Path, help="a file of workflows/api")
    parser.add_argument("--server", default="127.0.0.1:8188", metavar="HOST:PORT", help="default: %(default)s")
    parser.add_argument("--set", action="append", default=[], metavar="[NODE.]INPUT=VALUE", help="repeatable")
    options = parser.parse_args()
    graph = json.loads(options.workflow.read_text(encoding="utf-8"))
    try:
        for assignment in options.set:
            change(graph, assignment)
        saved = asyncio.run(run(graph, options.server))
    except (RefusedError, ValueError, aiohttp.ClientError) as error:
        sys.exit(f"\n{error}")
    print("", *saved, sep="\n")


if __name__ == "__main__":
    main()
