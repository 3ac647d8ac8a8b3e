"""Draw workflows in ComfyUI's own front end, for its template browser: NAME.jpg beside NAME.json.

Only those of which `tools/workflow_runs.py` has no result to show, unless they are named.

    python tools/template_pictures.py [--comfyui PATH] [--browser PATH] [NAME ...]

Needs playwright (`pip install playwright`) and a Chromium.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import browser
import engine
from host_server import HostServer
from PIL import Image
from workflow_runs import SENTENCES

import workflows

if TYPE_CHECKING:
    from playwright.sync_api import Page

VIEW = (2400, 1350)
PICTURE = (1200, 675)
# Menus and side bars lie over the canvas.
HIDDEN = """
.comfyui-body-top, .comfyui-body-bottom, .comfyui-body-left, .comfyui-body-right, .side-tool-bar-container,
.p-toast, .graph-canvas-panel .p-buttongroup, .comfyui-menu, .actionbar, .p-dialog-mask, .minimap-main-container,
.selection-toolbox, .workflow-tabs-container { display: none !important }
"""
FIT = """
graph => {
    const boxes = graph.nodes.map(n => [n.pos[0], n.pos[1] - 30, n.pos[0] + n.size[0], n.pos[1] + n.size[1]]);
    for (const {bounding: [x, y, w, h]} of graph.groups) boxes.push([x, y, x + w, y + h]);
    const left = Math.min(...boxes.map(b => b[0])) - 40, top = Math.min(...boxes.map(b => b[1])) - 40;
    const right = Math.max(...boxes.map(b => b[2])) + 40, bottom = Math.max(...boxes.map(b => b[3])) + 40;
    const {clientWidth, clientHeight} = app.canvas.canvas;
    const view = app.canvas.ds;
    view.scale = Math.min(clientWidth / (right - left), clientHeight / (bottom - top));
    view.offset[0] = (clientWidth / view.scale - right - left) / 2;
    view.offset[1] = (clientHeight / view.scale - bottom - top) / 2;
    app.canvas.setDirty(true, true);
    return app.graph.nodes.filter(n => n.has_errors || !LiteGraph.registered_node_types[n.type]).map(n => n.type);
}
"""


def picture(page: Page, name: str) -> Image.Image:
    """Draw the whole workflow. Raises RuntimeError if the front end does not know one of its nodes."""
    graph = json.loads((workflows.FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    page.evaluate("graph => app.loadGraphData(graph)", graph)
    page.wait_for_timeout(1500)
    unknown = page.evaluate(FIT, graph)
    if unknown:
        raise RuntimeError(f"{name}: the front end does not know {', '.join(unknown)}")
    page.add_style_tag(content=HIDDEN)
    page.wait_for_timeout(1500)
    shot = Image.open(io.BytesIO(page.screenshot(timeout=120_000)))
    return shot.convert("RGB").resize(PICTURE, Image.Resampling.LANCZOS)


def main() -> None:
    """Write workflows/*.jpg."""
    parser = argparse.ArgumentParser(description="Draw the pack's workflows in ComfyUI's own front end.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: those without a result")
    parser.add_argument("--comfyui", metavar="PATH", help="default: $COMFYUI_PATH, else ~/comfy/ComfyUI")
    parser.add_argument("--browser", metavar="PATH", help="default: the Chromium on the PATH")
    options = parser.parse_args()
    comfyui = engine.find_comfyui(options.comfyui)
    if comfyui is None:
        parser.error("no ComfyUI at $COMFYUI_PATH or ~/comfy/ComfyUI; give one with --comfyui")
    with tempfile.TemporaryDirectory() as base:
        workflows.write_stand_ins(Path(base))
        draw(options, comfyui, Path(base))


def draw(options: argparse.Namespace, comfyui: Path, base: Path) -> None:
    """Write the pictures of the named workflows, with a host whose base directory this is."""
    with (
        HostServer(comfyui, base, {workflows.PACK: workflows.ROOT}) as server,
        browser.open_page(server.port, *VIEW, path=options.browser) as page,
    ):
        for name in options.names or [name for name in workflows.WORKFLOWS if name not in SENTENCES]:
            picture(page, name).save(workflows.FOLDER / f"{name}.jpg", quality=85, optimize=True)
            print(name, flush=True)


if __name__ == "__main__":
    main()
