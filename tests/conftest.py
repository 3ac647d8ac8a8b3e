"""Loads the engine and this pack for all tests, and says at the end what was exercised and what was not."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

# Threads that wait by spinning slow each other down when the tests' and the host's meet on a few cores. Read when
# torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Workers of pytest-xdist, and the hosts that they start, share the cores.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import browser  # noqa: E402
import engine  # noqa: E402
import pytest  # noqa: E402
import real_packs  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
COMFYUI = pytest.StashKey[Path | None]()
ENGINE = pytest.StashKey[str]()
BASE_DIRECTORY = pytest.StashKey[Path]()
EXERCISED = pytest.StashKey[list[str]]()
NOT_RUN = pytest.StashKey[Counter[str]]()
# Marker -> what its tests are, in the closing section.
SUBJECTS = {
    "host": "tests on a running host",
    "comfyui": "tests on ComfyUI's own modules",
    "browser": "tests in a browser",
    "reference": "tests on reference files",
    "shared": "tests on the shared clips",
    "ray": "tests on a Ray cluster",
    "packs": "tests beside other packs",
}

# Before pytest_configure, because conftest files further down may import the pack at their top.
engine.load_pack()


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    group = parser.getgroup("Tune-A-Video")
    # Before it knows the option, pytest takes the PATH of `--comfyui PATH` for a folder of tests, and would load
    # the tests/conftest.py of ComfyUI itself.
    for option, value in zip(sys.argv, sys.argv[1:], strict=False):
        if option == "--comfyui":
            pluginmanager.set_blocked(str(Path(value).expanduser().resolve() / "tests" / "conftest.py"))
    group.addoption("--comfyui", metavar="PATH", help="default: $COMFYUI_PATH, else ~/comfy/ComfyUI")
    group.addoption("--engine", choices=["auto", "pypi"], default="auto", help="pypi: ignore any ComfyUI")
    group.addoption("--screens", metavar="FOLDER", type=Path, help="where browser tests keep pictures of the page")
    group.addoption(
        "--reference",
        metavar="PATH",
        type=Path,
        action="append",
        help="a reference .safetensors with its .json beside it, repeatable (default: ../shared/reference/*)",
    )


def pytest_configure(config: pytest.Config) -> None:
    try:
        comfyui = None if config.option.engine == "pypi" else engine.find_comfyui(config.option.comfyui)
        config.stash[BASE_DIRECTORY] = Path(tempfile.mkdtemp(prefix="tune-a-video-"))
        config.stash[ENGINE] = engine.load_engine(comfyui, config.stash[BASE_DIRECTORY])
    except FileNotFoundError as error:
        raise pytest.UsageError(str(error)) from error
    if config.option.reference is None:
        config.option.reference = sorted((SHARED / "reference").glob("*.safetensors"))
    for path in config.option.reference:
        if not path.is_file():
            raise pytest.UsageError(f"--reference {path}: no such file")
    config.stash[COMFYUI] = comfyui
    config.stash[EXERCISED] = []
    config.stash[NOT_RUN] = Counter()


def pytest_unconfigure(config: pytest.Config) -> None:
    if BASE_DIRECTORY in config.stash:
        shutil.rmtree(config.stash[BASE_DIRECTORY], ignore_errors=True)


def _absent(config: pytest.Config) -> dict[str, str]:
    """Marker -> why tests that carry it cannot run."""
    absent = {}
    if config.stash[COMFYUI] is None:
        why = "no ComfyUI at $COMFYUI_PATH or ~/comfy/ComfyUI"
        absent["host"] = absent["comfyui"] = "--engine pypi" if config.option.engine == "pypi" else why
    if no_browser := browser.why_absent():
        absent["browser"] = no_browser
    if no_packs := real_packs.why_absent():
        absent["packs"] = no_packs
    if importlib.util.find_spec("ray") is None:
        absent["ray"] = "Ray is not installed (pip install ray)"
    if not config.option.reference:
        absent["reference"] = f"no --reference, and no file in {SHARED / 'reference'}"
    if not _shared_videos():
        absent["shared"] = f"no clips in {SHARED / 'videos'}"
    return absent


def _shared_videos() -> list[Path]:
    return sorted((SHARED / "videos").glob("*.mp4"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "reference" in getattr(item, "fixturenames", ()):
            item.add_marker("reference")
    absent = _absent(config)
    dropped = [item for item in items if any(item.get_closest_marker(marker) for marker in absent)]
    for item in dropped:
        marker = next(marker for marker in absent if item.get_closest_marker(marker))
        config.stash[NOT_RUN][marker] += 1
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (told := getattr(session.config, "workeroutput", None)) is not None:
        told["exercised"] = session.config.stash[EXERCISED]
        told["not_run"] = dict(session.config.stash[NOT_RUN])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take over what a worker of pytest-xdist tells at its end. One that has crashed tells nothing."""
    stash, told = node.config.stash, getattr(node, "workeroutput", {})
    stash[EXERCISED] += [line for line in told.get("exercised", []) if line not in stash[EXERCISED]]
    stash[NOT_RUN] |= Counter(told.get("not_run", {}))  # each worker collects all tests


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    ran = Counter(
        marker
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        for marker in SUBJECTS
        if report.when == "call" and marker in report.keywords
    )
    absent = _absent(config)
    terminalreporter.section("what was exercised")
    terminalreporter.line(f"engine: {config.stash[ENGINE]}")
    for marker, subject in SUBJECTS.items():
        if marker in absent:
            result = f"NOT RUN ({config.stash[NOT_RUN][marker]} left out): {absent[marker]}"
        else:
            result = f"{ran[marker]} ran" if ran[marker] else "none selected"
        terminalreporter.line(f"{subject}: {result}")
    for line in config.stash[EXERCISED]:
        terminalreporter.line(line)


@pytest.fixture(scope="session")
def comfyui(pytestconfig: pytest.Config) -> Path | None:
    """The root of the ComfyUI that the tests run on; None on the engine from PyPI."""
    return pytestconfig.stash[COMFYUI]


@pytest.fixture(scope="session")
def exercised(pytestconfig: pytest.Config) -> list[str]:
    """Lines for the closing section "what was exercised": append to it."""
    return pytestconfig.stash[EXERCISED]


@pytest.fixture(scope="session")
def shared_videos() -> list[Path]:
    """The clips of ../shared/videos by name; empty if there are none."""
    return _shared_videos()
