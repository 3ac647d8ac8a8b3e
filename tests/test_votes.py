"""The page of votes: blind, exact under load and kills, and what votes say."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "bench"), str(ROOT / "demo")]

from dataset import layouts, results, sources  # noqa: E402
from votes import outcome  # noqa: E402
from votes.answers import Answers, read_votes  # noqa: E402
from votes.pairs import BROKEN, Pair, Secret, broken, make_pairs  # noqa: E402

PAIRS, VOTERS = 50, 20

SERVER = """
import sys, importlib.util
sys.path[:] = {path!r}
import engine
engine.load_pack()
from pathlib import Path
spec = importlib.util.spec_from_file_location('test_votes', {this!r})
t = importlib.util.module_from_spec(spec)
sys.modules['test_votes'] = t
spec.loader.exec_module(t)
from votes.answers import Answers
from votes.pairs import Secret
from votes.server import application, serve
folder = Path({folder!r})
app = application(t.made_pairs(folder), Answers(folder / "answers.jsonl"), Secret(folder / "secret"))
serve(app, "127.0.0.1", {port})
"""


def made_pairs(folder: Path) -> list[Pair]:
    """Return pairs whose videos are text, and one in ten of which is a catch trial."""
    found = []
    for number in range(PAIRS):
        other = BROKEN if number % 10 == 0 else "frame-by-frame"
        videos = (folder / f"{number}-a.mp4", folder / f"{number}-b.mp4")
        for letter, file in zip("ab", videos, strict=True):
            if not file.exists():
                file.write_text(letter * 100)
        found.append(
            Pair(f"p{number}", f"clip {number}", f"sentence {number}", videos[0], ("tune-a-video", other), videos)
        )
    return found


class Page:
    """The server as a process of its own, which can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.script = SERVER.format(path=sys.path, this=__file__, folder=str(folder), port=self.port)
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", self.script])
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                self.get("/")
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError("the page is not served")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def get(self, path: str, **headers: str) -> bytes:
        answer = requests.get(self.url + path, headers=headers, timeout=20)
        answer.raise_for_status()
        return answer.content

    def vote(self, **values: Any) -> dict[str, Any]:
        answer = requests.post(f"{self.url}/vote", data=json.dumps(values), timeout=20)
        answer.raise_for_status()
        return answer.json()


@pytest.fixture
def page(tmp_path: Path) -> Any:
    served = Page(tmp_path)
    yield served
    served.kill()


def voter(page: Page, name: str, done: Counter[str]) -> None:
    """Vote on all pairs as the page does: each vote twice, and again until the server has thanked for it."""

    def insist(what: Any) -> Any:
        while True:
            try:
                return what()
            except requests.HTTPError:
                raise
            except OSError:
                time.sleep(0.05)

    while "pair" in (shown := json.loads(insist(lambda: page.get(f"/next?voter={name}")))):
        values = {"id": uuid.uuid4().hex, "voter": name, "pair": shown["pair"], "consistency": "left", "text": "right"}
        answers = [insist(lambda values=values: page.vote(**values)) for _ in range(2)]
        assert not answers[1]["counted"]
        done[name] += 1


def test_a_thousand_votes_from_twenty_clients_and_a_kill_in_the_middle(page: Page, tmp_path: Path) -> None:
    names = [uuid.uuid4().hex for _ in range(VOTERS)]
    done: Counter[str] = Counter()
    stopped = threading.Event()

    def killer() -> None:
        while done.total() < 300 and not stopped.is_set():
            time.sleep(0.02)
        page.kill()
        page.start()

    thread = threading.Thread(target=killer)
    thread.start()
    with ThreadPoolExecutor(VOTERS) as pool:
        list(pool.map(lambda name: voter(page, name, done), names))
    stopped.set()
    thread.join()
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    votes, _ = read_votes(tmp_path / "answers.jsonl")
    assert len(lines) == len(votes) == PAIRS * VOTERS
    assert {(vote["voter"], vote["pair"]) for vote in votes} == {(n, f"p{i}") for n in names for i in range(PAIRS)}
    assert len({vote["id"] for vote in votes}) == PAIRS * VOTERS
    # Sides are even, though everybody pressed left.
    left = sum(vote["consistency"] == "tune-a-video" for vote in votes)
    assert 400 < left < 600
    assert all(vote["text"] != vote["consistency"] for vote in votes)


def test_nothing_that_is_sent_names_a_method(page: Page) -> None:
    name = uuid.uuid4().hex
    shown = json.loads(page.get(f"/next?voter={name}"))
    assert set(shown) == {"left", "all", "questions", "pair", "sentence"}
    for path in ("/", f"/next?voter={name}"):
        text = page.get(path).decode().lower()
        assert not any(word in text for word in ("tune-a-video", "frame-by-frame", BROKEN))
    sides = {side: page.get(f"/video/{name}/{shown['pair']}/{side}.mp4")[:1] for side in ("left", "right")}
    assert sorted(sides.values()) == [b"a", b"b"]
    # A phone asks for parts of a video; the side stays after a reload.
    assert page.get(f"/video/{name}/{shown['pair']}/left.mp4", Range="bytes=0-4") == 5 * sides["left"]
    assert json.loads(page.get(f"/next?voter={name}")) == shown


