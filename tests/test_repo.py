"""The repository is consistent: versions, requirements, node ids, help pages, clean imports."""

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
    "TAV_EditControl",
    "TAV_EditGuider",
    "TAV_EditPrompt",
    "TAV_EvaluateVideo",
    "TAV_InflateUNet",
    "TAV_LoadDemoModel",
    "TAV_LoadMotion",
    "TAV_LoadVideo",
    "TAV_OneShotTune",
    "TAV_Sample",
    "TAV_SaveMotion",
    "TAV_SaveVideo",
    "TAV_ShowMask",
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

ON_A_HOST = """
import importlib.util, sys, types
sys.modules["nodes"] = types.ModuleType("nodes")
if sys.argv[2]:
    sys.modules["comfyui_version"] = types.ModuleType("comfyui_version")
    sys.modules["comfyui_version"].__version__ = sys.argv[2]
spec = importlib.util.spec_from_file_location("pack", sys.argv[1])
pack = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
print(hasattr(pack, "NODE_CLASS_MAPPINGS"))
"""


def declared_node_ids() -> set[str]:
    """Return the node ids in nodes/*.py, read from the source so that no ComfyUI is needed."""
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
    """Only newer hosts know search words; older ones must get schemas without them."""

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


@pytest.mark.parametrize("version", ["0.3.63", "0.3.9", "0.2.99", "v0.3.40", ""])
def test_on_an_older_host_one_line_says_what_is_needed(version: str) -> None:
    command = [sys.executable, "-I", "-c", ON_A_HOST, ROOT / "__init__.py", version]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"]
    (line,) = done.stderr.splitlines()
    assert "needs ComfyUI 0.3.64 or newer" in line and (version or "without a version") in line


@pytest.mark.parametrize("version", ["0.3.64", "0.3.65.1", "0.26.0", "0.100.0", "1.0", "2"])
def test_newer_hosts_are_taken(version: str) -> None:
    command = [sys.executable, "-I", "-c", ON_A_HOST, ROOT / "__init__.py", version]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"] and not done.stderr


@pytest.mark.comfyui
def test_an_older_host_leaves_it_at_that_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Load the pack as ComfyUI does, under an older version number."""
    import comfyui_version

    import nodes

    monkeypatch.setattr(comfyui_version, "__version__", "0.3.50")
    before = dict(nodes.NODE_CLASS_MAPPINGS)
    assert asyncio.run(nodes.load_custom_node(str(ROOT), module_parent="custom_nodes"))
    assert nodes.NODE_CLASS_MAPPINGS == before
    (record,) = (each for each in caplog.records if each.levelname in ("WARNING", "ERROR"))
    assert "needs ComfyUI 0.3.64 or newer, and this one is 0.3.50: update ComfyUI" in record.getMessage()


def test_the_oldest_host_is_the_same_everywhere() -> None:
    assert PYPROJECT["tool"]["comfy"]["requires-comfyui"] == f">={tune_a_video.OLDEST_HOST}"
    assert f"ComfyUI {tune_a_video.OLDEST_HOST} or newer is needed" in (ROOT / "README.md").read_text()


def test_every_promise_names_a_test_that_exists() -> None:
    promises = (ROOT / "docs" / "robustness.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", promises)
    assert len(named) > 80
    for file in {file for file, _ in named}:
        functions = {
            node.name
            for node in ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef)
        }
        assert {function for name, function in named if name == file} <= functions, file


def test_every_file_is_python_3_10() -> None:
    """Python 3.10 is the oldest supported version; tests on newer ones would not notice newer syntax."""
    for file in ROOT.rglob("*.py"):
        if ".venv" not in file.parts:
            ast.parse(file.read_text(), file.name, feature_version=(3, 10))


def test_the_archive_has_nothing_that_the_registry_refuses() -> None:
    """Its policies as ruff's rules: eval, exec, pickle, shells, fetched addresses, several statements in a line."""
    left_out = set((ROOT / ".comfyignore").read_text().split())
    packed = [path for path in (*ROOT.glob("*.py"), *ROOT.glob("*/")) if path.name not in left_out]
    folders = [str(path) for path in packed if not path.name.startswith((".", "_")) or path.suffix == ".py"]
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--ignore-noqa", "--output-format", "concise"]
    ran = subprocess.run([*ruff, "--select", "S,E702", "--ignore", "S101", *folders], capture_output=True, text=True)
    found = [line for line in ran.stdout.splitlines() if ".py:" in line]
    assert ran.returncode == 1 and all(" S603 " in line for line in found), ran.stdout
    assert {Path(line.split(":")[0]).name for line in found} == {"process.py", "encode.py"}
    texts = {path: path.read_text(encoding="utf-8") for folder in folders for path in Path(folder).rglob("*.py")}
    assert texts and not [path for path, text in texts.items() if re.search(r"\bpip\b.{0,20}\binstall\b", text)]
