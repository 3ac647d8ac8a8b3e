"""What the repository promises of itself: versions, requirements, node ids, help pages, clean imports."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tune_a_video

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest there

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Saved workflows name these, so they never change.
PUBLISHED_IDS = {
    "TAV_CompareVideos",
    "TAV_DDIMInvert",
    "TAV_EvaluateVideo",
    "TAV_InflateUNet",
    "TAV_LoadDemoModel",
    "TAV_LoadMotion",
    "TAV_LoadVideo",
    "TAV_OneShotTune",
    "TAV_Sample",
    "TAV_SaveMotion",
    "TAV_SaveVideo",
}

IMPORT_ALONE = """
import asyncio, importlib.util, sys
spec = importlib.util.spec_from_file_location("pack", sys.argv[1])
pack = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
assert asyncio.iscoroutinefunction(pack.comfy_entrypoint)
assert not hasattr(pack, "NODE_CLASS_MAPPINGS"), "it would keep ComfyUI from calling comfy_entrypoint"
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"comfy", "comfy_api", "folder_paths", "torch"}, loaded
"""


def declared_node_ids() -> set[str]:
    """The node ids that the schemas in nodes/*.py name, read from the source: no ComfyUI is needed for it."""
    return {
        keyword.value.value
        for file in (*(ROOT / "nodes").glob("*.py"), ROOT / "demo" / "loader.py")
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg == "node_id" and isinstance(keyword.value, ast.Constant)
    }


def test_the_changelog_opens_with_the_version_of_pyproject() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == PYPROJECT["project"]["version"]


def test_requirements_txt_repeats_the_dependencies() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = [line for line in lines if line and not line.startswith("#")]
    assert required == PYPROJECT["project"]["dependencies"]


def test_the_pack_imports_without_comfyui() -> None:
    command = [sys.executable, "-I", "-c", IMPORT_ALONE, ROOT / "__init__.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_packs_root_is_not_on_the_path_and_hides_no_module_of_the_host(comfyui: Path | None) -> None:
    assert ROOT not in {Path(entry).resolve() for entry in sys.path}
    spec = importlib.util.find_spec("nodes")
    if comfyui is None:
        assert spec is None
    else:
        assert spec is not None and spec.origin == str(comfyui / "nodes.py")


def test_no_published_node_id_is_gone() -> None:
    assert declared_node_ids() >= PUBLISHED_IDS


@pytest.mark.comfyui
def test_the_entrypoint_registers_exactly_the_declared_nodes() -> None:
    async def registered() -> list[str]:
        extension = await tune_a_video.comfy_entrypoint()
        return [node.GET_SCHEMA().node_id for node in await extension.get_node_list()]

    ids = asyncio.run(registered())
    assert len(ids) == len(set(ids))
    assert set(ids) == declared_node_ids()


def test_every_node_has_a_help_page_and_no_page_is_left_over() -> None:
    assert ROOT / tune_a_video.WEB_DIRECTORY == ROOT / "web"
    assert {page.stem for page in (ROOT / "web" / "docs").glob("*.md")} == declared_node_ids()


@pytest.mark.comfyui
def test_search_finds_nodes_by_the_words_people_type() -> None:
    """On hosts whose search knows such words; others get schemas without them, and take them."""

    async def schemas() -> dict[str, Any]:
        extension = await tune_a_video.comfy_entrypoint()
        return {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in await extension.get_node_list()}

    made = asyncio.run(schemas())
    words = {
        "tune a video": "TAV_OneShotTune",
        "tav": "TAV_LoadVideo",
        "video edit": "TAV_Sample",
        "ddim inversion": "TAV_DDIMInvert",
    }
    if not hasattr(made["TAV_Sample"], "search_aliases"):
        return  # such a host refuses the argument, so the schemas could only be made without it
    assert {word: word in made[node_id].search_aliases for word, node_id in words.items()} == dict.fromkeys(words, True)
