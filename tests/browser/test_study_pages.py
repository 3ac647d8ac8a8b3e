"""The page of a study, from the disk, and the page of votes, wide and on a phone, in a Chromium.

Pictures of what was seen go to a folder with `--screens FOLDER`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import browser
import numpy as np
import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "bench"), str(ROOT / "demo")]

from dataset import jobs, layouts, page, results, scoring, sources  # noqa: E402
from votes.answers import read_votes  # noqa: E402

pytestmark = pytest.mark.browser

SIZES = {"wide": (1280, 900), "phone": (390, 844)}
SERVER = """
import sys
sys.path[:] = {path!r}
import engine
engine.load_engine(engine.find_comfyui())
engine.load_pack()
from pathlib import Path
from votes import command
options = dict(ours="tune-a-video", also=[], catch=1, careful=0.75, address="127.0.0.1", port={port}, result=False)
command.run(Path({set!r}), [], Path({output!r}), **options)
"""


@pytest.fixture
def screens(pytestconfig: pytest.Config) -> Path | None:
    """Return the folder for pictures, made if it is not there."""
    folder: Path | None = pytestconfig.option.screens
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def pages() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=browser.executable(),
            args=["--no-sandbox", "--autoplay-policy=no-user-gesture-required"],
        )

        def opened(size: str, address: str) -> Page:
            width, height = SIZES[size]
            context = chromium.new_context(viewport={"width": width, "height": height}, has_touch=size == "phone")
            shown = context.new_page()
            shown.goto(address)
            return shown

        yield opened
        chromium.close()


@pytest.fixture
def study(tmp_path: Path) -> tuple[Path, list[layouts.Row]]:
    """A clip with two edits, each by two methods."""
    clip = np.zeros((6, 64, 64, 3), np.uint8)
    for number, frame in enumerate(clip):
        frame[20:40, 5 + 6 * number : 25 + 6 * number] = (200, 60, 60)
    results.write_frames(tmp_path / "set" / "dog", clip, ".png")
    (tmp_path / "set" / "edits.csv").write_text(
        "video,source,edit,kind\ndog,a dog,a cat,object\ndog,a dog,a fox,style\n"
    )
    rows, output = layouts.read_dataset(tmp_path / "set").rows, tmp_path / "out"
    for row in rows:
        sources.keep(output, row, 0, (64, 64))
        for method, change in ((jobs.TUNED, clip[..., ::-1]), (jobs.FRAME_BY_FRAME, 255 - clip)):
            results.write_frames(results.edit_folder(output, method, row), change)
    return output, rows


@pytest.mark.parametrize("size", SIZES)
def test_the_page_of_a_study_opens_from_the_disk_and_plays(
    study: tuple[Path, list[layouts.Row]], pages: Any, size: str, screens: Path | None
) -> None:
    output, rows = study
    systems = {method: output / "results" / method for method in (jobs.TUNED, jobs.FRAME_BY_FRAME)}
    scored, _ = scoring.score_all(output, systems, rows, None, lambda line: None)
    shown = pages(size, page.write(output, systems, rows, scored).as_uri())
    shown.wait_for_function("[...document.querySelectorAll('video')].every(video => video.videoWidth > 0)")
    assert shown.locator("video").count() == 2 and shown.get_by_text("a fox").count() == 1
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
    first = shown.locator("video").first
    first.scroll_into_view_if_needed()
    shown.wait_for_function("document.querySelector('video').currentTime > 0")
    # Nothing lies over the frames until somebody points at them.
    assert not first.evaluate("video => video.controls")
    if screens:
        shown.screenshot(path=screens / f"study-{size}.png", full_page=True)
    first.hover()
    assert first.evaluate("video => video.controls")
    shown.set_viewport_size({"width": 390, "height": 200})
    shown.evaluate("scrollTo(0, 0)")
    shown.wait_for_function("document.querySelector('video').paused")


@pytest.fixture
def votes(study: tuple[Path, list[layouts.Row]], free_port: int) -> Iterator[tuple[str, Path]]:
    output, _ = study
    script = SERVER.format(path=sys.path, set=str(output.parent / "set"), output=str(output), port=free_port)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "3 pairs, 1 of them catch" in process.stdout.readline()
    process.stdout.readline()
    yield f"http://127.0.0.1:{free_port}/", output / "votes" / "answers.jsonl"
    process.kill()
    process.wait()


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("size", SIZES)
def test_a_person_votes_reloads_and_opens_a_second_tab(
    votes: tuple[str, Path], pages: Any, size: str, screens: Path | None
) -> None:
    address, answers = votes
    shown = pages(size, address)
    shown.wait_for_selector("form:not([hidden])")
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # The questions can be answered while the videos play: all is in sight at once.
    shown.wait_for_function("document.querySelector('#left').videoWidth > 0")
    assert shown.evaluate("document.querySelector('button').getBoundingClientRect().bottom <= innerHeight")
    assert shown.locator("button").is_disabled()
    shown.wait_for_function("[...document.querySelectorAll('video')].every(video => video.currentTime > 0)")
    if screens:
        shown.screenshot(path=screens / f"votes-{size}.png", full_page=True)
    choose(shown, "left", "right")
    sentence = shown.locator("#sentence").inner_text()
    shown.reload()  # the choice is gone, the pair is the same, nothing was counted
    shown.wait_for_selector("form:not([hidden])")
    assert shown.locator("#sentence").inner_text() == sentence and answers.read_bytes() == b""
    # A second tab of the same browser shows the same pair; what both send counts once.
    second = shown.context.new_page()
    second.goto(address)
    second.wait_for_selector("form:not([hidden])")
    for tab in (shown, second):
        choose(tab, "left", "right")
        tab.locator("button").click()
        tab.wait_for_function("document.querySelector('#state').textContent.startsWith('1 of 3')")
    assert len(read_votes(answers)[0]) == 1
    for number in (2, 3):
        choose(shown, "right", "right")
        shown.locator("button").click()
        shown.wait_for_function(f"document.querySelector('#state').textContent.startsWith('{number} of 3')")
    assert "That was all" in shown.locator("#sentence").inner_text()
    found, _ = read_votes(answers)
    assert len(found) == 3 and len({vote["pair"] for vote in found}) == 3


def choose(shown: Page, consistency: str, text: str) -> None:
    """Press one answer to each question, as a person does: on its label."""
    for name, side in (("consistency", consistency), ("text", text)):
        shown.locator(f"label:has(input[name={name}][value={side}])").click()
