"""Studies on ComfyUI servers that are lost, wrong or cut off, with stand-ins that speak ComfyUI's API."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "bench"), str(ROOT / "demo")]

from dataset import command, jobs, results, servers  # noqa: E402

SETTINGS = jobs.Settings(frames=2, width=16, height=16)
FRAMES = 2


class StandIn:
    """A server whose edits are noise that belongs to the sentence. ``before``: called with each request's path."""

    def __init__(self, port: int = 0) -> None:
        self.nodes = {node: {} for node in servers._needed(SETTINGS)}
        self.motions: list[str] = []
        self.graphs: dict[str, dict[str, Any]] = {}
        self.edits: Counter[str] = Counter()
        self.tunings = 0
        self.before: Callable[[Any], bool] = lambda request: True
        self._http = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self.address = f"127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def end(self) -> None:
        """Be gone: connections are refused from now on."""
        self._http.shutdown()
        self._http.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # noqa: N802
                if stand_in.before(self):
                    stand_in._get(self)

            def do_POST(self) -> None:  # noqa: N802
                self.body = self.rfile.read(int(self.headers["Content-Length"]))
                if stand_in.before(self):
                    stand_in._post(self)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler

    def _get(self, request: Any) -> None:
        kind, _, rest = request.path.lstrip("/").partition("/")
        if request.path.startswith("/view"):
            name = request.path.split("filename=")[1].split("&")[0]
            picture = io.BytesIO()
            seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
            pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(picture, "png")
            answer(request, picture.getvalue())
        elif kind == "history":
            graph = self.graphs.get(rest)
            answer(request, {} if graph is None else {rest: self._entry(graph)})
        elif kind == "queue":
            answer(request, {"queue_running": [], "queue_pending": []})
        elif kind == "object_info":
            loaders = {
                "TAV_LoadMotion": {"input": {"required": {"file": [self.motions]}}},
                "CheckpointLoaderSimple": {"input": {"required": {"ckpt_name": ["COMBO", {"options": ["sd.ckpt"]}]}}},
            }
            answer(request, {**self.nodes, **{name: loaders[name] for name in loaders if not rest or rest == name}})
        else:
            answer(request, {"system": {}})

    def _post(self, request: Any) -> None:
        if request.path != "/prompt":
            answer(request, {})
            return
        sent = json.loads(request.body)
        graph = sent["prompt"]
        self.graphs[sent["prompt_id"]] = graph
        if "tune" in graph:
            self.tunings += 1
            self.motions.append(f"{graph['motion']['inputs']['filename_prefix']}_00001_.safetensors")
        else:
            self.edits[graph["edit"]["inputs"]["text"]] += 1
        answer(request, {"prompt_id": sent["prompt_id"]})

    def _entry(self, graph: dict[str, Any]) -> dict[str, Any]:
        text = hashlib.sha256(graph["edit"]["inputs"]["text"].encode()).hexdigest() if "edit" in graph else ""
        images = [{"filename": f"{text}{number}", "subfolder": "", "type": "output"} for number in range(FRAMES)]
        return {"status": {"status_str": "success"}, "outputs": {"save": {"images": images}}}


def answer(request: Any, content: Any, status: int = 200) -> None:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    request.send_response(status)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


@pytest.fixture
def start() -> Iterator[Callable[[], StandIn]]:
    started: list[StandIn] = []

    def new() -> StandIn:
        started.append(StandIn())
        return started[-1]

    yield new
    for each in started:
        each.end()


def some_jobs(folder: Path, clips: int = 2, edits: int = 4) -> list[jobs.Job]:
    made = []
    for c in range(clips):
        source = folder / f"source-{c}"
        results.write_frames(source, np.full((FRAMES, 16, 16, 3), 50 + c, np.uint8), ".png")
        for e in range(edits):
            made.append(jobs.Job(f"{c}", jobs.TUNED, "a dog", f"{c} {e}", source, folder, folder / f"{c}-{e}"))
    return made


def share(
    todo: list[jobs.Job], stand_ins: list[StandIn], settings: jobs.Settings = SETTINGS, patience: float = 0.3
) -> tuple[jobs.Outcome, list[str]]:
    events: list[str] = []
    workers = [servers.ServerWorker(each.address, settings, patience) for each in stand_ins]
    outcome = jobs.share(todo, workers, False, lambda worker, job, event: events.append(f"{worker} {event}"))
    return outcome, events


def pixels(todo: list[jobs.Job]) -> str:
    return results.digest([job.result for job in todo])


