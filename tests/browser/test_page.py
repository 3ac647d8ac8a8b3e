"""The pack in ComfyUI's own page, as a person uses it: templates, a run with its previews, help, cancel, stop, upload.

Pictures of what was seen go to a folder with `--screens FOLDER`.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import browser
import pytest
from host_server import HostServer
from page_actions import cancel, node_id, run, set_widgets, wait_until

import workflows

pytestmark = [pytest.mark.browser, pytest.mark.host]

ROOT = Path(__file__).resolve().parents[2]
DEMO = "tune-a-video-demo-model"
# The page asks for a help page in its language first, and takes the plain one where there is none.
EXPECTED = re.compile(r"^404 \S+/docs/TAV_\w+/[\w-]+\.md$")


def load_demo(page: Any, name: str = DEMO) -> None:
    graph = json.loads((workflows.FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    page.evaluate("graph => app.loadGraphData(graph)", graph)
    wait_until(page, "() => app.graph.nodes.some(n => n.type === 'TAV_OneShotTune')")
    page.evaluate("() => { tav.previews = []; tav.ends = []; }")


def test_templates_open_from_the_template_browser(page: Any, shot: Callable[..., None]) -> None:
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_text(workflows.PACK, exact=True).last.click()
    card = page.locator(f"[data-testid=template-workflow-{DEMO}]")
    card.wait_for()
    page.wait_for_timeout(2000)
    shot("templates")
    card.click()
    wait_until(page, "() => app.graph.nodes.some(n => n.type === 'TAV_LoadDemoModel')")
    assert page.evaluate("app.graph.nodes.length") > 10
    assert browser.wrong_widgets(page) == []


@pytest.mark.parametrize("name", list(workflows.WORKFLOWS))
def test_no_template_misses_a_node_or_a_choice(page: Any, name: str) -> None:
    """As the template browser loads it; its files are those of the tests by name."""
    count = page.evaluate(
        "async address => { const graph = await (await fetch(address)).json(); await app.loadGraphData(graph);"
        "return graph.nodes.length; }",
        f"/api/workflow_templates/{workflows.PACK}/{name}.json",
    )
    wait_until(page, "count => app.graph.nodes.length === count", count)
    assert browser.wrong_widgets(page) == []


def test_the_demo_graph_runs_and_shows_what_it_does(
    page: Any, server: HostServer, shot: Callable[..., None], pytestconfig: pytest.Config
) -> None:
    load_demo(page)
    pretty = pytestconfig.option.screens is not None
    if pretty:
        set_widgets(page, {"preview_every": 10}, "TAV_OneShotTune")
    else:
        set_widgets(page, {"steps": 4})
        set_widgets(page, {"steps": 12, "preview_every": 5}, "TAV_OneShotTune")
    tune, sample = node_id(page, "TAV_OneShotTune"), node_id(page, "TAV_Sample")
    run(page)
    # The first pictures are the curve alone, then come the frames below it: pictures that take turns.
    moving = "([id, count]) => new Set(tav.previews.filter(([n]) => n === id).map(([, sum]) => sum)).size >= count"
    wait_until(page, moving, [tune, 20 if pretty else 3])
    page.wait_for_timeout(2000 if pretty else 0)
    shot("tuning")
    wait_until(page, moving, [sample, 4])
    shot("sampling")
    wait_until(page, "() => tav.ends.length")
    assert page.evaluate("tav.ends[0]") == ["execution_success", ""]
    played = (
        "async () => { const video = [...document.querySelectorAll('video')].find(v => /output/.test(v.src));"
        "if (!video) return false; video.muted = true; await video.play(); return video.currentTime > 0.2; }"
    )
    wait_until(page, played)
    compared = "() => [...document.querySelectorAll('video')].some(v => /compared/.test(v.src) && v.videoWidth > 0)"
    wait_until(page, compared)
    page.evaluate("document.querySelectorAll('video').forEach(v => v.pause())")
    page.wait_for_timeout(1000)
    shot("result")


def test_a_nodes_help_opens(page: Any, shot: Callable[..., None]) -> None:
    page.evaluate(
        "() => { const node = app.graph.nodes.find(n => n.type === 'TAV_OneShotTune'); app.canvas.selectNode(node);"
        "app.canvas.setDirty(true, true); }"
    )
    # The bar above a node sways with the canvas; a person hits its button all the same.
    page.locator("[data-testid=info-button]").first.dispatch_event("click")
    page.get_by_text("What goes wrong").first.wait_for()
    page.wait_for_timeout(1000)
    shot("help")


def test_a_tuning_is_cancelled_and_queued_again_and_stopped_by_its_button(
    page: Any, server: HostServer, shot: Callable[..., None]
) -> None:
    load_demo(page)
    set_widgets(page, {"steps": 4})
    set_widgets(page, {"steps": 99_999, "preview_every": 0, "seed": int(time.time())}, "TAV_OneShotTune")
    tune = node_id(page, "TAV_OneShotTune")
    seen = "id => tav.previews.some(([n]) => n === id)"
    run(page)
    wait_until(page, seen, tune)
    cancel(page)
    wait_until(page, "() => tav.ends.length")
    assert page.evaluate("tav.ends[0][0]") == "execution_interrupted"
    page.evaluate("() => { tav.previews = []; tav.ends = []; }")
    run(page)
    wait_until(page, seen, tune)
    assert "resumes after step" in server.log()
    page.mouse.click(*browser.widget_point(page, "TAV_OneShotTune", "stop"))
    page.get_by_text("its weights are kept").first.wait_for()
    shot("stopped")
    wait_until(page, "() => tav.ends.length")
    assert page.evaluate("tav.ends[0]") == ["execution_success", ""]


def test_dates_and_widgets_are_put_into_file_names(page: Any) -> None:
    """As the page does for ComfyUI's own nodes; what is kept in the workflow stays as it was typed."""
    load_demo(page, "tune-a-video-compare")
    typed = "tav/%date:yyyy%-%Tune.seed%-of-%CheckpointLoaderSimple.ckpt_name%"
    page.evaluate(
        "() => { app.graph.nodes.find(n => n.type === 'TAV_OneShotTune').properties['Node name for S&R'] = 'Tune'; }"
    )
    set_widgets(page, {"filename_prefix": typed}, "TAV_SaveMotion")
    queued = page.evaluate("async () => await app.graphToPrompt()")
    (saving,) = [node for node in queued["output"].values() if node["class_type"] == "TAV_SaveMotion"]
    name = saving["inputs"]["filename_prefix"]
    assert re.fullmatch(rf"tav/20\d\d-0-of-{re.escape(workflows.CHECKPOINT)}", name), name
    (kept,) = [node for node in queued["workflow"]["nodes"] if node["type"] == "TAV_SaveMotion"]
    assert typed in kept["widgets_values"]


