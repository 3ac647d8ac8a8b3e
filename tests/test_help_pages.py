"""The help pages in web/docs say what the nodes are: their inputs, defaults and outputs, and their error messages."""

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
    """First cell, without its backticks, and second cell of a table; one entry for each of several names."""
    found = {}
    for line in section(page, title).splitlines()[2:]:
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.split("|")[1:-1]]
            found |= {name.strip("` "): cells[1] for name in cells[0].split(",")}
    return found


def text_of(node: ast.AST) -> str | None:
    """A string literal's text; what an f-string puts in is a placeholder."""
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else PLACEHOLDER for part in node.values]
        return "".join(map(str, parts))
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def literals() -> str:
    """All string literals of the pack, and the texts of its Refusals, one a line."""
    found = []
    for path in (*(ROOT / "nodes").rglob("*.py"), *(ROOT / "tav_core").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Refusal":
                name, reason, remedy = (text_of(part) or PLACEHOLDER for part in node.args)
                found.append(f"{name}: {reason}. {remedy}")
            elif (text := text_of(node)) is not None:
                found.append(text)
    return "\n".join(found)


def quoted_messages(page: Path) -> list[str]:
    """What stands in backticks under "What goes wrong" and is a message, not the name of an input or a value."""
    text = re.sub(r"\n {2}", " ", section(page, "What goes wrong"))
    return [quote for quote in re.findall(r"`([^`]+)`", text) if ": " in quote or f"{PLACEHOLDER}." in quote]


def is_spoken(message: str, spoken: list[str]) -> bool:
    """Whether a literal reads like the message; the input's name at its beginning may be a placeholder there."""
    general = re.sub(r"^\w+: ", f"{PLACEHOLDER}: ", message)
    patterns = [".*".join(map(re.escape, each.split(PLACEHOLDER))) for each in (message, general)]
    return any(re.match(pattern, literal) for pattern in patterns for literal in spoken)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_quoted_messages_are_the_codes_own(page: Path) -> None:
    spoken = literals().splitlines()
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
        if isinstance(default, (int, float)):
            assert float(described[each.id]) == default, each.id
        else:
            assert described[each.id] == (default or ""), each.id
    assert list(rows(page, "Outputs")) == [each.display_name for each in schema.outputs]
