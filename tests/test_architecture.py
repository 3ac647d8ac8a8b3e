"""The order of the house: who may import whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("tav_core", "nodes")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
# A module imports only from floors below its own, or from its own folder.
FLOORS = (
    (
        "tav_core.cancel",
        "tav_core.errors",
        "tav_core.out_of_memory",
        "tav_core.attention",
        "tav_core.norm",
        "tav_core.winograd",
        "tav_core.schedule",
    ),
    ("tav_core.convolution",),
    ("tav_core.unet", "tav_core.invert", "tav_core.sample"),
    ("tav_core.temporal",),
    ("tav_core.inflate",),
    ("tav_core.motion", "tav_core.control"),
    ("tav_core.host", "tav_core.media", "tav_core.tiny_sd"),
    ("tav_core.tuning", "tav_core.evaluation"),
    ("tav_core.pipeline",),
    ("nodes",),
)
PURE = (
    "tav_core.tuning.memory_plan",
    "tav_core.attention",
    "tav_core.norm",
    "tav_core.winograd",
    "tav_core.schedule",
)


def imports(name: str, path: Path) -> list[str]:
    """Full names of what a module imports, those of the pack from its root."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def floor(name: str) -> int | None:
    """The floor that a module of the pack lies on; None for other packages."""
    for number, rooms in enumerate(FLOORS):
        if any(name == room or name.startswith(f"{room}.") for room in rooms):
            return number
    return None


@pytest.mark.parametrize("name", MODULES)
def test_only_the_host_room_and_the_demos_model_import_comfy(name: str) -> None:
    asked = {each.partition(".")[0] for each in imports(name, MODULES[name])}
    assert name.startswith(("tav_core.host", "tav_core.tiny_sd")) or not asked & {"comfy", "comfy_extras"}
    # Nodes may also import these modules of the host.
    assert name.startswith(("tav_core.host", "tav_core.tiny_sd", "nodes")) or not asked & {
        "comfy_api",
        "folder_paths",
        "server",
        "nodes",
    }


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_import_nothing_of_ours(name: str) -> None:
    assert [each for each in imports(name, MODULES[name]) if each.startswith(("tav_core", "nodes"))] == []


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name: str) -> None:
    ours = floor(name)
    if name in ("tav_core", ""):
        return
    assert ours is not None, f"{name} lies on no floor: add it to FLOORS"
    room = name.split(".")[:2]
    for each in imports(name, MODULES[name]):
        theirs = floor(each)
        if theirs is not None and each.split(".")[:2] != room and not (name.startswith("nodes") and theirs == ours):
            assert theirs < ours, f"{name} imports {each}"


def test_the_page_shows_every_file() -> None:
    tree = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    shown = {word for word in tree.split() if word.endswith(".py")}
    assert shown == {path.name for path in MODULES.values()}