def test_a_clip_is_uploaded_by_load_videos_button(page: Any, server: HostServer, tmp_path: Path) -> None:
    load_demo(page, "tune-a-video-step-by-step")
    clip = tmp_path / "my clip.mp4"
    shutil.copy(ROOT / "demo" / workflows.DRAWN.file, clip)
    button = page.evaluate(
        "() => app.graph.nodes.find(n => n.type === 'TAV_LoadVideo').widgets.find(w => w.type === 'button').name"
    )
    loading = "app.graph.nodes.find(n => n.type === 'TAV_LoadVideo')"
    page.evaluate(
        f"() => {{ tav.changed = []; {loading}.onWidgetChanged = (...each) => tav.changed.push(each.slice(0, 2)); }}"
    )
    choosers: list[Any] = []
    page.on("filechooser", lambda chooser: choosers.append(chooser))
    for _ in range(4):
        # Where the page moves its graph between the look and the click, a person clicks again.
        page.mouse.click(*browser.widget_point(page, "TAV_LoadVideo", button))
        page.wait_for_timeout(5000)
        if choosers:
            break
    choosers[0].set_files(clip)
    value = "() => app.graph.nodes.find(n => n.type === 'TAV_LoadVideo').widgets.find(w => w.name === 'file').value"
    wait_until(page, f"() => ({value})() === 'my clip.mp4'")
    assert (server.input_folder / "my clip.mp4").read_bytes() == clip.read_bytes()
    # The change clears the page's message about a missing clip. The player must not be queued as an input.
    wait_until(page, f"() => {loading}.widgets.some(w => w.name === 'video-preview')")
    assert ["file", "my clip.mp4"] in page.evaluate("tav.changed")
    queued = page.evaluate("app.graphToPrompt().then(prompt => prompt.output)")
    (inputs,) = [node["inputs"] for node in queued.values() if node["class_type"] == "TAV_LoadVideo"]
    assert "video-preview" not in inputs and inputs["file"] == "my clip.mp4"


def test_the_page_had_nothing_to_complain_of(page: Any, complaints: list[str]) -> None:
    """Errors on the console that name the pack, and files of the pack that were not found."""
    ours = [text for text in complaints if re.search(r"tav_|tune-a-video", text, re.I) and not EXPECTED.match(text)]
    assert ours == []