def test_requests_that_are_no_votes_are_refused(page: Page, tmp_path: Path) -> None:
    good = {"id": "0" * 32, "voter": "1" * 32, "pair": "p3", "consistency": "left", "text": "right"}
    for change, status in (
        ({"id": "x"}, 400),
        ({"voter": "../../etc"}, 400),
        ({"pair": "p999"}, 404),
        ({"text": "both"}, 400),
        ({"text": None}, 400),
        ({"id": "0" * 10_000}, 413),
    ):
        with pytest.raises(requests.HTTPError) as refused:
            page.vote(**{**good, **change})
        assert refused.value.response.status_code == status
    for path in ("/next?voter=me", "/video/" + "1" * 32 + "/p3/..%2fsecret.mp4", "/answers.jsonl", "/secret"):
        with pytest.raises(requests.HTTPError) as refused:
            page.get(path)
        assert refused.value.response.status_code in (400, 404)
    assert (tmp_path / "answers.jsonl").read_bytes() == b""
    assert page.vote(**good) == {"counted": True}
    # Another tab of the same browser: another id, the same pair.
    assert page.vote(**{**good, "id": "2" * 32}) == {"counted": False}


def test_a_line_that_a_kill_cut_short_is_dropped_and_the_file_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    first = Answers(file)
    assert first.add({"id": "a", "voter": "v", "pair": "p"})
    with pytest.raises(OSError):
        Answers(file)  # a second page on the same votes
    first.close()
    with file.open("ab") as text:
        text.write(b'{"id": "b", "vo')
    second = Answers(file)
    assert not second.add({"id": "a", "voter": "w", "pair": "p"})
    assert second.add({"id": "b", "voter": "w", "pair": "p"})
    second.close()
    assert [vote["id"] for vote in read_votes(file)[0]] == ["a", "b"]
    file.write_text("{}\n")
    with pytest.raises(ValueError, match="answers.jsonl:1: this is no vote"):
        read_votes(file)


def test_a_vote_that_the_disk_refuses_is_not_thanked_for_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = Answers(tmp_path / "answers.jsonl")
    vote = {"id": "a", "voter": "v", "pair": "p"}

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            answers.add(vote)
    assert (tmp_path / "answers.jsonl").read_bytes() == b"" and not answers.answered("v", "p")
    assert answers.add(vote)
    answers.close()


def test_each_voter_has_an_order_and_sides_that_a_restart_keeps(tmp_path: Path) -> None:
    pairs = made_pairs(tmp_path)
    secret = Secret(tmp_path / "secret")
    orders = {name: [pair.number for pair in secret.order(name, pairs)] for name in "abc"}
    assert len({tuple(order) for order in orders.values()}) == 3
    assert all(sorted(order) == sorted(orders["a"]) for order in orders.values())
    again = Secret(tmp_path / "secret")
    assert [pair.number for pair in again.order("a", pairs)] == orders["a"]
    assert [again.sides("a", pair) for pair in pairs] == [secret.sides("a", pair) for pair in pairs]
    assert Secret(tmp_path / "other").order("a", pairs) != secret.order("a", pairs)


def test_pairs_of_a_study_have_catch_trials_and_nameless_videos(tmp_path: Path) -> None:
    clip = np.random.default_rng(0).integers(0, 256, (4, 24, 24, 3), dtype=np.uint8)
    results.write_frames(tmp_path / "dog", clip, ".png")
    (tmp_path / "edits.csv").write_text("video,source,edit\ndog,a dog,a cat\ndog,a dog,a fox\n")
    rows, output = layouts.read_dataset(tmp_path / "edits.csv").rows, tmp_path / "out"
    systems = {name: output / "results" / name for name in ("tune-a-video", "other")}
    for number, row in enumerate(rows):
        sources.keep(output, row, 4, (16, 16))
        frames = results.read_frames(output / "source" / results.clip_id(row))
        results.write_frames(results.edit_folder(output, "tune-a-video", row), frames)
        if number == 0:
            results.write_frames(results.edit_folder(output, "other", row), 255 - frames)
    pairs = make_pairs(output, rows, systems, "tune-a-video", 2, tmp_path / "videos")
    assert [pair.methods[1] for pair in pairs] == ["other", BROKEN, BROKEN]
    assert all(file.is_file() for pair in pairs for file in (pair.source, *pair.videos))
    names = {file.stem for pair in pairs for file in (pair.source, *pair.videos)}
    assert all(set(name) <= set("0123456789abcdef") for name in names)
    assert make_pairs(output, rows, systems, "tune-a-video", 2, tmp_path / "videos") == pairs
    # Another round compares another method: its pairs have not been answered yet.
    others = make_pairs(output, rows, systems, "other", 2, tmp_path / "videos")
    assert not {pair.number for pair in others} & {pair.number for pair in pairs}


