"""Drive ComfyUI's page in a headless Chromium with playwright, for tests and for pictures of the nodes.

playwright (PyPI) and a Chromium (Debian's `chromium`) are optional; `why_absent` names what is missing.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Page

# Milliseconds; a page loads slowly on a busy machine.
TIMEOUT = 300_000
_READY = "Boolean(window.app?.graph && app.canvas && window.LiteGraph?.registered_node_types.TAV_Sample)"
# Records the previews and ends that the server announces to the page.
_WATCH = """
() => {
    window.tav = {previews: [], ends: []};
    app.api.addEventListener("b_preview_with_metadata", async ({detail}) => {
        const bytes = new Uint8Array(await detail.blob.arrayBuffer());
        let sum = bytes.length;
        for (const byte of bytes) sum = (sum * 31 + byte) >>> 0;
        tav.previews.push([String(detail.nodeId), sum]);
    });
    for (const end of ["execution_success", "execution_error", "execution_interrupted"])
        app.api.addEventListener(end, ({detail}) => tav.ends.push([end, detail?.exception_message ?? ""]));
}
"""


def executable() -> str | None:
    """Return the first Chromium on the PATH."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def why_absent() -> str | None:
    """Name what a browser test lacks here; None if it lacks nothing."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed (pip install playwright)"
    return None if executable() else "no chromium on the PATH"


@contextmanager
def open_page(port: int, width: int = 1600, height: int = 900, path: str | None = None) -> Iterator[Page]:
    """Open the page of a host on this machine, and wait until its nodes are known and no dialog is open."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path or executable(), args=["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        )
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(TIMEOUT)
        page.goto(f"http://127.0.0.1:{port}", timeout=TIMEOUT)
        _settle(page)
        yield page
        browser.close()


def _settle(page: Page) -> None:
    page.wait_for_function(_READY, timeout=TIMEOUT)
    page.evaluate(_WATCH)
    page.wait_for_timeout(3000)
    close_dialogs(page)


def use_nodes_2(page: Page, used: bool) -> None:
    """Switch between the classic canvas and Nodes 2.0, and load the page again."""
    page.evaluate("used => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', used)", used)
    page.reload(timeout=TIMEOUT)
    _settle(page)
    assert page.evaluate("LiteGraph.vueNodesMode === true") == used


def close_dialogs(page: Page) -> None:
    """Close the template browser, with which a host greets a new user."""
    for _ in range(3):
        if page.locator("[role=dialog]").count() == 0:
            return
        page.keyboard.press("Escape")
        page.wait_for_timeout(1000)


def widget_point(page: Page, node_type: str, widget: str) -> tuple[float, float]:
    """Bring the first node of a type or title into view and return the middle of one of its widgets, in page pixels."""
    page.evaluate(
        "type => { const node = app.canvas.graph.nodes.find(n => [n.type, n.title].includes(type));"
        "app.canvas.ds.scale = 1; app.canvas.centerOnNode(node); app.canvas.setDirty(true, true); }",
        node_type,
    )
    page.wait_for_timeout(1500)
    x, y = page.evaluate(
        "([type, name]) => { const node = app.canvas.graph.nodes.find(n => [n.type, n.title].includes(type));"
        "const widget = node.widgets.find(w => w.name === name), {scale, offset} = app.canvas.ds;"
        "const box = app.canvas.canvas.getBoundingClientRect();"
        "const y = widget.last_y ?? widget.y;"
        "return [(node.pos[0] + node.size[0] / 2 + offset[0]) * scale + box.left,"
        "(node.pos[1] + y + 10 + offset[1]) * scale + box.top]; }",
        [node_type, widget],
    )
    return float(x), float(y)


def wrong_widgets(page: Page) -> list[Any]:
    """List the graph's nodes that the page does not know or marks as wrong, and choices that do not exist."""
    found: list[Any] = page.evaluate(
        """
        () => app.graph.nodes.flatMap(node => {
            if (!LiteGraph.registered_node_types[node.type]) return [[node.type, "unknown"]];
            if (node.has_errors) return [[node.type, "marked as wrong"]];
            return (node.widgets ?? []).flatMap(widget => {
                const given = widget.options?.values;
                const choices = typeof given === "function" ? given(widget, node) : given;
                const wrong = widget.type === "combo" && Array.isArray(choices) && !choices.includes(widget.value);
                return wrong ? [[node.type, widget.name, widget.value]] : [];
            });
        })
        """
    )
    return found
