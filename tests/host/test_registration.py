"""The host lists all nodes of this pack as its own, and its core's nodes are untouched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from graphs import PACK

pytestmark = pytest.mark.host

ROOT = Path(__file__).resolve().parents[2]

NODES = (
    "TAV_LoadVideo",
    "TAV_InflateUNet",
    "TAV_OneShotTune",
    "TAV_DDIMInvert",
    "TAV_Sample",
    "TAV_SaveVideo",
    "TAV_SaveMotion",
    "TAV_LoadMotion",
    "TAV_EvaluateVideo",
    "TAV_CompareVideos",
    "TAV_LoadDemoModel",
    "TAV_EditPrompt",
    "TAV_EditControl",
    "TAV_EditGuider",
    "TAV_ShowMask",
)


@pytest.fixture(scope="module")
def object_info(server):
    return server.get("/object_info")


@pytest.mark.parametrize("node_id", NODES)
def test_node_is_ours_and_documented(object_info, node_id):
    info = object_info[node_id]
    assert info["python_module"] == f"custom_nodes.{PACK}"
    assert info["category"] == "Tune-A-Video" + ("/demo" if node_id == "TAV_LoadDemoModel" else "")
    assert info["description"]
    inputs = info["input"].get("required", {}) | info["input"].get("optional", {})
    for name, (_, options) in inputs.items():
        assert options.get("tooltip"), f"input '{name}' has no tooltip"
    assert len(info["output_tooltips"]) == len(info["output"])
    assert all(info["output_tooltips"])


def test_pack_registers_nothing_else(object_info):
    ours = {name for name, info in object_info.items() if info["python_module"] == f"custom_nodes.{PACK}"}
    assert ours == set(NODES)


def test_core_video_nodes_keep_their_names(object_info):
    for node_id, display_name in (("LoadVideo", "Load Video"), ("SaveVideo", "Save Video")):
        assert object_info[node_id]["display_name"] == display_name
        assert object_info[node_id]["python_module"] == "comfy_extras.nodes_video"


def test_no_pack_failed_to_import(server):
    assert "(IMPORT FAILED)" not in server.log()  # without brackets: parts of the host itself


@pytest.mark.parametrize("language", ["en", "ko", "zh", "ja"])
def test_translations_are_served(server, language):
    folder = ROOT / "locales" / language
    served = server.get("/i18n")[language]
    assert served["tuneAVideo"] == json.loads((folder / "main.json").read_text(encoding="utf-8"))["tuneAVideo"]
    if language != "en":  # English texts of nodes are in their schemas
        written = json.loads((folder / "nodeDefs.json").read_text(encoding="utf-8"))
        assert {node: served["nodeDefs"][node] for node in NODES} == written
