"""End a tuning early and keep its weights: ``POST /tune-a-video/stop``, sent by the node's button (web/js/stop.js).

The host's own cancel raises an exception in the node, which then has no result. This request sets an event; the node
ends after the current step, and the graph continues with its weights.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PATH = "/tune-a-video/stop"
_running: dict[str, threading.Event] = {}


@contextmanager
def stoppable(node: str) -> Iterator[threading.Event]:
    """Yield an event that is set when this node is asked to stop."""
    event = _running[node] = threading.Event()
    try:
        yield event
    finally:
        _running.pop(node, None)


def request_stop(node: str | None) -> list[str]:
    """Ask running tunings to end: one node's, or all for None. Returns the nodes that were asked.

    ``node``: its id as the host runs it, "12:3" for node 3 of the subgraph that node 12 shows. "12" also asks what runs
    within that subgraph.
    """
    # A copy, because the server's thread runs this while nodes start and end.
    running = _running.copy()
    asked = [name for name in running if node is None or f"{name}:".startswith(f"{node}:")]
    for name in asked:
        running[name].set()
    return asked


def add_route(routes: Any) -> None:
    """Add the stop request to a server's ``aiohttp.web.RouteTableDef``."""
    from aiohttp import web

    @routes.post(PATH)
    async def stop(request: web.Request) -> web.Response:
        given = await request.json() if request.can_read_body else {}
        node = given.get("node_id") if isinstance(given, dict) else None
        return web.json_response({"stopping": request_stop(None if node is None else str(node))})
