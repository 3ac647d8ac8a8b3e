"""What the repository promises of itself: versions, requirements, workflows, help pages, clean imports."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import json
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
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
# Saved workflows name these, so they never change.
PUBLISHED_IDS = {
    "TAV_DDIMInvert",
    "TAV_InflateUNet",
    "TAV_LoadMotion",
    "TAV_LoadVideo",
    "TAV_OneShotTune",
    "TAV_Sample",
    "TAV_SaveMotion",
    "TAV_SaveVideo",
}
FRONTEND_NODES = {"MarkdownNote", "Note", "PrimitiveNode", "Reroute"}

LIST_CORE_NODES = """
import asyncio, json, pathlib, sys, tempfile
sys.path.insert(0, sys.argv[1])
import engine
with tempfile.TemporaryDirectory() as base:
    engine.load_engine(pathlib.Path(sys.argv[2]), pathlib.Path(base))
    import nodes
    asyncio.run(nodes.init_builtin_extra_nodes())
print(json.dumps(sorted(nodes.NODE_CLASS_MAPPINGS)))
"""

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


def run_python(code: str, *arguments: str | Path) -> str:
    """What `code` prints in a Python of its own that has nothing of ours on its path."""
    done = subprocess.run([sys.executable, "-I", "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def declared_node_ids() -> set[str]:
    """The node ids that the schemas in nodes/*.py name, read from the source: no ComfyUI is needed for it."""
    return {
        keyword.value.value
        for file in (ROOT / "nodes").glob("*.py")
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
    run_python(IMPORT_ALONE, ROOT / "__init__.py")


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


def test_there_are_workflows() -> None:
    assert WORKFLOWS


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_in_the_front_ends_format_and_whole(workflow: Path) -> None:
    graph = json.loads(workflow.read_text())
    assert isinstance(graph["nodes"], list) and isinstance(graph["links"], list)
    ids = {node["id"] for node in graph["nodes"]}
    links = {link[0]: link for link in graph["links"]}
    assert len(ids) == len(graph["nodes"]) and len(links) == len(graph["links"])
    assert all(link[1] in ids and link[3] in ids for link in links.values())
    for node in graph["nodes"]:
        for slot in node.get("inputs", []):
            assert slot["link"] is None or links[slot["link"]][3] == node["id"], (node["type"], slot["name"])
        assert not node["type"].startswith("TAV_") or node["type"] in declared_node_ids()


@pytest.mark.comfyui
def test_workflows_use_only_nodes_that_comfyui_or_this_pack_has(comfyui: Path) -> None:
    core = set(json.loads(run_python(LIST_CORE_NODES, ROOT / "tools", comfyui).splitlines()[-1]))
    assert not core & declared_node_ids()
    known = core | declared_node_ids() | FRONTEND_NODES
    used = {node["type"] for workflow in WORKFLOWS for node in json.loads(workflow.read_text())["nodes"]}
    assert used - known == set()
