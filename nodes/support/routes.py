"""What the pack adds to the addresses of the host's server."""

from __future__ import annotations

import re
import sys
import urllib.parse
from pathlib import Path
from typing import Any

from . import stop

PACK = Path(__file__).parents[2]


def register() -> None:
    """Add the pack's addresses to the host's server, where there is one."""
    host: Any = sys.modules.get("server")
    instance = getattr(getattr(host, "PromptServer", None), "instance", None)
    if instance is None:
        return
    stop.add_route(instance.routes)
    add_files(instance.routes, PACK)


def add_files(routes: Any, pack: Path) -> None:
    """Serve help pages, scripts and templates of a pack whose folder has a space or the like in its name.

    The host serves them as static files, and aiohttp looks for those by a quoted prefix in an address that it has
    unquoted before: below such a name it finds none. The host puts "/api" before each address, too.
    """
    if urllib.parse.quote(pack.name) == pack.name:
        return
    from aiohttp import web

    def serve(address: str, folder: Path) -> None:
        # A pattern is matched with the unquoted address, and is not quoted itself.
        @routes.get(f"/{address}/{{pack:{re.escape(pack.name)}}}/{{file:.+}}")
        async def file(request: web.Request) -> web.StreamResponse:
            root = folder.resolve()
            path = (root / request.match_info["file"]).resolve()
            if not path.is_relative_to(root) or not path.is_file():
                raise web.HTTPNotFound
            return web.FileResponse(path)

    serve("extensions", pack / "web")
    serve("workflow_templates", pack / "workflows")