def test_a_broken_video_flickers() -> None:
    still = torch.full((6, 8, 8, 3), 0.6)
    assert broken(still, 0).mean((1, 2, 3)).std() > 0.1
    assert torch.equal(broken(still, 0), broken(still, 0))


def test_votes_on_other_pairs_say_nothing_about_ours() -> None:
    votes = [{**vote, "methods": ["ours", "other"]} for vote in made_votes(3, 2, 1.0)]
    votes += [
        {**vote, "id": f"x{vote['id']}", "methods": ["third", "other"], "consistency": "third", "text": "third"}
        for vote in made_votes(3, 2, 1.0)
    ]
    lines = outcome.preferences(votes, "ours")
    assert {line["than"] for line in lines} == {"other"} and all(line["votes"] == 6 for line in lines)
    assert {line["than"] for line in outcome.preferences(votes, "other")} == {"ours", "third"}


def test_ctrl_c_ends_the_page_while_a_video_is_loading(page: Page, tmp_path: Path) -> None:
    name = uuid.uuid4().hex
    pair = json.loads(page.get(f"/next?voter={name}"))["pair"]
    for file in tmp_path.glob("*.mp4"):
        file.write_bytes(bytes(2**24))
    with socket.create_connection(("127.0.0.1", page.port)) as loading:
        loading.sendall(f"GET /video/{name}/{pair}/left.mp4 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert loading.recv(100).startswith(b"HTTP/1.1 200")
        page.process.send_signal(signal.SIGINT)
        started = time.monotonic()
        page.process.wait(timeout=30)
    assert time.monotonic() - started < 10


def made_votes(voters: int, pairs: int, share: float, seed: int = 0) -> list[dict[str, Any]]:
    generator = np.random.default_rng(seed)
    return [
        {
            "id": f"{v}-{p}",
            "voter": f"v{v}",
            "pair": f"p{p}",
            "methods": ["ours", "other"],
            "consistency": "ours" if generator.random() < share else "other",
            "text": "ours",
        }
        for v in range(voters)
        for p in range(pairs)
    ]


def test_preferences_have_an_interval_that_holds_the_truth() -> None:
    held = 0
    for seed in range(40):
        consistency, text = outcome.preferences(made_votes(8, 10, 0.7, seed), "ours", seed)
        held += consistency["low"] <= 0.7 <= consistency["high"]
        assert consistency["low"] < consistency["preferred"] < consistency["high"]
    assert held >= 36
    # Votes that are all alike are no proof: Wilson's interval of 80 of 80.
    assert (text["preferred"], text["high"]) == (1, 1) and 0.94 < text["low"] < 0.96
    assert text["agreement"] is None


def test_a_voter_who_fails_catch_trials_is_left_out() -> None:
    votes = made_votes(3, 4, 1.0)
    trial = {"id": "c", "pair": "c", "methods": [BROKEN, "ours"]}
    votes += [{**trial, "voter": "v0", "consistency": "ours", "text": "ours"}]
    votes += [{**trial, "voter": "v1", "consistency": BROKEN, "text": BROKEN}]
    kept, shares = outcome.careful_voters(votes, 0.75)
    assert kept == {"v0", "v2"} and shares == {"v0": 1, "v1": 0, "v2": 1}
    lines = outcome.preferences([vote for vote in votes if vote["voter"] in kept], "ours")
    assert {line["than"] for line in lines} == {"other"} and lines[0]["voters"] == 2


def test_wilsons_interval_of_a_textbook_case() -> None:
    assert outcome.wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_krippendorffs_alpha() -> None:
    # Krippendorff (2011), nominal data of two coders on ten units: 0.095.
    first = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    second = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert outcome.krippendorff_alpha(np.array([first, second], float)) == pytest.approx(0.095, abs=1e-3)
    agreed = np.array([[0, 1, 0, np.nan], [0, 1, 0, 1]])
    assert outcome.krippendorff_alpha(agreed) == pytest.approx(1)
    assert outcome.krippendorff_alpha(np.array([[1.0, np.nan]])) is None


def test_the_result_is_a_table_and_a_picture(tmp_path: Path) -> None:
    from votes import command

    folder = tmp_path / "votes"
    folder.mkdir()
    (folder / "answers.jsonl").write_text("".join(json.dumps(vote) + "\n" for vote in made_votes(5, 6, 0.8)))
    options = {"ours": "ours", "careful": 0.75, "result": True}
    report = command.run(tmp_path, [], tmp_path, **options)
    assert (report["votes"], report["voters"], report["careless_voters"]) == (30, 5, 0)
    assert "| other | text | 100.0% |" in (folder / "result.md").read_text()
    assert (folder / "result.png").read_bytes().startswith(b"\x89PNG")
    assert command.run(tmp_path / "x", [], tmp_path / "x", **options)["votes"] == 0
