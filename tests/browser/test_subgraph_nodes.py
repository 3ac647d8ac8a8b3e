"""The pack's subgraphs in ComfyUI's page: found, run, stopped and unpacked, on the classic canvas and in Nodes 2.0."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
from host_server import HostServer
from page_actions import run, wait_until

import subgraphs
import workflows

pytestmark = [pytest.mark.browser, pytest.mark.host]

EDIT, LEARN, APPLY = subgraphs.SUBGRAPHS
CLIP, EDITED = workflows.DRAWN.prompt, "a green star on the sand, painting style"
DEMO = {
    **{"file": workflows.DRAWN.file, "frame_count": 8, "width": 64, "height": 64},
    **{"clip_sentence": CLIP, "new_sentence": EDITED, "guidance": 5},
}
SEEDS = itertools.count(1)
# Clears the canvas and puts the demo's model there.
EMPTY = """
() => {
    app.graph.clear();
    const model = LiteGraph.createNode("TAV_LoadDemoModel");
    model.pos = [0, 0];
    app.graph.add(model);
    tav.previews = []; tav.ends = [];
}
"""
# Places the newest subgraph beside the last node, connects it and sets its widgets, and those inside by their names.
CONNECT = """
([values, inside]) => {
    const model = app.graph.nodes[0], added = app.graph.nodes.filter(n => n.subgraph);
    const node = added.at(-1);
    node.pos = [400 + 420 * (added.length - 1), 0];
    for (const slot of [0, 1, 2]) model.connect(slot, node, slot);
    for (const widget of node.widgets) if (widget.name in values) widget.value = values[widget.name];
    for (const each of node.subgraph.nodes) for (const widget of each.widgets ?? [])
        if (widget.name in inside && !(widget.name === "steps" && each.type === "TAV_OneShotTune"))
            widget.value = inside[widget.name];
    app.canvas.ds.scale = 0.9;
    app.canvas.ds.offset[0] = 150; app.canvas.ds.offset[1] = 130;
    app.canvas.setDirty(true, true);
    return String(node.id);
}
"""


@pytest.fixture(scope="module", params=[False, True], ids=["classic", "nodes-2"])
def mode(page: Any, server: HostServer, request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        server.get("/global_subgraphs")
    except OSError:
        pytest.skip("this ComfyUI lists no subgraphs")
    browser.use_nodes_2(page, request.param)
    yield "nodes-2" if request.param else "classic"


def add(page: Any, name: str, **values: Any) -> str:
    """Find a subgraph as a person does and add it. Returns its node's id."""
    page.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.wait_for_timeout(800)
    page.keyboard.type(name.removesuffix(" (Tune-A-Video)"))
    page.get_by_text(subgraphs.SUBGRAPHS[name].description[:40]).first.wait_for()
    before = page.evaluate("app.graph.nodes.length")
    page.keyboard.press("Enter")
    wait_until(page, "before => app.graph.nodes.length > before", before)
    # The new node follows the pointer until it is put down.
    for step in (0, 20):
        page.mouse.move(900 + step, 700)
        page.wait_for_timeout(300)
    page.mouse.click(920, 700, delay=100)
    wait_until(page, "() => !app.graph.nodes.at(-1).flags.ghost")
    inside = {"learning_rate": 3e-4, "preview_every": 5, "steps": 4, "frame_step": 1, "guidance": 5}
    # Always another value, or the host would reuse its result: a cleared graph numbers its nodes from the start.
    inside["seed"] = next(SEEDS)
    node = page.evaluate(CONNECT, [{**DEMO, **values}, inside])
    page.wait_for_timeout(1000)
    return str(node)


def press_stop(page: Any, node: str, mode: str) -> None:
    if mode == "nodes-2":
        page.locator(f"[data-node-id='{node}']").get_by_role("button", name="Stop and keep").click()
    else:
        page.evaluate("id => { app.graph.getNodeById(id).title = 'node ' + id; }", int(node))
        page.mouse.click(*browser.widget_point(page, f"node {node}", "stop"))


def queued(page: Any) -> dict[str, Any]:
    return page.evaluate("app.graphToPrompt().then(prompt => prompt.output)")


@pytest.mark.parametrize("name", list(subgraphs.SUBGRAPHS))
def test_it_is_found_and_whole(page: Any, mode: str, name: str, shot: Callable[..., None]) -> None:
    page.evaluate(EMPTY)
    add(page, name)
    shown, inner = page.evaluate(
        "(() => { const n = app.graph.nodes.at(-1); return [n.widgets.map(w => [w.name, w.tooltip ?? '']),"
        "n.subgraph.nodes.map(n => [n.type, Boolean(LiteGraph.registered_node_types[n.type])])]; })()"
    )
    described = subgraphs.SUBGRAPHS[name]
    assert [each for each, _ in shown][: len(described.widgets)] == list(described.widgets)
    # Those of the pack's own nodes; a text box shows its name instead.
    assert [each for each, tooltip in shown[: len(described.widgets)] if not tooltip and "sentence" not in each] == []
    assert len(inner) == len(described.nodes) and all(known for _, known in inner)
    assert browser.wrong_widgets(page) == []
    shot(f"{mode}-{name.split()[0].lower()}")


