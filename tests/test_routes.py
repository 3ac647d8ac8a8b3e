"""Routes that the pack adds to the host's server: the stop request, and files below a name with a space."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.comfyui


def with_server(routes: Any, ask: Callable[[Any], Awaitable[Any]]) -> Any:
    """Return what `ask` returns for a client of a server with these routes, repeated below /api as the host does."""
    from aiohttp import web
    from aiohttp.test_utils import TestClient, TestServer

    async def serve() -> Any:
        app, below = web.Application(), web.RouteTableDef()
        for route in routes:
            below.route(route.method, "/api" + route.path)(route.handler, **route.kwargs)
        app.add_routes(below)
        app.add_routes(routes)
        async with TestClient(TestServer(app)) as client:
            return await ask(client)

    return asyncio.run(serve())


def test_tunings_are_stopped_over_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    from aiohttp import web
    from tune_a_video.nodes.support import routes as pack_routes
    from tune_a_video.nodes.support import stop

    routes = web.RouteTableDef()
    server = SimpleNamespace(PromptServer=SimpleNamespace(instance=SimpleNamespace(routes=routes)))
    monkeypatch.setitem(sys.modules, "server", server)
    pack_routes.register()

    async def ask(client: Any) -> list[Any]:
        async def stopping(**options: Any) -> Any:
            return (await (await client.post(stop.PATH, **options)).json())["stopping"]

        answers = []
        with stop.stoppable("12") as event:
            answers.append((await stopping(json={"node_id": 3}), event.is_set()))
            answers.append((await stopping(json={"node_id": 12}), event.is_set()))
        with stop.stoppable("12") as event:
            answers.append((await stopping(), event.is_set()))
        return [*answers, await stopping(json=[])]

    assert with_server(routes, ask) == [([], False), (["12"], True), (["12"], True), []]


def test_a_tuning_that_ends_during_a_stop_request_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from tune_a_video.nodes.support import stop

    second = stop.stoppable("2")
    with stop.stoppable("1") as first:
        event = second.__enter__()
        monkeypatch.setattr(first, "set", lambda: second.__exit__(None, None, None))
        assert stop.request_stop(None) == ["1", "2"]
    assert event.is_set()
    assert stop.request_stop(None) == []


def test_of_two_tunings_in_subgraphs_the_right_one_stops() -> None:
    from tune_a_video.nodes.support import stop

    with stop.stoppable("12:6") as first, stop.stoppable("2:12:6") as nested, stop.stoppable("6") as plain:
        assert stop.request_stop("13:6") == [] == stop.request_stop("1") == stop.request_stop("2:6")
        assert stop.request_stop("12:6") == ["12:6"]
        assert (first.is_set(), nested.is_set(), plain.is_set()) == (True, False, False)
        assert stop.request_stop("6") == ["6"]
        assert stop.request_stop("2") == ["2:12:6"]


def test_files_are_found_below_a_name_with_a_space(tmp_path: Path) -> None:
    from aiohttp import web
    from tune_a_video.nodes.support.routes import add_files

    pack = tmp_path / "my (tune) + video"
    for name in ("web/docs/a.md", "workflows/b.json", "secret.txt"):
        (pack / name).parent.mkdir(parents=True, exist_ok=True)
        (pack / name).write_text(name)
    (pack / "web" / "link").symlink_to(pack / "secret.txt")
    routes = web.RouteTableDef()
    add_files(routes, pack)

    async def ask(client: Any) -> dict[str, tuple[int, str]]:
        found = {}
        for path in (
            "/extensions/my%20(tune)%20%2B%20video/docs/a.md",
            "/api/workflow_templates/my (tune) + video/b.json",
            "/extensions/my%20(tune)%20+%20video/docs/c.md",
            "/extensions/my%20(tune)%20+%20video/docs",
            "/extensions/my%20(tune)%20+%20video/%2e%2e/secret.txt",
            "/extensions/my%20(tune)%20+%20video/..%2fsecret.txt",
            "/extensions/my%20(tune)%20+%20video/link",
            "/extensions/another/docs/a.md",
        ):
            answer = await client.get(path)
            found[path] = (answer.status, await answer.text() if answer.status == 200 else "")
        return found

    answers = list(with_server(routes, ask).values())
    assert answers[:2] == [(200, "web/docs/a.md"), (200, "workflows/b.json")]
    assert answers[2:] == [(404, "")] * 6


def test_a_plain_name_is_left_to_the_host(tmp_path: Path) -> None:
    from aiohttp import web
    from tune_a_video.nodes.support.routes import add_files

    routes = web.RouteTableDef()
    add_files(routes, tmp_path / "comfyui-tune-a-video")
    assert len(routes) == 0