def test_the_edits_of_a_server_that_is_lost_go_to_the_others(
    tmp_path: Path, start: Callable[[], StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, kept = start(), start()

    def gone(request: Any) -> bool:
        if lost.edits.total() >= 2 and request.path == "/queue":
            threading.Thread(target=lost.end).start()
        if lost.edits.total() >= 2:
            request.connection.close()
        return lost.edits.total() < 2

    lost.before = gone
    todo = some_jobs(tmp_path / "two")
    outcome, events = share(todo, [lost, kept])
    assert (outcome.made, outcome.failed, outcome.left) == (len(todo), [], 0), events
    assert outcome.deaths == 1 and list(outcome.lost) == [lost.address]
    assert any("is left out" in event for event in events)
    # The lost server's clip was tuned again; nothing that was made was made again.
    assert kept.tunings == 2 and all(count == 1 for count in kept.edits.values())
    alone = some_jobs(tmp_path / "one")
    assert share(alone, [start()])[0].made == len(alone)
    assert pixels(alone) == pixels(todo)


@pytest.mark.parametrize(
    "trouble", ["half an answer", "a proxy's error", "another server", "no answer", "half pictures"]
)
def test_a_server_in_trouble_costs_no_edit(tmp_path: Path, start: Callable[[], StandIn], trouble: str) -> None:
    bad, good = start(), start()

    def before(request: Any) -> bool:
        if trouble == "half an answer" and request.path == "/prompt":
            request.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\n{")
        elif trouble == "a proxy's error":
            answer(request, b"<html>Bad Gateway", 502)
        elif trouble == "another server":
            answer(request, b"<html>It works!")
        elif trouble == "no answer" and request.path != "/system_stats":
            request.connection.close()
        elif trouble == "half pictures" and request.path.startswith("/view"):
            answer(request, b"\x89PNG")
        else:
            return True
        return False

    bad.before = before
    todo = some_jobs(tmp_path, clips=2, edits=4)
    outcome, events = share(todo, [bad, good])
    assert (outcome.made, outcome.failed, outcome.left) == (8, [], 0), events
    assert list(outcome.lost) == [bad.address] and set(good.edits.values()) == {1}
    # Asked alone it makes nothing, and says so after a few tries.
    outcome, events = share(some_jobs(tmp_path / "alone"), [bad])
    assert outcome.made == 0 and outcome.left + len(outcome.failed) == 8 and list(outcome.lost) == [bad.address]


def test_a_server_that_lacks_nodes_or_the_checkpoint_is_left_out_and_costs_no_edit(
    tmp_path: Path, start: Callable[[], StandIn]
) -> None:
    bare, good = start(), start()
    bare.nodes.clear()
    todo = some_jobs(tmp_path, clips=3, edits=1)
    outcome, _ = share(todo, [bare, good])
    assert (outcome.made, outcome.failed) == (3, [])
    assert outcome.lost[bare.address].startswith("it has no node CLIPTextEncode, ImageCompositeMasked, SaveImage, TAV_")
    other = jobs.Settings(**{**vars(SETTINGS), "checkpoint": "other.ckpt"})
    good.nodes |= {node: {} for node in servers._needed(other)}
    outcome, _ = share(some_jobs(tmp_path / "other", 1, 1), [good], other)
    assert outcome.left == 1 and outcome.lost == {good.address: "it has no checkpoint other.ckpt"}


def test_a_connection_that_is_cut_does_not_queue_an_edit_twice(tmp_path: Path, start: Callable[[], StandIn]) -> None:
    server, cut = start(), set()

    def before(request: Any) -> bool:
        if request.path == "/prompt" and "tune" not in json.loads(request.body)["prompt"] and "prompt" not in cut:
            cut.add("prompt")
            server._post(request)  # queued, but the answer is a broken one
            return False
        if request.path.startswith("/history") and server.edits.total() == 2 and "history" not in cut:
            cut.add("history")
            request.connection.close()
            return False
        return True

    server.before = before
    todo = some_jobs(tmp_path, clips=1)
    outcome, events = share(todo, [server], patience=5)
    assert cut == {"prompt", "history"} and outcome.made == 4, events
    assert server.tunings == 1 and set(server.edits.values()) == {1}


def test_when_all_servers_are_lost_the_same_command_goes_on(
    tmp_path: Path, start: Callable[[], StandIn], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("dog", "cat"):
        results.write_frames(tmp_path / "set" / name, np.full((FRAMES, 16, 16, 3), 90, np.uint8), ".png")
    lines = [f"{clip},a {clip},{clip} {number}," for clip in ("dog", "cat") for number in range(3)]
    (tmp_path / "set" / "edits.csv").write_text("video,source,edit,name\n" + "\n".join(lines) + "\n")
    server = start()
    server.before = lambda request: server.edits.total() < 2 or request.connection.close()

    def study(*addresses: str) -> dict[str, Any]:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        given = [str(tmp_path / "set"), "--output", str(tmp_path / "out"), "--methods", jobs.TUNED, "--size", "16"]
        given += ["--frames", str(FRAMES), "--patience", "0.3", "--on", "servers", *addresses]
        return command.run(**vars(parser.parse_args(given)))

    with pytest.raises(SystemExit, match=r"^No worker was left for 5 edits \(.*\)\. The same command makes them\.$"):
        study(server.address, "127.0.0.1:1")
    assert len(list((tmp_path / "out" / "results").rglob("00001.jpg"))) == 1
    assert not list((tmp_path / "out").rglob(".unfinished-*"))
    server.before = lambda request: True
    report = study(server.address)
    assert report["edits_made"] == 5 and not report["failed"] and not report["missing"]
    assert "5 edits to make, 1 are there" in capsys.readouterr().out


@pytest.mark.parametrize("address", ["", "host:port", "ftp://host:1", "a b:1", "host:0", ":8188"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="is not HOST:PORT"):
        servers.url_of(address)
    assert servers.url_of("host:8188") == servers.url_of("http://host:8188/") == "http://host:8188"


class Slow:
    """A worker that makes nothing and takes its time to end, or fails when it is asked to come back."""

    def __init__(self, name: str, seconds: float = 0.0) -> None:
        self.name, self.seconds = name, seconds

    def edit(self, job: jobs.Job) -> None:
        raise jobs.WorkerDied("gone")

    def revive(self) -> bool:
        raise RuntimeError("it cannot be asked")

    def close(self) -> None:
        time.sleep(self.seconds)


def test_workers_end_at_once_and_one_that_cannot_be_asked_is_left_out(tmp_path: Path) -> None:
    started = time.monotonic()
    outcome = jobs.share(some_jobs(tmp_path), [Slow(str(i), 1.0) for i in range(6)], False, lambda *_: None)
    assert time.monotonic() - started < 4
    assert outcome.made == 0 and outcome.left + len(outcome.failed) == 8 and len(outcome.lost) == 6