def test_a_video_is_edited_by_one_node(page: Any, mode: str, server: HostServer, shot: Callable[..., None]) -> None:
    page.evaluate(EMPTY)
    node = add(page, EDIT, tuning_steps=30)
    run(page)
    tunes, samples = (f"{node}:{inner}" for inner in inner_ids(page, "TAV_OneShotTune", "TAV_Sample"))
    wait_until(page, "id => tav.previews.some(([n]) => n === id)", tunes)
    wait_until(page, "id => tav.previews.some(([n]) => n === id) || tav.ends.length", samples)
    shot(f"{mode}-edit-running")
    wait_until(page, "() => tav.ends.length")
    assert page.evaluate("tav.ends[0]") == ["execution_success", ""]
    # Nodes 2.0 plays it itself; on the classic canvas the widget of web/js/subgraph.js draws it.
    if mode == "nodes-2":
        wait_until(
            page, "() => [...document.querySelectorAll('video')].some(v => /compared/.test(v.src) && v.videoWidth)"
        )
    else:
        drawn = (
            "() => { const n = app.graph.nodes.at(-1), widgets = n.widgets.filter(w => w.name.startsWith('$$'));"
            # Not the square edit alone: the comparison is wider than high.
            "const seen = widgets.filter(w => w.computedHeight > 50);"
            "return seen.length === 1 && seen[0].computedHeight < 0.75 * n.size[0]; }"
        )
        wait_until(page, drawn)
    page.wait_for_timeout(2000)
    shot(f"{mode}-edit-result")
    assert list((server.output_folder / "TuneAVideo").glob("edit_*.mp4"))


def inner_ids(page: Any, *types: str) -> list[int]:
    ids: list[int] = page.evaluate(
        "types => types.map(t => app.graph.nodes.at(-1).subgraph.nodes.find(n => n.type === t).id)", list(types)
    )
    return ids


def test_a_motion_is_learnt_and_applied(page: Any, mode: str, server: HostServer, shot: Callable[..., None]) -> None:
    page.evaluate(EMPTY)
    name = f"learnt-{mode}"
    add(page, LEARN, tuning_steps=12, filename_prefix=name)
    run(page)
    wait_until(page, "() => tav.ends.length")
    assert page.evaluate("tav.ends[0]") == ["execution_success", ""]
    shot(f"{mode}-learn-result")
    (file,) = server.models_folder("tav").glob(f"{name}_*.safetensors")
    page.evaluate("app.extensionManager.command.execute('Comfy.RefreshNodeDefinitions')")
    page.wait_for_timeout(3000)
    page.evaluate(EMPTY)
    add(page, APPLY, motion=file.name)
    run(page)
    wait_until(page, "() => tav.ends.length")
    assert page.evaluate("tav.ends[0]") == ["execution_success", ""]
    page.wait_for_timeout(2000)
    shot(f"{mode}-apply-result")


@pytest.mark.parametrize("name", list(subgraphs.SUBGRAPHS))
def test_unpacked_it_queues_the_graph_of_its_template(
    page: Any, mode: str, name: str, shot: Callable[..., None]
) -> None:
    page.evaluate(EMPTY)
    node = add(page, name)
    packed = {key.removeprefix(f"{node}:"): each for key, each in queued(page).items()}
    page.evaluate("() => app.canvas.selectNode(app.graph.nodes.find(n => n.subgraph))")
    page.evaluate("app.extensionManager.command.execute('Comfy.Graph.UnpackSubgraph')")
    wait_until(page, "() => !app.graph.nodes.some(n => n.subgraph)")
    page.wait_for_timeout(1500)
    assert plain(queued(page)) == plain(packed)
    described = subgraphs.SUBGRAPHS[name]
    template = json.loads((workflows.API_FOLDER / f"{described.template}.json").read_text(encoding="utf-8"))
    kinds = sorted(each["class_type"] for key, each in template.items() if int(key) in described.nodes)
    assert sorted(each["class_type"] for each in queued(page).values()) == sorted([*kinds, "TAV_LoadDemoModel"])
    page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(2000)
    shot(f"{mode}-{name.split()[0].lower()}-unpacked")


