"""Ending a tuning by hand and keeping what it has learnt: ``POST /tune-a-video/stop``.

The host's own cancel ends a node with an exception, and nothing comes out of it. This address only asks; the node
ends after the step it is in, and the graph goes on with its result. The button in the node (web/js) calls it.
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
    """Within, a request to stop this node sets the event."""
    event = _running[node] = threading.Event()
    try:
        yield event
    finally:
        _running.pop(node, None)


def request_stop(node: str | None) -> list[str]:
    """Ask the tunings that run to end: that of a node, or all for None. Returns the nodes that were asked.

    ``node``: as its graph numbers it; within a subgraph the host puts the subgraph's own number in front.
    """
    asked = [name for name in list(_running) if node is None or node in (name, name.rpartition(":")[2])]
    for name in asked:
        _running[name].set()
    return asked


def add_route(routes: Any) -> None:
    """Add the address to a server's ``aiohttp.web.RouteTableDef``."""
    from aiohttp import web

    @routes.post(PATH)
    async def stop(request: web.Request) -> web.Response:
        given = await request.json() if request.can_read_body else {}
        node = given.get("node_id") if isinstance(given, dict) else None
        return web.json_response({"stopping": request_stop(None if node is None else str(node))})
