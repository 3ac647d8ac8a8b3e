"""Translations in locales/: nodes, inputs, outputs and the stop button have one in every language, and no other."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tune_a_video

LOCALES = Path(__file__).resolve().parent.parent / "locales"
# Characters that every text of the language contains.
SCRIPTS = {"ko": "[\uac00-\ud7a3]", "zh": "[\u4e00-\u9fff]", "ja": "[\u3040-\u30ff\u4e00-\u9fff]"}
FILES = sorted(LOCALES.glob("*/nodeDefs.json"))


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    async def nodes() -> list[Any]:
        return await (await tune_a_video.comfy_entrypoint()).get_node_list()

    return {schema.node_id: schema for schema in (node.GET_SCHEMA() for node in asyncio.run(nodes()))}


@pytest.fixture(params=FILES, ids=lambda path: path.parent.name)
def translated(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads(request.param.read_text(encoding="utf-8"))


def test_every_language_is_there_and_nothing_else() -> None:
    assert {path.parent.name for path in FILES} == SCRIPTS.keys()
    # English texts of nodes are in their schemas.
    mains = {LOCALES / language / "main.json" for language in ("en", *SCRIPTS)}
    assert {path for path in LOCALES.rglob("*") if path.is_file()} == {*FILES, *mains}


@pytest.mark.parametrize("language", ["en", *SCRIPTS])
def test_every_text_that_the_script_asks_for_is_there(language: str) -> None:
    asked = re.findall(r"texts\(\)\.(\w+)", (LOCALES.parent / "web" / "js" / "stop.js").read_text(encoding="utf-8"))
    stop = json.loads((LOCALES / language / "main.json").read_text(encoding="utf-8"))["tuneAVideo"]["stop"]
    assert stop.keys() == set(asked) and len(asked) == 3
    assert all(re.search(SCRIPTS.get(language, "[a-z]"), text) for text in stop.values())


@pytest.mark.comfyui
def test_nodes_inputs_and_outputs_are_the_schemas(translated: dict[str, Any], schemas: dict[str, Any]) -> None:
    assert translated.keys() == schemas.keys()
    for node_id, entry in translated.items():
        schema = schemas[node_id]
        assert entry.get("inputs", {}).keys() == {each.id for each in schema.inputs}, node_id
        assert list(entry["outputs"]) == [str(index) for index in range(len(schema.outputs))], node_id


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_texts_are_in_the_language(path: Path) -> None:
    script = SCRIPTS[path.parent.name]
    for node_id, entry in json.loads(path.read_text(encoding="utf-8")).items():
        assert re.search(script, entry["display_name"]) and re.search(script, entry["description"]), node_id
        assert "(Tune-A-Video)" in entry["display_name"], node_id
        parts = [*entry.get("inputs", {}).values(), *entry["outputs"].values()]
        for part in parts:
            assert part.keys() == {"name", "tooltip"} and part["name"], node_id
            assert re.search(script, part["tooltip"]), f"{node_id}: {part}"


def test_settings_that_a_tooltip_names_are_named_in_every_language(translated: dict[str, Any]) -> None:
    """The canvas does not translate values, so tooltips must name them in English."""
    named = {
        ("TAV_LoadVideo", "resize"): ("crop to fill", "fit", "stretch", "keep"),
        ("TAV_InflateUNet", "attention"): ("sparse-causal",),
        ("TAV_InflateUNet", "group_norm"): ("over frames", "per frame"),
        ("TAV_OneShotTune", "train_scope"): ("all", "middle and up"),
        ("TAV_Sample", "last_step"): ("clip noise level", "zero"),
    }
    for (node_id, name), values in named.items():
        tooltip = translated[node_id]["inputs"][name]["tooltip"]
        assert [value for value in values if value not in tooltip] == [], (node_id, name)
