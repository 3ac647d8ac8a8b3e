"""The help pages in web/docs match the nodes: inputs, defaults, outputs and error messages."""

from __future__ import annotations

import ast
import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
import tune_a_video

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "web" / "docs").glob("*.md"))
PLACEHOLDER = "…"


def section(page: Path, title: str) -> str:
    return re.split(r"^## ", page.read_text(encoding="utf-8").partition(f"## {title}\n")[2], flags=re.M)[0]


def rows(page: Path, title: str) -> dict[str, str]:
    """Return a table's second cells by the names in its first cells."""
    found = {}
    for line in section(page, title).splitlines()[2:]:
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.split("|")[1:-1]]
            found |= {name.strip("` "): cells[1] for name in cells[0].split(",")}
    return found


def text_of(node: ast.AST) -> str:
    """Return the text of a string literal, with placeholders for values of f-strings and variables."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else PLACEHOLDER for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else PLACEHOLDER


def messages() -> str:
    """Return all string literals of the pack and the texts of its refusals, one a line."""
    found = []
    for path in (*(ROOT / "nodes").rglob("*.py"), *(ROOT / "tav_core").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                found.append(text_of(node))
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Refusal" and len(node.args) == 3:
                found.append("{}: {}. {}".format(*map(text_of, node.args)))
    return "\n".join(found)


def quoted_messages(page: Path) -> list[str]:
    """Return the messages quoted under "What goes wrong"; quoted names and values are left out."""
    text = re.sub(r"\n {2}", " ", section(page, "What goes wrong"))
    return [quote for quote in re.findall(r"`([^`]+)`", text) if ": " in quote or f"{PLACEHOLDER}." in quote]


def is_spoken(message: str, spoken: list[str]) -> bool:
    """Return whether a literal matches the message; the input's name may be a placeholder in it."""
    general = re.sub(r"^\w+: ", f"{PLACEHOLDER}: ", message)
    patterns = [".*".join(map(re.escape, each.split(PLACEHOLDER))) for each in (message, general)]
    return any(re.match(pattern, literal) for pattern in patterns for literal in spoken)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_quoted_messages_are_the_codes_own(page: Path) -> None:
    spoken = messages().splitlines()
    assert [quote for quote in quoted_messages(page) if not is_spoken(quote, spoken)] == []


def test_enough_messages_are_quoted() -> None:
    assert sum(len(quoted_messages(page)) for page in PAGES) >= 20


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    async def nodes() -> list[Any]:
        return await (await tune_a_video.comfy_entrypoint()).get_node_list()

    return {schema.node_id: schema for schema in (node.GET_SCHEMA() for node in asyncio.run(nodes()))}


@pytest.mark.comfyui
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_a_page_lists_its_nodes_inputs_defaults_and_outputs(page: Path, schemas: dict[str, Any]) -> None:
    schema = schemas[page.stem]
    assert page.read_text(encoding="utf-8").startswith(f"# {schema.display_name}\n")
    described = rows(page, "Inputs")
    assert described.keys() == {each.id for each in schema.inputs}
    for each in schema.inputs:
        default = getattr(each, "default", None)
        if isinstance(default, bool):
            assert described[each.id] == str(default).lower(), each.id
        elif isinstance(default, (int, float)):
            assert float(described[each.id]) == default, each.id
        else:
            assert described[each.id] == (default or ""), each.id
    assert list(rows(page, "Outputs")) == [each.display_name for each in schema.outputs]
