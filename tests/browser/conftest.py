"""ComfyUI's page with the pack, for the tests that use it as a person does."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
from host_server import HostServer, host_version

import workflows

ROOT = Path(__file__).resolve().parents[2]
# Elements that cover the graph; hidden in screenshots.
UNSEEN = ".minimap-main-container, .workflow-tabs-container { display: none !important }"


@pytest.fixture(scope="module")
def server(comfyui: Path | None, exercised: list[str]) -> Iterator[HostServer]:
    assert comfyui is not None
    base = Path(tempfile.mkdtemp(prefix="tune-a-video-browser-"))
    try:
        workflows.write_stand_ins(base)
        arguments = ["--preview-method", "latent2rgb"]
        with HostServer(comfyui, base, {workflows.PACK: ROOT}, arguments=arguments, start_timeout=900) as running:
            exercised.append(f"browser tests: the page of ComfyUI {host_version(comfyui)}")
            yield running
    finally:
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture(scope="module")
def complaints() -> list[str]:
    """The page's console messages, and addresses that were not found."""
    return []


@pytest.fixture(scope="module")
def page(server: HostServer, complaints: list[str]) -> Iterator[Any]:
    with browser.open_page(server.port) as opened:
        opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.on(
            "response",
            lambda answer: complaints.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None,
        )
        yield opened


@pytest.fixture
def shot(page: Any, pytestconfig: pytest.Config) -> Callable[..., None]:
    """Keeps a picture of the page, where pictures are asked for."""
    folder = pytestconfig.option.screens

    def take(name: str) -> None:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            page.add_style_tag(content=UNSEEN)
            page.screenshot(path=folder / f"{name}.jpg", type="jpeg", quality=80, timeout=browser.TIMEOUT)

    return take
