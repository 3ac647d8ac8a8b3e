"""Routes that the pack adds to the host's server."""

from __future__ import annotations

import re
import sys
import urllib.parse
from pathlib import Path
from typing import Any

from . import stop

PACK = Path(__file__).parents[2]


def register() -> None:
    """Add the pack's routes to the host's server, if there is one."""
    host: Any = sys.modules.get("server")
    instance = getattr(getattr(host, "PromptServer", None), "instance", None)
    if instance is None:
        return
    stop.add_route(instance.routes)
    add_files(instance.routes, PACK)


def add_files(routes: Any, pack: Path) -> None:
    """Serve help pages, scripts and templates of a pack whose folder name needs quoting in a URL, such as a space.

    The host serves them as static files. aiohttp compares the quoted prefix with the unquoted URL, so it finds no
    static file below such a name. The host also repeats every route below "/api".
    """
    if urllib.parse.quote(pack.name) == pack.name:
        return
    from aiohttp import web

    def serve(prefix: str, folder: Path) -> None:
        # A pattern is compared with the unquoted URL, and is not quoted itself.
        @routes.get(f"/{prefix}/{{pack:{re.escape(pack.name)}}}/{{file:.+}}")
        async def file(request: web.Request) -> web.StreamResponse:
            root = folder.resolve()
            path = (root / request.match_info["file"]).resolve()
            if not path.is_relative_to(root) or not path.is_file():
                raise web.HTTPNotFound
            return web.FileResponse(path)

    serve("extensions", pack / "web")
    serve("workflow_templates", pack / "workflows")
