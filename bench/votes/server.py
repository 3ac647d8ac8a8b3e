"""The page that voters see, on loopback."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

from aiohttp import web

from .answers import QUESTIONS, Answers
from .pairs import SIDES, Pair, Secret

PAGE = Path(__file__).with_name("page.html")
_ID = re.compile(r"[0-9a-f]{32}")
_MOST_BYTES = 4096


def application(pairs: Sequence[Pair], answers: Answers, secret: Secret) -> web.Application:
    """Build the server: ``/`` the page, ``/next`` a voter's next pair, ``/vote``, ``/video/VOTER/PAIR/SIDE.mp4``.

    Nothing that it sends names a method.
    """
    by_number = {pair.number: pair for pair in pairs}
    routes = web.RouteTableDef()

    @routes.get("/")
    async def page(request: web.Request) -> web.StreamResponse:
        return web.FileResponse(PAGE, headers={"Cache-Control": "no-cache"})

    @routes.get("/next")
    async def next_pair(request: web.Request) -> web.Response:
        voter = _voter(request.query.get("voter"))
        left = [pair for pair in secret.order(voter, pairs) if not answers.answered(voter, pair.number)]
        told: dict[str, object] = {"left": len(left), "all": len(pairs), "questions": QUESTIONS}
        if left:
            told |= {"pair": left[0].number, "sentence": left[0].sentence}
        return web.json_response(told, headers={"Cache-Control": "no-store"})

    @routes.get("/video/{voter}/{pair}/{side}.mp4")
    async def video(request: web.Request) -> web.StreamResponse:
        voter, pair = _voter(request.match_info["voter"]), _pair(request.match_info["pair"])
        side = request.match_info["side"]
        if side == "source":
            return web.FileResponse(pair.source)
        if side not in SIDES:
            raise web.HTTPNotFound
        return web.FileResponse(pair.videos[secret.sides(voter, pair)[SIDES.index(side)]])

    @routes.post("/vote")
    async def vote(request: web.Request) -> web.Response:
        try:
            sent = json.loads(await request.text())
            voter, pair, number = _voter(sent["voter"]), _pair(sent["pair"]), _voter(sent["id"])
            sides = {question: SIDES.index(sent[question]) for question in QUESTIONS}
        except (ValueError, KeyError, TypeError) as error:
            raise web.HTTPBadRequest(text="this is no vote") from error
        shown = [pair.methods[index] for index in secret.sides(voter, pair)]
        line = {
            "id": number,
            "voter": voter,
            "pair": pair.number,
            "clip": pair.clip,
            "sentence": pair.sentence,
            "methods": shown,
            **{question: shown[index] for question, index in sides.items()},
            "time": round(time.time(), 3),
        }
        # The disk is waited for in a thread, so that other voters need not wait.
        new = await asyncio.get_running_loop().run_in_executor(None, answers.add, line)
        return web.json_response({"counted": new})

    def _voter(text: object) -> str:
        if not isinstance(text, str) or not _ID.fullmatch(text):
            raise web.HTTPBadRequest(text="an id is 32 hexadecimal digits")
        return text

    def _pair(text: object) -> Pair:
        if not isinstance(text, str) or text not in by_number:
            raise web.HTTPNotFound(text="there is no such pair")
        return by_number[text]

    app = web.Application(client_max_size=_MOST_BYTES)
    app.add_routes(routes)
    return app


def serve(app: web.Application, address: str, port: int) -> None:
    """Serve until Ctrl-C, also while a voter's browser still loads a video. Raises OSError for an address in use."""
    web.run_app(app, host=address, port=port, print=None, shutdown_timeout=1)