def plain(graph: dict[str, Any]) -> list[str]:
    """A graph without its ids: each node with its values, and what its links come from."""

    def source(value: Any) -> Any:
        return [graph[value[0].rpartition(":")[2]]["class_type"], value[1]] if isinstance(value, list) else value

    def values(inputs: dict[str, Any]) -> dict[str, Any]:
        # The page adds the player of a clip to what it queues.
        return {name: source(value) for name, value in sorted(inputs.items()) if name != "video-preview"}

    return sorted(json.dumps([each["class_type"], values(each["inputs"])]) for each in graph.values())


def test_of_two_tunings_the_right_one_stops(
    page: Any, mode: str, server: HostServer, shot: Callable[..., None]
) -> None:
    page.evaluate(EMPTY)
    endless = {"tuning_steps": 99_999}
    nodes = [add(page, LEARN, **endless, filename_prefix=f"{mode}-{place}") for place in ("left", "right")]
    assert len(set(nodes)) == 2
    run(page)
    wait_until(page, "() => tav.previews.length")
    first = page.evaluate("tav.previews[0][0].split(':')[0]")
    second = next(node for node in nodes if node != first)
    press_stop(page, second, mode)
    page.get_by_text("This node is not tuning now").first.wait_for()
    press_stop(page, first, mode)
    page.get_by_text("its weights are kept").first.wait_for()
    shot(f"{mode}-stopped")
    wait_until(page, "node => tav.previews.some(([id]) => id.startsWith(node + ':'))", second)
    assert page.evaluate("tav.ends.length") == 0
    press_stop(page, second, mode)
    wait_until(page, "() => tav.ends.length")
    assert page.evaluate("tav.ends[0]") == ["execution_success", ""]
    for place in ("left", "right"):
        assert list(server.models_folder("tav").glob(f"{mode}-{place}_*.safetensors"))


def test_a_tuning_is_stopped_by_its_button_inside(page: Any, mode: str, shot: Callable[..., None]) -> None:
    page.evaluate(EMPTY)
    node = add(page, LEARN, tuning_steps=99_999, filename_prefix=f"{mode}-inside")
    page.evaluate("() => app.canvas.openSubgraph(app.graph.nodes.at(-1).subgraph, app.graph.nodes.at(-1))")
    page.wait_for_timeout(2000)
    run(page)
    wait_until(page, "node => tav.previews.some(([id]) => id.startsWith(node + ':'))", node)
    tune = page.evaluate("app.canvas.graph.nodes.find(n => n.type === 'TAV_OneShotTune').id")
    if mode == "nodes-2":
        page.locator(f"[data-node-id='{tune}']").get_by_role("button", name="Stop and keep").click()
    else:
        page.mouse.click(*browser.widget_point(page, "TAV_OneShotTune", "stop"))
    page.get_by_text("its weights are kept").first.wait_for()
    shot(f"{mode}-stopped-inside")
    wait_until(page, "() => tav.ends.length")
    assert page.evaluate("tav.ends[0]") == ["execution_success", ""]
    page.evaluate("() => app.canvas.setGraph(app.graph)")


def test_a_clip_is_uploaded_to_the_one_node(
    page: Any, mode: str, server: HostServer, tmp_path: Path, shot: Callable[..., None]
) -> None:
    page.evaluate(EMPTY)
    node = add(page, EDIT)
    clip = tmp_path / f"{mode}-clip.mp4"
    shutil.copy(workflows.ROOT / "demo" / workflows.DRAWN.file, clip)
    if mode == "nodes-2":
        page.locator(f"[data-node-id='{node}'] input[type=file]").first.set_input_files(clip)
    else:
        choosers: list[Any] = []
        page.on("filechooser", lambda chooser: choosers.append(chooser))
        page.mouse.click(*browser.widget_point(page, EDIT, "upload"))
        page.wait_for_timeout(3000)
        choosers[0].set_files(clip)
    wait_until(page, "name => app.graph.nodes.at(-1).widgets.find(w => w.name === 'file').value === name", clip.name)
    assert (server.input_folder / clip.name).read_bytes() == clip.read_bytes()
    assert [each["inputs"]["file"] for each in queued(page).values() if "file" in each["inputs"]] == [clip.name]
    if mode != "nodes-2":  # there the page uploads by itself
        assert page.evaluate("name => app.graph.nodes.at(-1).widgets.find(w => w.name === 'file').options.values"
                             ".includes(name)", clip.name)  # fmt: skip
    page.evaluate("() => app.canvas.openSubgraph(app.graph.nodes.at(-1).subgraph, app.graph.nodes.at(-1))")
    seen = "name => [...document.querySelectorAll('video')].some(v => v.src.includes(name) && v.videoWidth)"
    wait_until(page, seen, clip.name)
    page.wait_for_timeout(2000)
    shot(f"{mode}-uploaded")
    page.evaluate("() => app.canvas.setGraph(app.graph)")
